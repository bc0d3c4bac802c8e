"""What a job saved beside model and optimizer, under the names that ucp has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.training import USUAL_NAMES
from ucp.tree import TensorLeaf, Tree

from .contents import Contents, nested

_STEPS = ("step", "global_step", "iteration", "steps")
_LARGE = 1 << 20


def apart(contents: Contents, keys: Sequence[str], model: Mapping[str, str]) -> set[str]:
    """Those of `keys` that are tensors of a kind with the model's, such as averaged weights: catalog tensors as well.

    What is saved under one name is of one kind: so where a tensor of it lies in pieces, is named like one of the
    model's, or where it is large.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        if key in contents.tensors:
            groups.setdefault(str(contents.paths[key][0]).split(".")[0], []).append(key)
    return {key for members in groups.values() if _is_weights(contents, members, model) for key in members}


def _is_weights(contents: Contents, keys: Sequence[str], model: Mapping[str, str]) -> bool:
    specs = [contents.tensors[key].spec for key in keys]
    if any(contents.tensors[key].leaf is None for key in keys) or sum(spec.nbytes for spec in specs) > _LARGE:
        return True
    shapes = {name: contents.tensors[key].spec.shape for name, key in model.items()}
    return any(
        shapes.get(key.split(".", start)[-1]) == contents.tensors[key].spec.shape
        for key in keys
        for start in range(1, key.count(".") + 1)
    )


def around(contents: Contents, keys: Sequence[str]) -> dict[str, Tree]:
    """The state that `keys` hold, nested as it was saved; what all training needs is under the names ucp has for it."""
    tree = nested((contents.paths[key], contents.tree(key)) for key in keys)
    if not isinstance(tree, dict):
        return {} if tree is None else {"state": tree}
    state: dict[str, Tree] = {}
    for key, value in tree.items():
        name = str(key)
        if name in USUAL_NAMES:
            state.setdefault(USUAL_NAMES[name], value)
            continue
        left = _lifted(value, state) if isinstance(value, dict) else value
        if left != {}:
            state[name] = left
    return state


def renamed(tree: Mapping[Any, Tree]) -> dict[str, Tree]:
    """The entries of a dict of training state, under the names that ucp has for them."""
    return {USUAL_NAMES.get(str(key), str(key)): value for key, value in tree.items()}


def _lifted(node: dict[Any, Tree], state: dict[str, Tree]) -> dict[Any, Tree]:
    """`node` without the entries that have a name of ours, which go to `state` if it has none of that name yet."""
    left: dict[Any, Tree] = {}
    for key, value in node.items():
        name = USUAL_NAMES.get(str(key))
        if name is None or name in state:
            left[key] = value
        else:
            state[name] = value
    return left


def told_step(contents: Contents, keys: Sequence[str]) -> int | None:
    """The step that the job itself counted, where it saved one number of that name."""
    found: set[int] = set()
    for key in keys:
        *above, last = key.split(".")
        number = whole_number(contents.tree(key))
        if last in _STEPS and len(above) < 3 and number is not None:
            found.add(number)
    return found.pop() if len(found) == 1 else None


def whole_number(tree: Tree) -> int | None:
    """The number that a tree is, or that a tensor of one integer holds."""
    if type(tree) is int:
        return tree
    if isinstance(tree, TensorLeaf) and tree.inline is not None and tree.extent.dtype in ("int64", "int32"):
        return int.from_bytes(tree.inline, "little", signed=True) if tree.extent.size == 1 else None
    return None
