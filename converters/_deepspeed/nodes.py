"""What DeepSpeed pickles, seen in an inert tree: shapes, enum members, addresses, tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from ucp.errors import CorruptError
from ucp.layout import Shape
from ucp.tree import Opaque, TensorLeaf, Tree


def is_tensor(node: Tree) -> TypeGuard[TensorLeaf]:
    """Whether `node` is a torch tensor (a numpy array is none)."""
    return isinstance(node, TensorLeaf) and not node.numpy


def is_number(node: Tree) -> TypeGuard[int | float | bool]:
    """Whether `node` is a plain Python number."""
    return isinstance(node, int | float)


def integer(node: Tree, where: str) -> int:
    """An int, or the value of an int enum member such as ``ZeroStageEnum`` (deepspeed/runtime/zero/config.py)."""
    if isinstance(node, Opaque) and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, int):
        raise CorruptError(f"{where}: {type(node).__name__} where a whole number is expected")
    return node


MOST = 1 << 20
"""More ranks or experts than any job has."""


def count(node: Tree, where: str) -> int:
    """A number of ranks or experts; CorruptError for more than any job has, over which loops would not end."""
    found = integer(node, where)
    if not 0 <= found <= MOST:
        raise CorruptError(f"{where}: {found} ranks or experts, which no job has", hint="do not trust this file")
    return found


def shape(node: Tree, where: str) -> Shape:
    """A ``torch.Size`` or any sequence of ints (deepspeed/runtime/engine.py, ``_get_zero_param_shapes``)."""
    if not isinstance(node, tuple | list) or not all(isinstance(n, int) and n >= 0 for n in node):
        raise CorruptError(f"{where}: {node!r} is not the shape of a tensor")
    return tuple(node)


def mapping(node: Tree, where: str) -> Mapping[Any, Tree]:
    """A dict; CorruptError naming `where` otherwise."""
    if not isinstance(node, Mapping):
        raise CorruptError(f"{where}: {type(node).__name__} where a dict is expected")
    return node


def named(node: Tree, where: str) -> Mapping[str, Tree]:
    """A dict whose keys are text, as those of states are; CorruptError naming `where` otherwise."""
    found = mapping(node, where)
    for key in found:
        if not isinstance(key, str):
            raise CorruptError(f"{where}: {key!r:.80} where a name is expected")
    return found


def sequence(node: Tree, where: str) -> list[Tree] | tuple[Tree, ...]:
    """A list or tuple; CorruptError naming `where` otherwise."""
    if not isinstance(node, list | tuple):
        raise CorruptError(f"{where}: {type(node).__name__} where a list is expected")
    return node


def tensor(node: Tree, where: str) -> TensorLeaf:
    """A tensor; CorruptError naming `where` otherwise."""
    if not is_tensor(node):
        raise CorruptError(f"{where}: {type(node).__name__} where a tensor is expected")
    return node


def address(node: Tree, where: str) -> tuple[int, int]:
    """(start, numel) of a ``fragment_address`` (deepspeed/utils/tensor_fragment.py)."""
    start, numel = (node.attribute(name) if isinstance(node, Opaque) else None for name in ("start", "numel"))
    if not isinstance(start, int) or not isinstance(numel, int):
        raise CorruptError(f"{where}: not a fragment address")
    return start, numel
