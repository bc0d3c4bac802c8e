"""A tensor that lies in storage: indexing it reads the bytes it needs and gives a torch tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ucp.catalog import Catalog, Scalar
from ucp.errors import UsageError
from ucp.layout import Box, Shape, itemsize
from ucp.plan import Cover, Fragment, Key, TensorSpec
from ucp.run.cast import Array
from ucp.run.gather import read_region
from ucp.run.integrity import Ledger, Spans
from ucp.run.unchanged import check_unchanged
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree, walk

if TYPE_CHECKING:
    import torch

_PLAIN = {"int": "int64", "float": "float64", "bool": "bool"}
"""Tensor dtype of a number that the framework kept as a plain Python one."""

_GAP = 64 << 10
"""Bytes that may be read beyond what was asked for, per checksum, to make it tell."""

_BLOCKED = ("native", "universal")
"""Families whose checksums are of blocks of at most 4 MiB: each that is touched is read whole once, and so tells."""


@dataclass(eq=False)
class Reading:
    """A checkpoint from which tensors are read; with `verify`, checksums are set against what is read.

    In our own forms all that it touches count. In others, where one checksum may be that of gigabytes, those of which a
    read has nearly all bytes.
    """

    catalog: Catalog
    store: Store
    verify: bool = True

    @cached_property
    def _spans(self) -> Spans:
        return Spans(self.catalog.checksums if self.verify else ())

    @cached_property
    def _held(self) -> set[int]:
        return set()

    def region(self, cover: Cover, box: Box, *, wholly: bool = False) -> Array:
        """`box` of a tensor as contiguous bytes; `wholly`, all of a checksum that it touches is read, if only once.

        CorruptError where a checksum fails, and where the object was changed after the checkpoint was opened.
        """
        touched: set[str] = set()
        ledger = Ledger(self._spans)

        def record(path: str, offset: int, data: memoryview) -> None:
            touched.add(path)
            ledger.record(path, offset, data)

        found = read_region(self.store, cover, box, record)
        wholly = wholly or self.catalog.source.family in _BLOCKED
        ledger.verify(self.store, gap=None if wholly else _GAP, held=self._held)
        check_unchanged(self.store, self.catalog, touched)
        if wholly:
            self._held.update(piece.span for piece in ledger.pieces())
        return found

    def __reduce__(self) -> tuple[type[Reading], tuple[Catalog, Store, bool]]:
        return Reading, (self.catalog, self.store, self.verify)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in storage, indexed like a torch tensor with ints, slices of positive step and ``...``.

    ``tensor[...]`` reads all of it, ``tensor[3:5, ::2]`` the bounding box of what was asked for. Results are torch
    tensors in the stored dtype that own their memory. UsageError for any other kind of index.
    """

    label: str
    shape: Shape
    dtype_name: str
    _read: Callable[[Box], Array]
    from_numpy: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype_name)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.label}: a 0-d tensor has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        raise UsageError(f"{self.label}: the truth of a tensor that was not read", hint="index it first: tensor[...]")

    def __getitem__(self, index: object) -> torch.Tensor:
        import torch

        dims = _dims(index, self.shape, self.label)
        box = Box(tuple(dim.start for dim in dims), tuple(dim.span for dim in dims))
        if not box.size:
            return torch.empty([dim.count for dim in dims if not dim.dropped], dtype=self.dtype)
        tensor = torch.from_numpy(self._read(box)).view(self.dtype).reshape(box.shape)
        if any(dim.step > 1 for dim in dims):
            steps = tuple(slice(None, None, dim.step) for dim in dims)
            tensor = tensor[steps].clone(memory_format=torch.contiguous_format)
        return tensor.reshape([dim.count for dim in dims if not dim.dropped])

    def __repr__(self) -> str:
        return f"LazyTensor({self.label!r}, {list(self.shape)}, {self.dtype_name})"


def of_state(reading: Reading, name: str, state: str) -> LazyTensor:
    """One state of one tensor of a catalog."""
    spec = reading.catalog.tensors[name].states[state]
    return LazyTensor(f"{name}[{state}]", spec.shape, spec.dtype, partial(_stored, reading, name, state))


def _stored(reading: Reading, name: str, state: str, box: Box) -> Array:
    return reading.region(reading.catalog.cover(name, state), box)


def of_scalar(label: str, scalar: Scalar) -> LazyTensor:
    """A number kept per parameter, as a 0-d tensor; a plain Python number is int64, float64 or bool."""
    dtype = _PLAIN.get(scalar.dtype, scalar.dtype)
    return LazyTensor(label, (), dtype, partial(_number, scalar.value, dtype))


