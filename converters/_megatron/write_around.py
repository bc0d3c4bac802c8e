"""What a checkpoint holds beside tensors, for both forms: optimizer, scheduler, loss scale, args; what is left out."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog, ParamGroup
from ucp.container.torchwrite import dumps
from ucp.plan import Extent
from ucp.store import Store
from ucp.training import progress
from ucp.tree import TensorLeaf, Tree

from .._deepspeed_universal.carry import CLASSES, inlined
from .folder import TRACKER
from .write_args import namespace
from .write_choice import MOMENTS, Choice
from .write_groups import Grouped
from .write_rng import Place, rng_states

_SCHEDULER = frozenset({"num_steps", "max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style"})
_SCHEDULE_OF_THE_JOB = "start the job with --override-opt_param-scheduler, which takes its own schedule"
_COUNTERS = ("num_floating_point_operations_so_far",)
"""Numbers that Megatron-LM keeps beside the iteration (megatron/training/checkpointing.py, ``generate_state_dict``)."""

_PLACED = frozenset({"args", "consumed_samples", "content_metadata", "loss_scale", "lr_scheduler", *_COUNTERS})


@dataclass(frozen=True)
class Around:
    """What of `catalog` is written beside its tensors. `notes` say what is left out, `losses` what is not exact."""

    catalog: Catalog
    store: Store
    choice: Choice
    groups: tuple[ParamGroup, ...]
    """Of the whole model; none without optimizer."""

    step: int | None
    iteration: int | None
    """None for weights alone, which Megatron-LM calls a release."""

    sizes: Mapping[str, int]
    rows: int
    losses: tuple[str, ...]
    notes: tuple[str, ...]
    common: Mapping[str, Tree]
    """What every file or rank has alike."""

    rng: Mapping[Place, Tree]
    """Random states by place along pp and tp; none where they are left out."""

    @classmethod
    def of(
        cls,
        catalog: Catalog,
        store: Store,
        choice: Choice,
        grouped: Grouped | None,
        sizes: Mapping[str, int],
        rows: int,
    ) -> Around:
        """Collect it; `grouped` is None where the optimizer is left out."""
        told = progress(catalog)
        notes: list[str] = []

        def drop(path: str, reason: str) -> None:
            notes.append(f"left out: {path} ({reason})")

        iteration = None if grouped is None and catalog.step is None else catalog.step or 0
        if grouped is not None and catalog.step is None:
            iteration = grouped.step
        if not choice.args.values:
            notes.append(
                "args are made up of what tensors and configuration tell: give the job its own on the command line"
            )
        rng = rng_states(catalog, choice, drop) if grouped is not None else {}
        args = namespace(
            catalog, choice, sizes, rows=rows, iteration=iteration or 0, samples=told.consumed_samples, drop=drop
        )
        args.state["no_save_rng"] = not rng
        common: dict[str, Tree] = {"args": args, "checkpoint_version": 3.0, "iteration": iteration or 0}
        common |= {key: catalog.state[key] for key in _COUNTERS if isinstance(catalog.state.get(key), int | float)}
        if grouped is not None:
            scheduler = _scheduler(told.lr_scheduler, grouped, told.consumed_samples, notes)
            common["opt_param_scheduler"] = scheduler
        notes += _left_out(catalog, choice, grouped, rng=bool(rng))
        return cls(
            catalog,
            store,
            choice,
            grouped.catalog.param_groups if grouped else (),
            grouped.step if grouped else None,
            iteration,
            sizes,
            rows,
            grouped.losses if grouped else (),
            (*(grouped.notes if grouped else ()), *dict.fromkeys(notes)),
            common,
            rng,
        )

    @property
    def folder(self) -> str:
        """Folder of the checkpoint in its root, with a slash (megatron/training/checkpointing.py)."""
        return "release/" if self.iteration is None else f"iter_{self.iteration:07d}/"

    @property
    def tracker(self) -> tuple[str, bytes]:
        """The root object."""
        return TRACKER, b"release" if self.iteration is None else str(self.iteration).encode()

    def scaler(self) -> dict[str, Tree]:
        """``grad_scaler`` of an fp16 job (megatron/core/optimizer/grad_scaler.py), or nothing."""
        scale = progress(self.catalog).loss_scale
        if scale is None or self.choice.dtype != "float16":
            return {}
        packed = struct.pack("<f", float(scale["scale"]))
        leaf = TensorLeaf(Extent.contiguous("", 0, (1,), "float32"), inline=packed)
        counters = {
            key: scale[key] if isinstance(scale.get(key), int) else 0
            for key in ("growth_tracker", "hysteresis_tracker")
        }
        return {"grad_scaler": {"scale": leaf, **counters}}

    def dumps(self, tree: Tree, *, archive: str) -> bytes:
        """A small file of `tree`."""
        return dumps(inlined(tree, self.store), archive=archive, classes=CLASSES)


def group_trees(groups: Sequence[ParamGroup], *, step: bool) -> list[dict[str, Tree]]:
    """Groups as Megatron-Core saves them, without parameters; the distributed optimizer keeps the step in them."""
    return [{k: v for k, v in group.options.items() if step or k != "step"} for group in groups]


def step_leaf(step: int) -> TensorLeaf:
    """The step as torch's Adam keeps it."""
    return TensorLeaf(Extent.contiguous("", 0, (), "float32"), inline=struct.pack("<f", step))


