"""What a checkpoint holds, by flat key, whichever files it lies in: the common ground of the readers of DCP's kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ucp.catalog import Checksum
from ucp.container.torchfile import leaf_bytes
from ucp.layout import Box
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.store import Entry, Store
from ucp.tree import TensorLeaf, Tree

Path = tuple[str | int, ...]

SMALL = 64
"""Tensors of at most so many bytes are read along with where they lie: steps and other numbers."""


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor under one key; `small` are its bytes where it is a number or little more."""

    spec: TensorSpec
    fragments: tuple[Fragment, ...]
    small: bytes | None = None

    @property
    def leaf(self) -> TensorLeaf | None:
        """The tensor as a leaf of a tree; None if it lies in pieces."""
        if self.small is not None:
            extent = Extent.contiguous("", 0, self.spec.shape, self.spec.dtype)
            return TensorLeaf(extent, inline=self.small)
        primary = [fragment for fragment in self.fragments if not fragment.replica]
        return TensorLeaf(primary[0].extent) if len(primary) == 1 else None


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything in a checkpoint. `paths` has each flat key's path in the nested state that was saved, in its order.

    `ordered` says whether that is the order in which the job had them; `where` names the checkpoint in errors.
    """

    where: str
    tensors: Mapping[str, Held]
    values: Mapping[str, Tree]
    paths: Mapping[str, Path]
    ordered: bool
    checksums: tuple[Checksum, ...] = ()
    entries: tuple[Entry, ...] = ()

    def tree(self, key: str) -> Tree:
        """Value or leaf of `key`; None for a tensor in pieces."""
        return self.values[key] if key in self.values else self.tensors[key].leaf

    def unfolded(self, store: Store, keys: Iterable[str]) -> Contents:
        """The same, with the dicts at `keys` taken apart, as if they had been saved key by key; numbers are read."""
        tensors, values, paths = dict(self.tensors), dict(self.values), dict(self.paths)
        for key in keys:
            tree, path = values.pop(key), paths.pop(key)
            for below, node in _leaves(tree):
                name = ".".join(map(str, path + below))
                paths[name] = path + below
                if isinstance(node, TensorLeaf) and not node.numpy and node.inline is None:
                    small = leaf_bytes(store, node) if node.extent.nbytes <= SMALL else None
                    tensors[name] = Held(TensorSpec(node.extent.shape, node.extent.dtype), (whole(node.extent),), small)
                else:
                    values[name] = node
        return replace(self, tensors=tensors, values=values, paths=paths)


def joined(where: str, parts: Mapping[str, Contents]) -> Contents:
    """The contents of all `parts` in one, each part's keys below its name."""
    tensors: dict[str, Held] = {}
    values: dict[str, Tree] = {}
    paths: dict[str, Path] = {}
    for part, contents in parts.items():
        tensors.update({f"{part}.{key}": held for key, held in contents.tensors.items()})
        values.update({f"{part}.{key}": value for key, value in contents.values.items()})
        paths.update({f"{part}.{key}": (part, *path) for key, path in contents.paths.items()})
    return Contents(
        where,
        tensors,
        values,
        paths,
        ordered=all(contents.ordered for contents in parts.values()),
        checksums=tuple(checksum for contents in parts.values() for checksum in contents.checksums),
        entries=tuple(entry for contents in parts.values() for entry in contents.entries),
    )


def whole(extent: Extent) -> Fragment:
    """The fragment of a tensor that lies in one piece."""
    return Fragment(Box.whole(extent.shape), extent)


def _leaves(tree: Tree, path: Path = ()) -> Iterable[tuple[Path, Tree]]:
    if isinstance(tree, dict) and tree and all(isinstance(key, str | int) for key in tree):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def nested(parts: Iterable[tuple[Path, Tree]]) -> Tree:
    """The nested dicts and lists of which `parts` are (path, value); None for no parts."""
    root: dict[str | int, Tree] = {}
    for path, value in parts:
        if not path:
            return value
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, _Node())
            if not isinstance(node, _Node):
                break
        else:
            node[path[-1]] = value
    return _listed(root) if root else None


class _Node(dict[str | int, Tree]):
    """A level that `nested` made, as opposed to a dict that was saved whole."""


def _listed(node: Tree) -> Tree:
    if not isinstance(node, _Node) and type(node) is not dict:
        return node
    made = {key: _listed(value) if isinstance(value, _Node) else value for key, value in node.items()}
    numbers = [key for key in made if type(key) is int]
    if len(numbers) == len(made) and sorted(numbers) == list(range(len(made))):
        return [made[number] for number in range(len(made))]
    return made


__all__ = ["SMALL", "Contents", "Held", "Path", "joined", "nested", "whole"]
