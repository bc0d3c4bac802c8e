"""States of torch optimizers, put to the tensors that they belong to.

torch numbers parameters group by group, in the order in which they were given (torch/optim/optimizer.py,
``state_dict``); since torch 2.6 a group also has ``param_names``, where the optimizer was made of named parameters.
FSDP and ``torch.distributed.checkpoint.state_dict`` save names in place of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from ucp.catalog import Catalog, Checksum, ParamGroup, Scalar, Tensor
from ucp.errors import CorruptError, FitError
from ucp.layout import Box
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .._deepspeed import nodes
from .._deepspeed.same import Comparison
from .._numbered.names import Candidates, Member, Names, Words, names_of, names_without_order
from .weights import plain_name

_FLOATS = ("float", "bfloat", "complex")
_BESIDE_OPTIONS = ("params", "param_names")
_WORDS = Words(
    inferred=(
        "names of optimizer states were inferred from shapes and the order of parameters: the optimizer saved numbers"
    ),
    remedy=(
        "give order=, the parameters in the order in which the optimizer got them (patterns such as 'encoder.* "
        "decoder.*', or a text file with a name per line), or frozen='adapter.*' for those that it did not get (on the "
        "command line: -o order=names.txt); or save with an optimizer made of model.named_parameters()"
    ),
)


@dataclass(frozen=True, slots=True)
class Numbering:
    """What is known of the order in which an optimizer got its parameters.

    `module` are the names in the module's order, None where it is not known. `frozen` are patterns of names that it did
    not get; `order` are patterns in its own order, and what none of them matches it did not get.
    """

    module: Sequence[str] | None
    frozen: Sequence[str] = ()
    order: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Saved:
    """One group of a saved optimizer: its parameters' numbers or names, the names told beside, states, options."""

    path: str
    keys: list[Any]
    hints: list[str]
    members: list[Member]
    options: dict[str, Tree]


@dataclass(slots=True)
class _Placed:
    """Tensors with their states, as they are put together."""

    tensors: dict[str, Tensor]
    fragments: dict[Key, tuple[Fragment, ...]]
    left: dict[str, dict[str, Tree]] = field(default_factory=dict)
    unnamed: list[Tree] = field(default_factory=list)


def with_optimizers(
    catalog: Catalog,
    store: Store,
    optimizers: Mapping[str, Mapping[Any, Tree]],
    numbering: Numbering,
    checksums: Sequence[Checksum],
) -> Catalog:
    """`catalog` with the states in the state dicts `optimizers`, by where each lies.

    What no group owns is frozen. Where the parameter cannot be told, states are carried in
    ``state["optimizer"]["unnamed"]`` and the parameters concerned are undecided. FitError for a pattern that matches
    nothing, CorruptError for what is no optimizer state.
    """
    groups = [group for path, tree in optimizers.items() for group in _groups(path, tree)]
    names = _names(store, _candidates(catalog, numbering), groups, numbering, next(iter(optimizers)))
    placed = _Placed(dict(catalog.tensors), dict(catalog.fragments))
    told = _place_all(placed, groups, names.certain, Comparison(store, checksums))
    placed.unnamed += _orphans(optimizers, groups)
    _settle_kinds(placed, names)
    outside = [name for name, tensor in placed.tensors.items() if tensor.kind == "frozen"]
    beside = {**_beside(optimizers), **({"optimizers": _shares(optimizers)} if len(optimizers) > 1 else {})}
    return _completed(catalog, placed, told, beside, (*names.notes, *_outside(outside)))


def with_named_optimizer(
    catalog: Catalog, store: Store, tree: Mapping[Any, Tree], *, count: int, checksums: Sequence[Checksum]
) -> Catalog:
    """`catalog` with the states of an optimizer whose groups have the names of their parameters.

    Only the first `count` are groups of the source. CorruptError for names that the catalog does not have.
    """
    groups = _groups("optimizer", tree)
    for group in groups:
        unknown = [name for name in group.hints if name not in catalog.tensors and name not in catalog.ties]
        if unknown or len(group.hints) != len(group.keys):
            raise CorruptError(f"{catalog.url}: param_names: not the names of the group's parameters {unknown[:1]}")
    placed = _Placed(dict(catalog.tensors), dict(catalog.fragments))
    names = [[catalog.ties.get(name, name) for name in group.hints] for group in groups]
    _place_all(placed, groups, names, Comparison(store, checksums))
    told = [ParamGroup(tuple(group.hints), group.options) for group in groups[:count]]
    return _completed(catalog, placed, told, {}, ())


