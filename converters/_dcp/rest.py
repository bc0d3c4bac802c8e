"""Training state beside tensors, flattened as torch flattens a state dict, and what of it cannot be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ucp.container.leaves import with_bytes
from ucp.container.values import Reference
from ucp.layout.dtypes import ITEMSIZE
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree, walk

from .naming import Path

CLASSES = frozenset({"numpy.ndarray"})
_MOST_BYTES = 64 << 20


class Item(NamedTuple):
    """One entry of the flattened state: a tensor, or plain data whose tensors hold their bytes."""

    path: Path
    value: Tree


class Left(NamedTuple):
    """What is not written, and why."""

    path: Path
    reason: str


def flattened(state: Mapping[str, Tree], store: Store) -> Iterator[Item | Left]:
    """Entries of `state` in torch's order (torch/distributed/checkpoint/_traverse.py, ``traverse_state_dict``)."""
    for key, value in state.items():
        for path, leaf in _leaves((str(key),), value):
            yield entry(path, leaf, store)


def entry(path: Path, value: Tree, store: Store) -> Item | Left:
    """`value` as it can be written under one key."""
    if isinstance(value, TensorLeaf) and not value.numpy:
        return Item(path, value)
    reason = _unfit(value)
    return Item(path, with_bytes(store, value)) if reason is None else Left(path, reason)


def _leaves(path: Path, value: Tree) -> Iterator[tuple[Path, Tree]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves((*path, str(key)), item)
    elif isinstance(value, list) and not _terminal(value):
        for index, item in enumerate(value):
            yield from _leaves((*path, index), item)
    else:
        yield path, value


def _terminal(value: Tree) -> bool:
    """Whether torch keeps a list as one object: it holds neither tensors nor dicts, at any depth of lists."""
    if isinstance(value, list):
        return all(_terminal(item) for item in value if isinstance(item, dict | list)) and not any(
            isinstance(item, TensorLeaf) and not item.numpy for item in value
        )
    return not isinstance(value, dict)


def _unfit(value: Tree) -> str | None:
    """Why `value` cannot be pickled again such that any job could load it; None if it can."""
    nbytes = 0
    for _, node in walk(value):
        if isinstance(node, Opaque) and not _is_dtype(node):
            return f"an object of class {node.path}"
        if isinstance(node, TensorLeaf):
            nbytes += node.extent.nbytes
    return None if nbytes <= _MOST_BYTES else f"{nbytes} bytes of tensors in one object"


def _is_dtype(node: Opaque) -> bool:
    return isinstance(node, Reference) and node.module == "torch" and node.name in ITEMSIZE