def split(groups: Sequence[ParamGroup], *, chained: bool) -> list[list[ParamGroup]]:
    """Groups of each optimizer: that of experts is another one under expert parallelism."""
    if not chained:
        return [list(groups)]
    return [[g for g in groups if bool(g.options["is_expert_parallel"]) is expert] for expert in (False, True)]


def _scheduler(saved: Tree, grouped: Grouped, samples: int | None, notes: list[str]) -> dict[str, Tree]:
    """``opt_param_scheduler``, without which Megatron-LM loads no optimizer."""
    if isinstance(saved, dict) and saved.keys() >= _SCHEDULER:
        return {str(key): value for key, value in saved.items()}
    what = "the source has no schedule of Megatron's" if saved is None else "left out: the source's lr_scheduler"
    notes.append(f"{what}: {_SCHEDULE_OF_THE_JOB}")
    if samples is None:
        notes.append("the source does not tell how many samples were consumed: data and schedule of the job start anew")
    first = grouped.catalog.param_groups[0].options if grouped.catalog.param_groups else {}
    rate, decay = first.get("lr", 0.0), first.get("weight_decay", 0.0)
    return _constant(rate, decay, samples or 0)


def _constant(rate: Any, decay: Any, samples: int) -> dict[str, Tree]:
    """A schedule that keeps what the groups have (megatron/core/optimizer_param_scheduler.py)."""
    return {
        "max_lr": rate,
        "lr_warmup_steps": 0,
        "num_steps": samples,
        "lr_decay_style": "constant",
        "lr_decay_steps": max(samples, 1),
        "min_lr": 0.0,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": max(samples, 1),
    }


def _left_out(catalog: Catalog, choice: Choice, grouped: Grouped | None, *, rng: bool) -> list[str]:
    kept = {"value", *MOMENTS} if grouped else {"value"}
    states = sorted({state for tensor in catalog.tensors.values() for state in tensor.states} - kept)
    names = sorted(key for key in catalog.state if key not in _PLACED and (key, rng) != ("rng", True))
    if grouped is None:
        names += sorted(key for key in ("lr_scheduler", "loss_scale") if key in catalog.state)
        names += ["hyper-parameters of the optimizer"] if catalog.param_groups else []
    elif "loss_scale" in catalog.state and choice.dtype != "float16":
        names.append("loss_scale")
    found = [f"left out: states {' '.join(states)}"] if states else []
    return [*found, *([f"left out: {', '.join(names)}"] if names else [])]