def _place_all(
    placed: _Placed, groups: Sequence[Saved], names: Sequence[Sequence[str | None]], comparison: Comparison
) -> list[ParamGroup]:
    """Put every member's states where they belong; gives the groups by name."""
    for g, (group, certain) in enumerate(zip(groups, names, strict=True)):
        for name, key, member in zip(certain, group.keys, group.members, strict=True):
            if name is None:
                placed.unnamed.append({"group": g, "number": key, "states": dict(member.state)})
            else:
                _place(placed, name, member, comparison)
    return [
        ParamGroup(tuple(name for name in certain if name is not None), group.options)
        for group, certain in zip(groups, names, strict=True)
    ]


def _completed(
    catalog: Catalog, placed: _Placed, told: Sequence[ParamGroup], beside: Mapping[str, Tree], notes: Sequence[str]
) -> Catalog:
    held, counted = catalog.state.get("optimizer"), _common_step(placed)
    if counted is not None and catalog.step is not None and counted != catalog.step:
        notes = (*notes, f"the optimizer counted {counted} steps, the job {catalog.step}")
    rest = {
        **(held if isinstance(held, dict) else {}),
        **({"unnamed": placed.unnamed} if placed.unnamed else {}),
        **({"state": placed.left} if placed.left else {}),
        **beside,
    }
    return replace(
        catalog,
        tensors=placed.tensors,
        fragments=placed.fragments,
        step=catalog.step if catalog.step is not None else counted,
        param_groups=(*catalog.param_groups, *told),
        state={**catalog.state, **({"optimizer": rest} if rest else {})},
        notes=(*catalog.notes, *notes),
    )


def _outside(names: Sequence[str]) -> list[str]:
    """What a user should know of tensors that no optimizer owns."""
    if not names:
        return []
    shown = " ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return [f"taken for frozen parameters, as no optimizer owns them; buffers may be among them: {shown}"]


def _groups(path: str, tree: Mapping[Any, Tree]) -> list[Saved]:
    states = nodes.mapping(tree["state"], f"{path}: state")
    found = [
        _group(path, nodes.mapping(group, f"{path}: param_groups"), states)
        for group in nodes.sequence(tree["param_groups"], f"{path}: param_groups")
    ]
    keys = [key for group in found for key in group.keys]
    if len(set(keys)) != len(keys):
        raise CorruptError(f"{path}: param_groups: a parameter is in two groups")
    return found


def _group(path: str, group: Mapping[Any, Tree], states: Mapping[Any, Tree]) -> Saved:
    keys = list(nodes.sequence(group.get("params", ()), f"{path}: params"))
    if not all(isinstance(key, int | str) for key in keys):
        raise CorruptError(f"{path}: params: neither numbers nor names of parameters")
    hints = nodes.sequence(group.get("param_names") or (), f"{path}: param_names")
    members = [Member(nodes.named(states.get(key, {}), f"{path}: state of {key}"), None) for key in keys]
    options = {str(key): value for key, value in group.items() if key not in _BESIDE_OPTIONS}
    named = bool(keys) and all(isinstance(key, str) for key in keys)
    return Saved(path, keys, [str(name) for name in (keys if named else hints)], members, options)


def _orphans(optimizers: Mapping[str, Mapping[Any, Tree]], groups: Sequence[Saved]) -> list[Tree]:
    """States of numbers that no group has."""
    known = {path: {key for group in groups if group.path == path for key in group.keys} for path in optimizers}
    return [
        {"group": None, "number": key, "states": states}
        for path, tree in optimizers.items()
        for key, states in tree["state"].items()
        if key not in known[path]
    ]


