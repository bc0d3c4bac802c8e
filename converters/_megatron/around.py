"""Training state beside tensors, under the names that all families use for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucp.catalog import ParamGroup, Scalar
from ucp.container.torchfile import leaf_scalar
from ucp.errors import ConflictError, CorruptError
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .arguments import Arguments
from .found import Found
from .groups import Optimizer, Parameter, param_groups, step_of

_ELSEWHERE = frozenset({"args", "model", "optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "iteration"})
"""Entries that have a place of their own in a catalog, as ``model0``, ``model1`` … have."""


def state_of(
    store: Store, common: Mapping[str, Tree], args: Arguments, optimizers: list[Optimizer], rng: Tree
) -> dict[str, Tree]:
    """The training state: what is known under common names, all else under its own."""
    samples = args.number("consumed_train_samples")
    told = {
        "args": dict(args.values) or None,
        "lr_scheduler": common.get("opt_param_scheduler", common.get("lr_scheduler")),
        "loss_scale": _loss_scale(store, optimizers),
        "rng": rng,
        "consumed_samples": samples,
    }
    more = {name: value for name, value in common.items() if name not in _ELSEWHERE and not _is_chunk(name)}
    return {**{name: value for name, value in told.items() if value is not None}, **more}


def _is_chunk(name: Tree) -> bool:
    return isinstance(name, str) and name.startswith("model") and name.removeprefix("model").isdigit()


def _loss_scale(store: Store, optimizers: list[Optimizer]) -> dict[str, Tree] | None:
    """The gradient scaler's state (megatron/core/optimizer/grad_scaler.py), its scale as a number."""
    for optimizer in optimizers:
        if isinstance(optimizer.scaler, Mapping):
            held = dict(optimizer.scaler)
            # Until 2020 the scale was called otherwise (megatron/fp16/loss_scaler.py).
            scale = held.get("scale", held.get("cur_scale"))
            if isinstance(scale, TensorLeaf):
                return {**held, "scale": leaf_scalar(store, scale)}
            if isinstance(scale, int | float):
                return {**held, "scale": float(scale)}
    return None


def iteration_of(common: Mapping[str, Tree], named: int | None, *, where: str) -> int | None:
    """The iteration that was saved; ConflictError if the folder's name says another."""
    told = common.get("iteration", common.get("total_iters"))
    if told is None:
        return named
    if not isinstance(told, int) or isinstance(told, bool):
        raise CorruptError(f"{where}: iteration is a {type(told).__name__}", hint="copy the folder again")
    if named is not None and told != named:
        raise ConflictError(
            f"{where}: is of iteration {told}, but lies in the folder of iteration {named}",
            hint="the folder was renamed, or files of two saves are mixed: copy it again",
        )
    return told


def rng_of(by_rank: Mapping[str, Tree]) -> Tree:
    """Random states: one tree, or by rank where there are several."""
    if not by_rank:
        return None
    return next(iter(by_rank.values())) if len(by_rank) == 1 else {"rank": dict(by_rank)}


def add_steps(
    store: Store, found: Found, optimizers: list[Optimizer], parameters: list[list[Parameter]], *, where: str
) -> None:
    """Give each parameter the step of its optimizer."""
    for optimizer, held in zip(optimizers, parameters, strict=True):
        step: Scalar | None = step_of(store, optimizer, where=where)
        if step is not None:
            for one in held:
                found.scalars.setdefault(one.name, {})["step"] = step


def groups_of(
    found: Found, args: Arguments, optimizers: list[Optimizer], parameters: list[list[Parameter]], *, where: str
) -> tuple[tuple[ParamGroup, ...], dict[str, Any]]:
    """Param groups by name, and what of them cannot be told apart and is carried as it is."""
    decay = bool(args.truth("apply_wd_to_qk_layernorm"))
    made = [
        param_groups(optimizer.groups, held, decay_qk=decay)
        for optimizer, held in zip(optimizers, parameters, strict=True)
    ]
    if all(groups is not None for groups in made):
        return tuple(group for groups in made if groups is not None for group in groups), {}
    found.notes.append(
        f"{where}: nothing tells which parameters each param group of the optimizer has; their hyper-parameters are "
        "carried as they are, in state['optimizer_param_groups']"
    )
    return (), {"optimizer_param_groups": [list(optimizer.groups) for optimizer in optimizers]}
