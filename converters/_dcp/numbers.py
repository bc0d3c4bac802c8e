"""Optimizers that number their parameters: which of the model's tensors each number is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import TensorLeaf

from .._numbered.names import Candidates, Member, Words, candidates_of, names_of, names_without_order
from .contents import Contents, Held
from .optimizer import Group, Optimizer, Parameter

WORDS = Words(
    inferred=(
        "names of optimizer states were inferred from shapes, in the model's order of parameters: the optimizer was "
        "saved with numbers for names"
    ),
    remedy=(
        "name the tensors that were not trained, for example frozen='adapter.*' (on the command line: "
        "-o 'frozen=adapter.*'), when the checkpoint is read; or save with get_state_dict of "
        "torch.distributed.checkpoint.state_dict, which names them"
    ),
)


@dataclass(slots=True)
class Named:
    """Optimizers whose parameters have names now; `open` are tensors that may own the `unnamed` states, or none."""

    optimizers: list[Optimizer]
    open: dict[str, str] = field(default_factory=dict)
    unnamed: list[tuple[int, int, Mapping[str, str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def name_numbers(
    store: Store,
    contents: Contents,
    optimizers: Sequence[Optimizer],
    model: Mapping[str, str],
    *,
    buffers: set[str],
    frozen: Sequence[str],
) -> Named:
    """Give names to numbered parameters where shapes and order leave one possibility.

    `model` has the tensors' names and keys, `frozen` patterns of those that no optimizer owns. FitError for a pattern
    that matches nothing.
    """
    numbered = [one for one in optimizers if one.numbered]
    if not numbered and not frozen:
        return Named(list(optimizers))
    entries = {name: _stand_in(name, contents.tensors[key]) for name, key in model.items()}
    candidates = candidates_of(entries, buffers, frozen)
    named = {name for one in optimizers if not one.numbered for name in one.parameters}
    candidates = Candidates({name: leaf for name, leaf in candidates.leaves.items() if name not in named})
    found = Named([one for one in optimizers if not one.numbered])
    if not numbered:
        return found
    groups = [(one, group) for one in numbered for group in (one.groups or [Group(tuple(one.states), {})])]
    members = [[Member(_states(contents, one, p), None) for p in group.params] for one, group in groups]
    hints = [group.hints for _, group in groups]
    if contents.ordered:
        names = names_of(store, candidates, members, hints, contents.where, words=WORDS)
    else:
        names = names_without_order(candidates, members, hints, contents.where, words=WORDS)
    found.notes += names.notes
    found.open.update(names.open)
    for number, ((one, group), certain) in enumerate(zip(groups, names.certain, strict=True)):
        _place(found, one, group, number, certain)
    for one in numbered:
        found.optimizers.append(Optimizer(one.prefix, rest=one.rest))
    return found


def _place(found: Named, one: Optimizer, group: Group, number: int, certain: Sequence[str | None]) -> None:
    named = Optimizer(one.prefix)
    for parameter, name in zip(group.params, certain, strict=True):
        if name is not None:
            named.states[name] = one.states.get(parameter, {})
        elif parameter in one.states:
            found.unnamed.append((number, int(parameter), one.states[parameter]))
    params = tuple(name for name in certain if name is not None)
    named.groups = [Group(params, group.options)] if one.groups else []
    found.optimizers.append(named)


def _states(contents: Contents, one: Optimizer, parameter: Parameter) -> dict[str, TensorLeaf]:
    keys = one.states.get(parameter, {})
    return {state: _stand_in(key, contents.tensors[key]) for state, key in keys.items() if key in contents.tensors}


def _stand_in(name: str, held: Held) -> TensorLeaf:
    """A leaf of the tensor's shape, for where only that matters; no two have the same place."""
    return TensorLeaf(Extent.contiguous(name, 0, held.spec.shape, held.spec.dtype))