def _number(value: float, dtype: str, _box: Box) -> Array:
    import torch

    return torch.tensor([value], dtype=getattr(torch, dtype)).view(torch.uint8).numpy()


def of_leaf(reading: Reading, leaf: TensorLeaf, label: str) -> LazyTensor:
    """A tensor inside a tree of training state."""
    read = partial(_leaf, reading, leaf, label) if leaf.inline is None else partial(_held, leaf)
    return LazyTensor(label, leaf.extent.shape, leaf.extent.dtype, read, leaf.numpy)


def _leaf(reading: Reading, leaf: TensorLeaf, label: str, box: Box) -> Array:
    extent = leaf.extent
    whole = Fragment(Box.whole(extent.shape), extent)
    cover = Cover.of(Key(label, "value"), TensorSpec(extent.shape, extent.dtype), [whole])
    return reading.region(cover, box, wholly=True)


def _held(leaf: TensorLeaf, box: Box) -> Array:
    assert leaf.inline is not None
    cells = np.frombuffer(leaf.inline, np.uint8).reshape(*leaf.extent.shape, leaf.extent.itemsize)
    index = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
    return cells[index].copy().reshape(-1)


def lazy_tree(catalog: Catalog, store: Store, tree: Tree, label: str, *, verify: bool = True) -> Tree:
    """A copy of a tree of training state whose tensors are `LazyTensor`; CorruptError for one that never ends."""
    for _ in walk(tree, where=label):
        pass
    return _lazy_tree(Reading(catalog, store, verify), tree, label)


def read_tree(node: Tree) -> Tree:
    """A copy of a tree that `lazy_tree` made, its tensors read: torch tensors, and arrays of numpy as such."""
    if isinstance(node, LazyTensor):
        return node[...].numpy() if node.from_numpy else node[...]
    if isinstance(node, dict):
        return {key: read_tree(value) for key, value in node.items()}
    if isinstance(node, list | tuple | set | frozenset):
        return type(node)(read_tree(value) for value in node)
    return node


def _lazy_tree(reading: Reading, node: Tree, label: str) -> Tree:
    if isinstance(node, TensorLeaf):
        return of_leaf(reading, node, label)
    if isinstance(node, dict):
        return {key: _lazy_tree(reading, value, f"{label}.{key}") for key, value in node.items()}
    if isinstance(node, list | tuple | set | frozenset):
        return type(node)(_lazy_tree(reading, value, f"{label}.{i}") for i, value in enumerate(node))
    return node


@dataclass(frozen=True, slots=True)
class _Dim:
    """What an index asks of one dim: `count` indices, `step` apart, from `start`; `dropped` for an int."""

    start: int
    count: int
    step: int
    dropped: bool

    @property
    def span(self) -> int:
        return (self.count - 1) * self.step + 1 if self.count else 0


def _dims(index: object, shape: Shape, label: str) -> list[_Dim]:
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError(f"{label}: an index can hold only one ellipsis")
    missing = len(shape) - (len(parts) - len(dots))
    if missing < 0:
        raise IndexError(f"{label}: {len(parts) - len(dots)} indices for {len(shape)} dims")
    at = dots[0] if dots else len(parts)
    parts[at : at + 1] = [slice(None)] * missing
    return [_dim(part, size, label) for part, size in zip(parts, shape, strict=True)]


def _dim(part: Any, size: int, label: str) -> _Dim:
    if isinstance(part, slice):
        if part.step is not None and operator.index(part.step) < 1:
            raise UsageError(f"{label}: slice step {part.step}", hint="read with a positive step, then .flip()")
        span = range(*part.indices(size))
        return _Dim(span.start if span else 0, len(span), span.step, dropped=False)
    # To torch, a tensor of one bool is a mask and not the int that it could be.
    mask = isinstance(part, bool) or str(getattr(part, "dtype", "")) in ("bool", "torch.bool", "torch.uint8")
    if mask or not hasattr(part, "__index__") or getattr(part, "ndim", None):
        raise UsageError(
            f"{label}: cannot be indexed with {type(part).__name__}",
            hint="use ints, slices and ..., and index the torch tensor that comes back",
        )
    i = operator.index(part)
    if not -size <= i < size:
        raise IndexError(f"{label}: index {i} is out of bounds for a dim of size {size}")
    return _Dim(i % size, 1, 1, dropped=True)
