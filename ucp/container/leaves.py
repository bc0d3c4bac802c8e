"""Values of the tensors in a tree, one at a time: for steps, random states and other small ones."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ucp.container.values import Reference
from ucp.errors import CorruptError, FitError
from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

if TYPE_CHECKING:
    import numpy as np

_NUMPY = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_LARGE = 1 << 24
_REPEATS = 16
"""How often the bytes of a file may be described over and over, above a size that does not matter."""


def leaf_bytes(store: Store, leaf: TensorLeaf) -> bytes:
    """All bytes of a leaf in C order, little-endian; `store` is the one its extent's object lies in."""
    if leaf.inline is not None:
        return leaf.inline
    extent = leaf.extent
    first, stop = extent.span
    if extent.nbytes > _LARGE and extent.nbytes > _REPEATS * (stop - first):
        raise _repeated(store, extent.object, extent.nbytes, stop - first)
    raw = store.read(extent.object, first, stop - first) if stop > first else b""
    return raw if extent.is_contiguous else _gathered(raw, leaf)


class LeafBytes:
    """Bytes of the leaves of one store, as `leaf_bytes` gives them; those of equal extents are read and held once.

    CorruptError if there are far more of them than their file has bytes: a few that are described over and over.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[Extent, bytes] = {}
        self._given: dict[str, int] = {}

    def __call__(self, leaf: TensorLeaf) -> bytes:
        """All bytes of `leaf`."""
        if leaf.inline is not None:
            return leaf.inline
        extent = leaf.extent
        given = self._given[extent.object] = self._given.get(extent.object, 0) + extent.nbytes
        if given > _LARGE and given > _REPEATS * (size := self._store.entry(extent.object).size):
            raise _repeated(self._store, extent.object, given, size)
        if extent not in self._known:
            self._known[extent] = leaf_bytes(self._store, leaf)
        return self._known[extent]


def _repeated(store: Store, path: str, described: int, held: int) -> CorruptError:
    return CorruptError(
        f"{store.url}/{path}: tensors of {described} bytes repeat {held} bytes", hint="do not trust this file"
    )


def leaf_numpy(store: Store, leaf: TensorLeaf) -> np.ndarray[Any, np.dtype[Any]]:
    """A leaf as a numpy array of its shape; bfloat16 as uint16 and float8 as uint8, bit for bit."""
    import numpy as np

    dtype = np.dtype(_NUMPY.get(leaf.extent.dtype, leaf.extent.dtype)).newbyteorder("<")
    return np.frombuffer(leaf_bytes(store, leaf), dtype).reshape(leaf.extent.shape)


def leaf_scalar(store: Store, leaf: TensorLeaf) -> int | float | bool:
    """The number that a leaf of one element holds; FitError if it has another size or is complex."""
    extent = leaf.extent
    if extent.size != 1 or extent.dtype == "complex64":
        raise FitError(
            f"{store.url}/{extent.object}: a {extent.dtype} tensor of shape {extent.shape} where a number is expected"
        )
    data = leaf_bytes(store, leaf)
    if extent.dtype == "bfloat16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if extent.dtype == "float8_e5m2":
        return float(struct.unpack("<e", b"\0" + data)[0])
    if extent.dtype == "float8_e4m3fn":
        return _float8_e4m3fn(data[0])
    number = leaf_numpy(store, leaf).item()
    assert isinstance(number, int | float)
    return number


def _gathered(raw: bytes, leaf: TensorLeaf) -> bytes:
    """The elements of a strided leaf, whose span is `raw`, in C order."""
    import numpy as np

    extent = leaf.extent
    if not extent.size:
        return b""
    width = extent.itemsize
    strides = [stride * width if n > 1 else 0 for n, stride in zip(extent.shape, extent.strides, strict=True)]
    view = np.ndarray(extent.shape, f"V{width}", raw, strides=strides)
    return np.ascontiguousarray(view).tobytes()


def _float8_e4m3fn(bits: int) -> float:
    """OCP 8-bit floating point specification 1.0, E4M3: bias 7, no infinities, S.1111.111 is NaN."""
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = bits >> 3 & 0xF, bits & 7
    if exponent == 0xF and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def with_bytes(store: Store, tree: Tree) -> Tree:
    """`tree` with every leaf holding its bytes inline, as a small file is written from; `store` as in `leaf_bytes`.

    CorruptError as `LeafBytes` raises it.
    """
    return _filled(tree, LeafBytes(store))


def _filled(tree: Tree, read: LeafBytes) -> Tree:
    if isinstance(tree, TensorLeaf):
        return replace(tree, inline=read(tree))
    if isinstance(tree, dict):
        return {key: _filled(value, read) for key, value in tree.items()}
    if isinstance(tree, list | tuple | set | frozenset):
        return type(tree)(_filled(value, read) for value in tree)
    if not isinstance(tree, Opaque) or isinstance(tree, Reference):
        return tree
    return replace(
        tree,
        args=_filled(tree.args, read),
        kwargs=_filled(tree.kwargs, read),
        state=_filled(tree.state, read),
        items=_filled(tree.items, read),
        pairs=_filled(tree.pairs, read),
    )
