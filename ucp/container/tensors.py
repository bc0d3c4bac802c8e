"""torch's rebuild functions and storages inside pickles, as inert data (torch/_utils.py, torch/_tensor.py)."""

from __future__ import annotations

from ucp.container.arrays import is_shape
from ucp.container.machine import Machine
from ucp.container.values import Reference, Size
from ucp.layout import Box, Shape, row_major_strides
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf, Tree

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",
}
"""Element type of each storage class of torch (torch/__init__.py) whose dtype ucp knows."""

OTHER_STORAGE_SIZES = {
    "ComplexDoubleStorage": 16,
    "QUInt8Storage": 1,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
"""Bytes per element of the storage classes whose dtype ucp does not know."""

_LARGE = 1 << 26
_REPEATS = 256
"""How often a tensor may repeat the bytes of its storage (``expand``), above a size that does not matter."""

_PLAIN_TYPES = frozenset(
    {
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.nn.Parameter",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.nn.parameter.UninitializedParameter",
    }
)


def storage_dtype(storage: Tree) -> str | None:
    """Element type of a storage class, "" for one that ucp does not know, None if it is no storage class."""
    if not isinstance(storage, Reference) or storage.module.partition(".")[0] != "torch":
        return None
    if storage.name in STORAGE_DTYPES:
        return STORAGE_DTYPES[storage.name]
    return "" if storage.name in OTHER_STORAGE_SIZES else None


def storage_itemsize(storage: Reference) -> int:
    """Bytes per element of a storage class that `storage_dtype` knows."""
    other = OTHER_STORAGE_SIZES.get(storage.name)
    return other if other is not None else ITEMSIZE[STORAGE_DTYPES[storage.name]]


def storage_leaf(storage: Reference, *, object: str, offset: int, count: int) -> Tree:
    """A storage of `count` elements at byte `offset` as a one-dim leaf.

    A storage whose dtype ucp does not know is an Opaque around a leaf of its bytes.
    """
    dtype = storage_dtype(storage)
    if dtype:
        return TensorLeaf(Extent(object, offset, (count,), (1,), dtype))
    size = count * storage_itemsize(storage)
    return Opaque(storage.module, storage.name, (TensorLeaf(Extent(object, offset, (size,), (1,), "uint8")),))


def rebuild_v1(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``torch._utils._rebuild_tensor(storage, storage_offset, size, stride)``."""
    return _rebuild(machine, "_rebuild_tensor", args, dtype=None, metadata=None)


def rebuild_v2(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=None)``."""
    return _rebuild(machine, "_rebuild_tensor_v2", args, dtype=None, metadata=args[6] if len(args) > 6 else None)


def rebuild_v3(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``_rebuild_tensor_v3(storage, …, backward_hooks, dtype, metadata=None)``: dtypes without a storage class."""
    return _rebuild(machine, "_rebuild_tensor_v3", args, dtype=args[6], metadata=args[7] if len(args) > 7 else None)


def rebuild_parameter(_: Machine, args: tuple[Tree, ...]) -> Tree:
    """``_rebuild_parameter(data, requires_grad, backward_hooks)``, with or without state: its data."""
    return args[0] if isinstance(args[0], TensorLeaf) else Opaque("torch._utils", "_rebuild_parameter", args)


def rebuild_from_type(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``torch._tensor._rebuild_from_type_v2(function, type, args, state)``: a tensor with attributes.

    Attributes of a plain tensor are dropped. A subclass may give its bytes another meaning, so it stays Opaque.
    """
    function, kind, inner, *rest = args
    data = machine.call(function, inner)
    if isinstance(kind, Reference) and kind.path in _PLAIN_TYPES and isinstance(data, TensorLeaf):
        return data
    if not isinstance(kind, Reference):
        machine.fail("a tensor whose type is no class")
    return Opaque(kind.module, kind.name, (data,), state=rest[0] if rest else None)


def rebuild_from_data(_: Machine, args: tuple[Tree, ...]) -> Tree:
    """``_rebuild_device_tensor_from_numpy(data, dtype, device, requires_grad)`` and its like for other devices.

    Opaque where torch would cast, as XLA does to carry bfloat16 in float32 arrays.
    """
    data, dtype = args[0], args[1]
    if isinstance(data, TensorLeaf) and isinstance(dtype, Reference) and dtype.path == f"torch.{data.extent.dtype}":
        return TensorLeaf(data.extent, inline=data.inline)
    return Opaque("torch._utils", "_rebuild_device_tensor_from_numpy", args)


def size(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``torch.Size(sizes)``."""
    sizes = args[0] if args else ()
    if not is_shape(tuple(sizes) if isinstance(sizes, list) else sizes):
        machine.fail("a torch.Size that is not made of sizes")
    return Size(sizes)


def layout(machine: Machine, args: tuple[Tree, ...]) -> Tree:
    """``torch.serialization._get_layout("torch.strided")``."""
    if not isinstance(args[0], str):
        machine.fail("a layout without a name")
    return machine.reference("torch", args[0].removeprefix("torch."))


def _rebuild(machine: Machine, name: str, args: tuple[Tree, ...], *, dtype: Tree, metadata: Tree) -> Tree:
    storage, offset, shape, strides = args[:4]
    otherwise = Opaque("torch._utils", name, args)
    if not isinstance(storage, TensorLeaf) or metadata:
        return otherwise  # an unknown dtype, or bytes that are the conjugate or negative of the values
    element = storage.extent.dtype if dtype is None else _dtype(dtype)
    if element is None:
        return otherwise
    problem = _check(storage.extent, element, offset, shape, strides)
    if problem:
        return machine.fault(otherwise, problem)
    return TensorLeaf(_view(storage.extent, element, offset, tuple(shape), tuple(strides)))


def _dtype(dtype: Tree) -> str | None:
    named = isinstance(dtype, Reference) and dtype.module == "torch" and dtype.name in ITEMSIZE
    return dtype.name if named else None


def _check(storage: Extent, dtype: str, offset: Tree, shape: Tree, strides: Tree) -> str | None:
    """What is wrong with a view of `storage`, or None. The size-0 and size-1 dims may have any stride."""
    if not is_shape(shape):
        return "its sizes are not those of a tensor"
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        return f"it does not have {len(shape)} strides for as many dims"
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in (offset, *strides)):
        return "its storage offset or strides are negative or out of range"
    view = _view(storage, dtype, offset, shape, strides)
    if view.size and view.span[1] > storage.offset + storage.nbytes:
        return f"shape {tuple(shape)} reaches {view.span[1] - view.offset} bytes on, past the end of its storage"
    if view.nbytes > _LARGE and view.nbytes > _REPEATS * storage.nbytes:
        return f"shape {tuple(shape)} repeats the {storage.nbytes} bytes of its storage to {view.nbytes}"
    return None


def _view(storage: Extent, dtype: str, offset: int, shape: Shape, strides: Shape) -> Extent:
    if 0 in shape:
        return Extent(storage.object, storage.offset, shape, row_major_strides(shape), dtype)
    return Extent(storage.object, storage.offset + offset * ITEMSIZE[dtype], shape, strides, dtype)


def slice_storage(storage: Tree, offset: int, count: int) -> Tree:
    """Elements [offset, offset + count) of a storage leaf; None where that is no part of it."""
    if not isinstance(storage, TensorLeaf):
        return None
    box = Box((offset,), (count,))
    return TensorLeaf(storage.extent.sub(box)) if box.within(storage.extent.shape) else None
