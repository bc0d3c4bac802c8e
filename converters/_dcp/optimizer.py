"""Optimizers as keys have them: states and hyper-parameters by parameter.

``torch.distributed.checkpoint.state_dict`` names parameters and nests ``state`` and ``param_groups``, or flattens both
(``flatten_optimizer_state_dict``, then hyper-parameters are repeated for each parameter). A plain
``optimizer.state_dict()`` numbers its parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import CorruptError
from ucp.tree import TensorLeaf, Tree

from .contents import Contents, Path, nested
from .names import below, known_as, split_name

Parameter = str | int
"""A parameter's name, or its number in an optimizer that only numbers them."""

_FOREIGN = "save the optimizer's state dict as torch gives it"


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group: its parameters and hyper-parameters."""

    params: tuple[Parameter, ...]
    options: Mapping[str, Tree]
    hints: tuple[Tree, ...] = ()


@dataclass(slots=True)
class Optimizer:
    """One optimizer: `states` has the keys of each parameter's states, `rest` those of whatever else it saved.

    `flat` says that `groups` were put together from the hyper-parameters of single parameters.
    """

    prefix: str
    states: dict[Parameter, dict[str, str]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    flat: bool = False

    @property
    def numbered(self) -> bool:
        """Whether parameters have numbers for names."""
        return any(isinstance(name, int) for name in self.parameters)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, those of groups first."""
        return list(dict.fromkeys([*(name for group in self.groups for name in group.params), *self.states]))


def read_optimizer(contents: Contents, prefix: str, keys: Sequence[str], known: Collection[str] = ()) -> Optimizer:
    """The optimizer at `prefix`. `known` are names of tensors, which settle where flattened names end.

    CorruptError for param_groups that are none.
    """
    found = Optimizer(prefix)
    groups: list[tuple[Path, Tree]] = []
    for key in keys:
        path = below(contents.paths[key], prefix)
        head = str(path[0]).split(".")[0]
        inner = below(path, f"{head}.")
        if head == "param_groups":
            groups.append((inner, contents.tree(key)))
        elif head == "state" and inner and (len(inner) > 1 or "." in str(inner[0])):
            name, state = split_name(inner, known)
            found.states.setdefault(_known(name, known), {})[".".join(map(str, state))] = key
        elif head != "state" or contents.values.get(key):
            found.rest.append(key)
    _read_groups(found, groups, known, f"{contents.where}: {prefix}param_groups")
    return found


def _read_groups(found: Optimizer, parts: Sequence[tuple[Path, Tree]], known: Collection[str], where: str) -> None:
    listed: list[tuple[Path, Tree]] = []
    single: dict[str, dict[str, Tree]] = {}
    for path, value in parts:
        name, option = split_name(path, known) if path and (len(path) > 1 or "." in str(path[0])) else (0, None)
        if isinstance(name, int):
            listed.append((path if option is None else (name, *option), value))
        else:
            single.setdefault(str(_known(name, known)), {})[".".join(map(str, option or ()))] = value
    tree = nested(listed)
    for group in _sequence(tree, where):
        found.groups.append(_group(group, known, where))
    if single:
        found.flat = True
        found.groups += _gathered(single)


def _group(tree: Tree, known: Collection[str], where: str) -> Group:
    if not isinstance(tree, dict):
        raise CorruptError(f"{where}: a {type(tree).__name__} where a group is expected", hint=_FOREIGN)
    params = tree.get("params", [])
    if not isinstance(params, list | tuple) or not all(type(name) in (str, int) for name in params):
        raise CorruptError(f"{where}: a group whose params are no names or numbers", hint=_FOREIGN)
    hints = tree.get("param_names") or ()
    options = {str(key): value for key, value in tree.items() if key not in ("params", "param_names")}
    named = isinstance(hints, list | tuple) and all(isinstance(name, str) for name in hints)
    return Group(tuple(_known(name, known) for name in params), options, tuple(hints) if named else ())


def _gathered(single: Mapping[str, Mapping[str, Tree]]) -> list[Group]:
    """Groups of the parameters that have equal hyper-parameters."""
    groups: dict[str, tuple[list[str], Mapping[str, Tree]]] = {}
    for name, options in single.items():
        same = repr(sorted((key, comparable(value)) for key, value in options.items()))
        groups.setdefault(same, ([], options))[0].append(name)
    return [Group(tuple(names), options) for names, options in groups.values()]


def comparable(tree: Tree) -> Any:
    """`tree` such that its repr is that of every equal one."""
    if isinstance(tree, TensorLeaf):
        return (tree.extent.shape, tree.extent.dtype, tree.inline or (tree.extent.object, tree.extent.offset))
    if isinstance(tree, dict):
        return sorted((repr(key), comparable(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return [comparable(value) for value in tree]
    return tree


def _sequence(tree: Tree, where: str) -> Sequence[Tree]:
    if tree is None:
        return ()
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree, key=str)]
    if not isinstance(tree, list | tuple):
        raise CorruptError(f"{where}: {type(tree).__name__} where a list of groups is expected", hint=_FOREIGN)
    return tree


def _known(name: Parameter, known: Collection[str]) -> Parameter:
    return name if isinstance(name, int) else known_as(name, known)
