"""What training needs beside tensors, wherever a family keeps it: one vocabulary for readers and writers.

Readers put these under the same names into `Catalog.state`: ``lr_scheduler`` (a scheduler's state dict), ``loss_scale``
(a dict with ``scale``), ``rng`` (one tree, or ``{"rank": {rank: tree}}`` where ranks differ) and ``consumed_samples``.
What a framework has beyond that stays under its own name. DeepSpeed's own entries (deepspeed/runtime/engine.py,
``_common_checkpoint_state``) are understood as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.tree import Opaque, Tree

TOLD = frozenset({"lr_scheduler", "loss_scale", "rng", "consumed_samples"})
"""Names in `Catalog.state` that `progress` speaks of."""

USUAL_NAMES: Mapping[str, str] = {
    "lr_scheduler": "lr_scheduler",
    "lr_schedulers": "lr_scheduler",
    "scheduler": "lr_scheduler",
    "schedulers": "lr_scheduler",
    "sched": "lr_scheduler",
    "rng": "rng",
    "rng_state": "rng",
    "rng_states": "rng",
    "grad_scaler": "loss_scale",
    "scaler": "loss_scale",
    "loss_scale": "loss_scale",
    "consumed_samples": "consumed_samples",
}
"""What jobs that keep a state dict of their own call these, and the name here."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is: None for whatever the checkpoint does not say.

    `iteration` counts optimizer steps and `consumed_samples` samples over all ranks. `loss_scale` has at least
    ``scale``; `lr_scheduler` and `rng` are as the source saved them.
    """

    iteration: int | None
    consumed_samples: int | None
    loss_scale: Mapping[str, Tree] | None
    lr_scheduler: Tree | None
    rng: Tree | None


def progress(catalog: Catalog) -> Progress:
    """What `catalog` says of them."""
    state = first_rank(catalog)
    client = state.get("client_state")
    if isinstance(client, dict):
        # What DeepSpeed has no entry of its own for, the training script's state carries.
        state = {**{key: client[key] for key in TOLD if key in client}, **state}
    samples = state.get("consumed_samples", state.get("global_samples"))
    return Progress(
        iteration=catalog.step,
        consumed_samples=samples if isinstance(samples, int) else None,
        loss_scale=_loss_scale(state),
        lr_scheduler=state.get("lr_scheduler"),
        rng=state.get("rng"),
    )


def first_rank(catalog: Catalog) -> dict[str, Tree]:
    """The training state as rank 0 had it: what all ranks share, and under it what was rank 0's own."""
    own = catalog.state.get("per_rank")
    first = own.get(0) if isinstance(own, dict) else None
    common = {key: value for key, value in catalog.state.items() if key != "per_rank"}
    return _merged(common, first) if isinstance(first, dict) else common


def other_states(catalog: Catalog) -> dict[Any, dict[Any, Tree]]:
    """Optimizer states that are no tensors of a parameter's shape, such as lists of them, by whose they are.

    Readers leave them in ``state["optimizer"]["state"]``, by parameter or, of flat partitions, by number. States that
    are None, which is how torch's SGD says that it has none, do not count.
    """
    optimizer = first_rank(catalog).get("optimizer")
    held = optimizer.get("state") if isinstance(optimizer, dict) else None
    found = {}
    for name, states in held.items() if isinstance(held, dict) else ():
        kept = {key: value for key, value in states.items() if value is not None} if isinstance(states, dict) else {}
        if kept:
            found[name] = kept
    return found


def _merged(common: dict[Any, Tree], own: dict[Any, Tree]) -> dict[Any, Tree]:
    both = {k: _merged(common[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(common.get(k), dict)}
    return {**common, **own, **both}


def _loss_scale(state: Mapping[str, Tree]) -> Mapping[str, Tree] | None:
    """The scale of mixed precision; None for one that never changes and is 1, which is no scaling at all."""
    told = state.get("loss_scale")
    if isinstance(told, dict) and isinstance(told.get("scale"), int | float):
        return told
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict):
        return None
    scaler = optimizer.get("loss_scaler")
    held = scaler.attribute if isinstance(scaler, Opaque) else optimizer.get
    scale, dynamic = held("cur_scale"), bool(held("dynamic", optimizer.get("dynamic_loss_scale")))
    if not isinstance(scale, int | float) or (scale == 1 and not dynamic):
        return None
    return {"scale": float(scale), "dynamic": dynamic}
