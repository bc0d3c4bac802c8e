"""Whether two values that ranks saved are the same, tensors included, and what is common to all ranks."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from ucp.catalog import Checksum
from ucp.container.torchfile import leaf_bytes, leaf_scalar
from ucp.errors import CorruptError
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

_COMPARED_BYTES = 1 << 16
_ABSENT = object()


class Comparison:
    """Compares values of different files.

    Small tensors by their bytes, larger ones by the CRC-32 that the zip directory keeps of their storage.
    """

    def __init__(self, store: Store, checksums: Sequence[Checksum]) -> None:
        self._store = store
        self._members: dict[str, list[Checksum]] = {}
        for checksum in sorted(checksums, key=lambda c: c.offset):
            self._members.setdefault(checksum.object, []).append(checksum)
        self._scalars: dict[tuple[int, int, str], int | float | bool] = {}

    def member(self, leaf: TensorLeaf) -> Checksum | None:
        """The stored record that holds the leaf's first byte."""
        members = self._members.get(leaf.extent.object, [])
        at = bisect_right(members, leaf.extent.offset, key=lambda c: c.offset) - 1
        if at < 0 or leaf.extent.offset >= members[at].offset + members[at].length:
            return None
        return members[at]

    def scalar(self, leaf: TensorLeaf) -> int | float | bool:
        """Value of a tensor of one element. Records that are equal by size and CRC-32 are read once.

        A CRC-32 of at most four bytes is one to one. CorruptError where the bytes contradict it: a scalar is part of
        the catalog, so nothing that reads data later would notice.
        """
        member = self.member(leaf)
        if member is None or member.length > _COMPARED_BYTES:
            return leaf_scalar(self._store, leaf)
        if member.length > 4 or member.length != leaf.extent.nbytes:
            self._check(member)
            return leaf_scalar(self._store, leaf)
        key = (member.value, member.length, leaf.extent.dtype)
        if key not in self._scalars:
            self._check(member)
            self._scalars[key] = leaf_scalar(self._store, leaf)
        return self._scalars[key]

    def _check(self, member: Checksum) -> None:
        """CorruptError if the record's bytes contradict its CRC-32."""
        if zlib.crc32(self._store.read(member.object, member.offset, member.length)) != member.value:
            raise CorruptError(
                f"{self._store.url}/{member.object}: bytes {member.offset} to {member.offset + member.length} do not "
                "match their CRC-32",
                hint="the file is damaged: get it again from where it was written",
            )

    def equal(self, a: Tree, b: Tree) -> bool:
        """Whether two trees are the same."""
        return _equal(a, b, self._tensors_equal)

    def _tensors_equal(self, a: TensorLeaf, b: TensorLeaf) -> bool:
        if (a.extent.shape, a.extent.dtype, a.numpy) != (b.extent.shape, b.extent.dtype, b.numpy):
            return False
        if a.extent == b.extent and a.inline == b.inline:
            return True
        if a.inline is not None or b.inline is not None or a.extent.nbytes <= _COMPARED_BYTES:
            return leaf_bytes(self._store, a) == leaf_bytes(self._store, b)
        one, other = self.member(a), self.member(b)
        return (
            one is not None
            and other is not None
            and (one.length, one.value, a.extent.offset - one.offset, a.extent.strides)
            == (other.length, other.value, b.extent.offset - other.offset, b.extent.strides)
        )

    def split(self, trees: Mapping[int, Mapping[str, Tree]]) -> tuple[dict[str, Tree], dict[int, dict[str, Tree]]]:
        """What all ranks have in common, and for each rank what it alone has. Dicts are compared entry by entry."""
        common: dict[str, Tree] = {}
        own: dict[int, dict[str, Tree]] = {rank: {} for rank in trees}
        for name in dict.fromkeys(name for tree in trees.values() for name in tree):
            values = {rank: tree.get(name, _ABSENT) for rank, tree in trees.items()}
            first = next(iter(values.values()))
            if all(value is not _ABSENT and self.equal(first, value) for value in values.values()):
                common[name] = first
            elif all(isinstance(value, dict) for value in values.values()):
                inner, differing = self.split(values)
                if inner:
                    common[name] = inner
                for rank, tree in differing.items():
                    own[rank][name] = tree
            else:
                own.update({rank: {**own[rank], name: v} for rank, v in values.items() if v is not _ABSENT})
        return common, {rank: tree for rank, tree in own.items() if tree}


def plain_equal(a: Tree, b: Tree) -> bool:
    """Whether two trees are the same, tensors by their shape and dtype alone."""
    return _equal(a, b, lambda x, y: (x.extent.shape, x.extent.dtype) == (y.extent.shape, y.extent.dtype))


def _equal(a: Tree, b: Tree, tensors: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, TensorLeaf) and isinstance(b, TensorLeaf):
        return bool(tensors(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key], tensors) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y, tensors) for x, y in zip(a, b, strict=True))
    if isinstance(a, Opaque):
        return a.path == b.path and all(_equal(x, y, tensors) for x, y in zip(_parts(a), _parts(b), strict=True))
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    return bool(a == b)


def _parts(node: Opaque) -> tuple[Tree, ...]:
    return (node.args, node.kwargs, node.state, node.items, node.pairs)
