"""numpy arrays, scalars and dtypes inside pickles, as inert data (``__reduce__`` in numpy/_core/src/multiarray)."""

from __future__ import annotations

import math
from typing import TypeGuard

from ucp.container.machine import Machine
from ucp.layout import itemsize
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf, Tree

_DTYPES = {
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "u2": "uint16",
    "i2": "int16",
    "u4": "uint32",
    "i4": "int32",
    "u8": "uint64",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
}


def reconstruct(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """An array whose class, shape and data `build_array` is given; an Opaque of its class until then.

    ``numpy._core.multiarray._reconstruct(class, shape, typecode)``.
    """
    return machine.call(args[0], ())


def build_array(machine: Machine, target: Opaque, state: Tree) -> Tree:
    """The state of an array: (version, shape, dtype, is Fortran order, bytes); Opaque where ucp has no such dtype."""
    target.state = state
    if not isinstance(state, tuple) or len(state) != 5:
        return target
    return array(machine, target, data=state[4], dtype=state[2], shape=state[1], fortran=state[3])


def array(machine: Machine, otherwise: Opaque, *, data: Tree, dtype: Tree, shape: Tree, fortran: Tree) -> Tree:
    """An array as a leaf with inline bytes, or `otherwise` where ucp has no such dtype."""
    found = dtype_name(dtype)
    if found is None or not isinstance(data, bytes):
        return otherwise
    name, swapped = found
    if not is_shape(shape) or len(data) != math.prod(shape) * itemsize(name):
        return machine.fault(otherwise, f"a numpy array of {len(data)} bytes does not have its own shape and dtype")
    if fortran or swapped:
        machine.spend(2 * len(data))
        data = _plain(data, width=itemsize(name), name=name, shape=shape, fortran=bool(fortran), swapped=swapped)
    return TensorLeaf(Extent.contiguous("", 0, shape, name), numpy=True, inline=data)


def scalar(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``numpy._core.multiarray.scalar(dtype, bytes)`` as a leaf without dims."""
    otherwise = Opaque("numpy._core.multiarray", "scalar", args)
    dtype, data = args
    return array(machine, otherwise, data=data, dtype=dtype, shape=(), fortran=False)


def from_buffer(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``numpy._core.numeric._frombuffer(buffer, dtype, shape, order)``: how protocol 5 writes arrays."""
    data, dtype, shape, order = args
    otherwise = Opaque("numpy._core.numeric", "_frombuffer", args)
    return array(machine, otherwise, data=data, dtype=dtype, shape=shape, fortran=order == "F")


def dtype_name(dtype: Tree) -> tuple[str, bool] | None:
    """(name, whether its bytes are big-endian) of a pickled ``numpy.dtype``; None if ucp has no such dtype.

    Its state is (version, byte order, subarray, names, fields, size, alignment, flags).
    """
    if not isinstance(dtype, Opaque) or dtype.path != "numpy.dtype" or not dtype.args:
        return None
    code, state = dtype.args[0], dtype.state
    name = _DTYPES.get(code) if isinstance(code, str) else None
    if name is None or not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|"):
        return None
    if any(part is not None for part in state[2:5]):
        return None
    return name, state[1] == ">"


def is_shape(shape: Tree) -> TypeGuard[tuple[int, ...]]:
    """Whether `shape` is a tuple of sizes that numpy and torch can hold."""
    if not isinstance(shape, tuple) or len(shape) > 64:
        return False
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    return bool(math.prod(size for size in shape if size) < 1 << 60)


def _plain(data: bytes, *, width: int, name: str, shape: tuple[int, ...], fortran: bool, swapped: bool) -> bytes:
    """`data` in C order and little-endian."""
    import numpy as np

    unit = 4 if name == "complex64" else width
    elements = np.frombuffer(data, f"V{width}").reshape(shape, order="F" if fortran else "C")
    ordered = np.ascontiguousarray(elements).tobytes()
    if not swapped:
        return ordered
    return np.frombuffer(ordered, f">u{unit}").astype(f"<u{unit}").tobytes()