def _beside(optimizers: Mapping[str, Mapping[Any, Tree]]) -> dict[str, Tree]:
    """What wrappers of optimizers save beside states and groups."""
    found: dict[str, Tree] = {}
    for path, tree in optimizers.items():
        extra = {str(key): value for key, value in tree.items() if key not in ("state", "param_groups")}
        if extra:
            found[path if len(optimizers) > 1 else "extra"] = extra
    return found


def _shares(optimizers: Mapping[str, Mapping[Any, Tree]]) -> dict[str, int]:
    """Groups of each optimizer, in order."""
    return {path: len(nodes.sequence(tree["param_groups"], path)) for path, tree in optimizers.items()}


def _candidates(catalog: Catalog, numbering: Numbering) -> Candidates:
    """The tensors that the optimizer may own, in order, with extents that tell shape and dtype."""
    for option, patterns in (("frozen", numbering.frozen), ("order", numbering.order)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in catalog.tensors):
                raise FitError(f"{option}: no parameter matches {pattern!r}", hint="`ucp ls` shows the names")
    found: dict[str, TensorLeaf] = {}
    for name in numbering.module or catalog.tensors:
        tensor = catalog.tensors[name]
        spec = tensor.states["value"]
        frozen = any(fnmatchcase(name, pattern) for pattern in numbering.frozen)
        if tensor.kind == "parameter" and not frozen and spec.dtype.startswith(_FLOATS):
            found[name] = TensorLeaf(Extent.contiguous("", 0, spec.shape, spec.dtype))
    if not numbering.order:
        return Candidates(found)
    return Candidates(
        {
            name: found[name]
            for k, pattern in enumerate(numbering.order)
            for name in found
            if fnmatchcase(name, pattern) and not any(fnmatchcase(name, other) for other in numbering.order[:k])
        }
    )


def _names(store: Store, candidates: Candidates, groups: Sequence[Saved], numbering: Numbering, path: str) -> Names:
    members = [group.members for group in groups]
    plain = plain_name({name for group in groups for name in group.hints})
    hints = [[plain(name) for name in group.hints] for group in groups]
    if numbering.module is None and not numbering.order:
        return names_without_order(candidates, members, hints, path, words=_WORDS)
    return names_of(store, candidates, members, hints, path, words=_WORDS)


def _place(placed: _Placed, name: str, member: Member, comparison: Comparison) -> None:
    """All states of one parameter beside its value."""
    tensor = placed.tensors[name]
    states, scalars = dict(tensor.states), dict(tensor.scalars)
    for raw, node in member.state.items():
        key = str(raw)
        if nodes.is_number(node):
            scalars[key] = Scalar(node, type(node).__name__)
        elif nodes.is_tensor(node) and node.extent.shape == () and (key == "step" or states["value"].shape):
            scalars[key] = Scalar(comparison.scalar(node), node.extent.dtype)
        elif nodes.is_tensor(node) and key not in states:
            states[key] = TensorSpec(node.extent.shape, node.extent.dtype)
            placed.fragments[Key(name, key)] = (Fragment(Box.whole(node.extent.shape), node.extent),)
        else:
            placed.left.setdefault(name, {})[key] = node
    placed.tensors[name] = replace(tensor, states=states, scalars=scalars)


def _settle_kinds(placed: _Placed, names: Names) -> None:
    """Parameters that the optimizer does not own are frozen, those that it may own undecided."""
    owned = {name for group in names.certain for name in group}
    for name, tensor in placed.tensors.items():
        if tensor.kind != "parameter" or name in owned:
            continue
        if name in names.open:
            placed.tensors[name] = replace(tensor, undecided=names.open[name])
        else:
            placed.tensors[name] = replace(tensor, kind="frozen")


def _common_step(placed: _Placed) -> int | None:
    """The step that all parameters are at."""
    steps = {tensor.scalars["step"].value for tensor in placed.tensors.values() if "step" in tensor.scalars}
    step = steps.pop() if len(steps) == 1 else None
    return int(step) if step is not None and isfinite(step) and step == int(step) else None
