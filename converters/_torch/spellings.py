"""Which entry of a saved dict is what: the model, optimizers, schedulers, and how far training is.

Everybody who calls torch.save chooses keys; common ones are listed here, and what an optimizer, a scheduler or a
gradient scaler saves is known by its own form (torch/optim/optimizer.py, torch/optim/lr_scheduler.py,
torch/amp/grad_scaler.py). Lightning: lightning/pytorch/trainer/connectors/checkpoint_connector.py,
``dump_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import FitError, NotFoundError
from ucp.tree import Opaque, Tree

from .._deepspeed import nodes

LIGHTNING = "pytorch-lightning_version"

_MODELS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "model_state", "weights", "params")
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter", "num_updates", "steps", "it")
_SCHEDULERS = (
    "lr_scheduler", "scheduler", "lr_schedulers", "schedulers", "scheduler_state_dict", "lr_scheduler_state_dict",
    "lr_scheduler_state", "lr_sched",
)  # fmt: skip
_RNG = ("rng", "rng_state", "rng_states", "random_state")


@dataclass(slots=True)
class Parts:
    """A saved dict, sorted out: model entries by name, optimizers by their place, and the rest as training state."""

    model: dict[str, Tree]
    optimizers: dict[str, Mapping[Any, Tree]] = field(default_factory=dict)
    step: int | None = None
    state: dict[str, Tree] = field(default_factory=dict)


def sort_out(root: Tree, where: str, *, model: Sequence[str] = (), optimizer: Sequence[str] = ()) -> Parts:
    """What the entries of `root` are; `model` and `optimizer` name them where their keys do not tell.

    FitError if it is not told which entry is the model, NotFoundError for a name that is no entry.
    """
    if isinstance(root, Opaque):
        raise FitError(
            f"{where}: a pickled {root.path} and no dict of tensors",
            hint="torch.load it where its class is known, and torch.save its state_dict()",
        )
    entries = dict(nodes.mapping(root, where))
    for name in (*model, *optimizer):
        if name not in entries:
            raise NotFoundError(f"{where}: no entry {name!r}", hint=f"there are: {_listed(entries)}")
    chosen = tuple(model) or _model_keys(entries, where)
    parts = Parts(_model(entries, chosen, where))
    rest = {key: value for key, value in entries.items() if key not in chosen} if chosen else {}
    _take_optimizers(parts, rest, optimizer, where)
    _take_progress(parts, rest)
    parts.state.update({str(key): value for key, value in rest.items()})
    return parts


def _model(entries: Mapping[Any, Tree], chosen: Sequence[str], where: str) -> dict[str, Tree]:
    """Entries of the chosen state dicts; where there are several, under the names of these."""
    if not chosen:
        return {str(name): node for name, node in entries.items()}
    found: dict[str, Tree] = {}
    for key in chosen:
        held = entries[key]
        if isinstance(held, Opaque):
            sort_out(held, f"{where}: {key}")
        prefix = f"{key}." if len(chosen) > 1 else ""
        found.update({f"{prefix}{name}": node for name, node in nodes.mapping(held, f"{where}: {key}").items()})
    return found


def _model_keys(entries: Mapping[Any, Tree], where: str) -> tuple[str, ...]:
    """The entry that is the model; nothing if `entries` are themselves a state dict."""
    for key in _MODELS:
        if is_state_dict(entries.get(key)) or isinstance(entries.get(key), Opaque):
            return (key,)
    inner = [str(key) for key, value in entries.items() if is_state_dict(value)]
    if len(inner) == 1:
        return (inner[0],)
    if inner:
        raise FitError(
            f"{where}: it is not told which of {_listed(inner)} is the model",
            hint=f"name it, or several of them: model={inner[0]} (on the command line: -o model={inner[0]})",
        )
    if any(nodes.is_tensor(value) for value in entries.values()):
        return ()
    raise FitError(f"{where}: no model in it", hint=f"its entries are: {_listed(entries)}")


def is_state_dict(node: Tree) -> bool:
    """Whether `node` is a dict of tensors by name; an optimizer's is none."""
    if not isinstance(node, Mapping) or is_optimizer(node):
        return False
    return any(nodes.is_tensor(value) for value in node.values()) and all(isinstance(name, str) for name in node)


def is_optimizer(node: Tree) -> bool:
    """Whether `node` is the state dict of a torch optimizer."""
    return isinstance(node, Mapping) and {"state", "param_groups"} <= node.keys()


def _is_scaler(node: Tree) -> bool:
    return isinstance(node, Mapping) and {"scale", "growth_factor"} <= node.keys()


def _take_optimizers(parts: Parts, rest: dict[Any, Tree], named: Sequence[str], where: str) -> None:
    for key in list(rest):
        value = rest[key]
        if named and key not in named:
            continue
        if is_optimizer(value):
            parts.optimizers[str(key)] = rest.pop(key)
        elif isinstance(value, list | tuple) and value and all(is_optimizer(one) for one in value):
            parts.optimizers.update({f"{key}.{i}": one for i, one in enumerate(rest.pop(key))})
        elif named:
            raise FitError(f"{where}: {key} is no state dict of a torch optimizer")


def _take_progress(parts: Parts, rest: dict[Any, Tree]) -> None:
    """What `ucp.training` has names for."""
    key = next((key for key in _STEPS if type(rest.get(key)) is int), None)
    if key is not None:
        parts.step = rest.pop(key)
    schedulers = [key for key in _SCHEDULERS if rest.get(key)]
    if len(schedulers) == 1:
        value = rest.pop(schedulers[0])
        single = isinstance(value, list | tuple) and len(value) == 1
        parts.state["lr_scheduler"] = value[0] if single else value
    scalers = [key for key, value in rest.items() if _is_scaler(value)]
    if len(scalers) == 1:
        parts.state["loss_scale"] = rest.pop(scalers[0])
    random = [key for key in _RNG if key in rest]
    if len(random) == 1:
        parts.state["rng"] = rest.pop(random[0])


def _listed(names: Iterable[object]) -> str:
    shown = [f"{name!s:.60}" for name in names]
    return " ".join(shown[:12]) + (" …" if len(shown) > 12 else "")
