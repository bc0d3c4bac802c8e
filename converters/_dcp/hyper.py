"""Optimizer groups as torch's optimizers keep them, from those of any framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ucp.catalog import Catalog
from ucp.tree import Tree

_TORCH = frozenset({"foreach", "capturable", "differentiable", "maximize"})
"""What the groups of torch.optim have, whichever the optimizer; other optimizers have none of them."""

_ADAMW: Mapping[str, Tree] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""Defaults of ``torch.optim.AdamW`` (torch 2.13) that DeepSpeed's and Megatron's own optimizers know nothing of."""


@dataclass(frozen=True, slots=True)
class Group:
    """An optimizer group: its parameters by name, its options, and which of these were added."""

    names: tuple[str, ...]
    options: Mapping[str, Tree]
    added: tuple[str, ...] = ()


def groups_of(catalog: Catalog) -> list[Group]:
    """The optimizer groups of `catalog`, with parameters by the name that holds their data.

    A stock job asks for every option that its own optimizer has, and loads nothing if one is missing. So groups of
    other implementations of Adam are completed with the defaults of ``torch.optim.AdamW``.
    """
    found = []
    for group in catalog.param_groups:
        names = tuple(dict.fromkeys(catalog.ties.get(name, name) for name in group.params))
        options = {str(key): value for key, value in group.options.items() if key != "params"}
        states = {state for name in names if name in catalog.tensors for state in catalog.tensors[name].states}
        missing = _missing(options, states)
        found.append(Group(names, options | missing, tuple(missing)))
    return found


def _missing(options: Mapping[str, Tree], states: set[str]) -> dict[str, Tree]:
    if not {"exp_avg", "exp_avg_sq"} <= states or "betas" not in options or not _TORCH.isdisjoint(options):
        return {}
    return {key: value for key, value in _ADAMW.items() if key not in options}
