"""Trees as pickles of protocol 2, which is what torch.save writes, with classes by name and nothing imported.

Plain values and tensors come out such that ``torch.load(weights_only=True)`` takes them.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ucp.container.bounds import check_bounds
from ucp.container.tensors import STORAGE_DTYPES
from ucp.container.values import Reference, Size
from ucp.errors import UsageError
from ucp.layout import numel, row_major_strides
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import TensorSpec
from ucp.tree import Opaque, TensorLeaf, Tree

_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if not name.endswith("UntypedStorage")}
_NUMPY = {"bool": "b1", "complex64": "c8"} | {
    f"{kind}{8 * size}": f"{kind[0]}{size}"
    for kind in ("uint", "int", "float")
    for size in (1, 2, 4, 8)
    if f"{kind}{8 * size}" in ITEMSIZE
}
_ALWAYS = frozenset({"torch.device", "torch.strided", *(f"torch.{dtype}" for dtype in ITEMSIZE)})


@dataclass(frozen=True, slots=True)
class Zeros:
    """A run of `nbytes` zero bytes inside a slot, which no section writes: padding."""

    nbytes: int


Parts = tuple[int | Zeros, ...]
"""What a storage is made of, in order: a section by its size in bytes, or zeros."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a tree to be written whose bytes, C order, are sections of the file's task.

    Mostly they are one section; with `parts` they are the sections and zeros listed there, one after the other. Slots
    are numbered by `index`, and the task's sections are those of slot 0, then those of slot 1, and so on. Slots with
    the same index share their storage, as tied tensors do.
    """

    index: int
    spec: TensorSpec
    parts: Parts | None = None

    @property
    def made_of(self) -> Parts:
        """`parts`, or the one section."""
        return (self.spec.nbytes,) if self.parts is None else self.parts


Storage = Callable[[Slot | TensorLeaf], str]
"""Gives the storage key of a tensor."""


def pickled(tree: Tree, *, storage: Storage, classes: Collection[str] = ()) -> bytes:
    """`tree` as a pickle whose tensors refer to the storage that `storage` names for each.

    `classes` are the ``module.name`` of what may be referred to beside plain values and tensors; numpy arrays are
    ``numpy.ndarray``. UsageError for anything else, CorruptError for a tree that is no tree.
    """
    check_bounds(tree, where="the tree to be written")
    pickler = _Pickler(storage, frozenset(classes) | _ALWAYS)
    pickler.value(tree)
    return b"\x80\x02" + b"".join(pickler.parts) + b"."


class _Pickler:
    """Writes opcodes; strings and globals are memoized by value, containers are written out each time."""

    def __init__(self, storage: Storage, classes: frozenset[str]) -> None:
        self.parts: list[bytes] = []
        self._storage = storage
        self._classes = classes
        self._memo: dict[str | tuple[str, str], int] = {}

    def value(self, value: Tree) -> None:
        """Write any node of a tree."""
        if value is None or isinstance(value, bool):
            self.parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.parts.append(_integer(value))
        elif isinstance(value, float):
            self.parts.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self._text(value)
        elif isinstance(value, bytes | bytearray):
            self._call("_codecs", "encode", (value.decode("latin-1"), "latin1"))
        elif isinstance(value, Slot):
            self._tensor(value, value.spec)
        elif isinstance(value, TensorLeaf):
            self._leaf(value)
        elif isinstance(value, Opaque):
            self._opaque(value)
        else:
            self._container(value)

    def _container(self, value: Tree) -> None:
        if isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, list):
            self.parts.append(b"]")
            self._items(value)
        elif isinstance(value, Size):
            self._call("torch", "Size", (tuple(value),))
        elif isinstance(value, tuple):
            self._tuple(value)
        elif isinstance(value, set | frozenset):
            self._call("__builtin__", "set" if isinstance(value, set) else "frozenset", (list(value),))
        elif isinstance(value, complex):
            self._call("__builtin__", "complex", (value.real, value.imag))
        else:
            raise UsageError(f"a {type(value).__name__} cannot be written to a torch file")

    def _text(self, text: str) -> None:
        if not self._known(text):
            raw = text.encode("utf-8", "surrogatepass")
            self.parts.append(b"X" + struct.pack("<I", len(raw)) + raw)
            self._remember(text)

    def _global(self, module: str, name: str) -> None:
        if not self._known((module, name)):
            self.parts.append(f"c{module}\n{name}\n".encode())
            self._remember((module, name))

    def _known(self, key: str | tuple[str, str]) -> bool:
        index = self._memo.get(key)
        if index is None:
            return False
        self.parts.append(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
        return True

    def _remember(self, key: str | tuple[str, str]) -> None:
        index = self._memo[key] = len(self._memo)
        self.parts.append(b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def _tuple(self, values: tuple[Tree, ...]) -> None:
        if not values:
            self.parts.append(b")")
            return
        if len(values) > 3:
            self.parts.append(b"(")
        for value in values:
            self.value(value)
        self.parts.append(b"t" if len(values) > 3 else bytes([0x84 + len(values)]))

    def _items(self, values: list[Tree]) -> None:
        if values:
            self.parts.append(b"(")
            for value in values:
                self.value(value)
            self.parts.append(b"e")

    def _pairs(self, pairs: Collection[tuple[Tree, Tree]]) -> None:
        if pairs:
            self.parts.append(b"(")
            for key, value in pairs:
                self.value(key)
                self.value(value)
            self.parts.append(b"u")

    def _dict(self, value: dict[Tree, Tree]) -> None:
        if isinstance(value, OrderedDict):
            self._call("collections", "OrderedDict", ())
        else:
            self.parts.append(b"}")
        self._pairs(value.items())

    def _call(self, module: str, name: str, args: tuple[Tree, ...]) -> None:
        self._global(module, name)
        self._tuple(args)
        self.parts.append(b"R")

    def _run(self, *values: Tree) -> None:
        for value in values:
            self.value(value)

    def _leaf(self, leaf: TensorLeaf) -> None:
        extent = leaf.extent
        if leaf.inline is None:
            raise UsageError(
                f"a tensor in the tree still lies in {extent.object or 'another file'}",
                hint="read its bytes first, or give a slot whose bytes are a section",
            )
        if leaf.numpy:
            self._numpy(leaf, leaf.inline)
        else:
            self._tensor(leaf, TensorSpec(extent.shape, extent.dtype))

    def _tensor(self, tensor: Slot | TensorLeaf, spec: TensorSpec) -> None:
        """``torch._utils._rebuild_tensor_v2(storage, 0, size, stride, requires_grad, hooks)``, or v3 with a dtype."""
        typed = _STORAGES.get(spec.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.parts.append(b"((")
        self._text("storage")
        self._global(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        count = numel(spec.shape)
        self._run(self._storage(tensor), "cpu", count if typed else count * ITEMSIZE[spec.dtype])
        self.parts.append(b"tQ")
        self._run(0, spec.shape, row_major_strides(spec.shape), False, OrderedDict())
        if not typed:
            self._global("torch", spec.dtype)
        self.parts.append(b"tR")

    def _numpy(self, leaf: TensorLeaf, data: bytes) -> None:
        extent = leaf.extent
        self._permit("numpy.ndarray")
        code = _NUMPY.get(extent.dtype)
        if code is None:
            raise UsageError(f"numpy has no {extent.dtype}")
        if not extent.shape:
            self._global("numpy._core.multiarray", "scalar")
            self._numpy_dtype(code)
            self.value(data)
            self.parts.append(b"\x86R")
            return
        self._global("numpy._core.multiarray", "_reconstruct")
        self._global("numpy", "ndarray")
        self._run((0,), b"b")
        self.parts.append(b"\x87R(")
        self._run(1, extent.shape)
        self._numpy_dtype(code)
        self._run(False, data)
        self.parts.append(b"tb")

    def _numpy_dtype(self, code: str) -> None:
        self._call("numpy", "dtype", (code, False, True))
        self.value((3, "|" if code.endswith("1") else "<", None, None, None, -1, -1, 0))
        self.parts.append(b"b")

    def _opaque(self, value: Opaque) -> None:
        """An object by the name of its class: built by ``__new__`` and given state, or called where it has none."""
        owner, _, member = value.name.partition(".")
        self._permit(f"{value.module}.{owner}" if value.path not in self._classes else value.path)
        if value.kwargs:
            raise UsageError(f"{value.path} has keyword arguments, which protocol 2 cannot write")
        if member:
            self._nested(value.module, owner, member)
        else:
            self._global(value.module, value.name)
        if isinstance(value, Reference):
            return
        called = bool(value.args) and (value.state is None or value.name.lstrip("_")[:1].islower())
        self._tuple(value.args)
        self.parts.append(b"R" if called else b"\x81")
        self._items(value.items)
        self._pairs(value.pairs)
        if value.state is not None:
            self.value(value.state)
            self.parts.append(b"b")

    def _nested(self, module: str, owner: str, member: str) -> None:
        first, *rest = member.split(".")
        for _ in rest:
            self._global("__builtin__", "getattr")
        self._global("__builtin__", "getattr")
        self._global(module, owner)
        for name in (first, *rest):
            self._text(name)
            self.parts.append(b"\x86R")

    def _permit(self, path: str) -> None:
        if path not in self._classes:
            raise UsageError(
                f"the tree holds a {path}, which is not among the classes that may be written",
                hint=f"leave it out, or allow {path} by name",
            )


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<I", len(raw)) + raw
