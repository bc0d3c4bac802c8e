"""What a DeepSpeed engine counts beside its tensors, and the loss scale of its fp16 optimizers.

Counters are those of ``_common_checkpoint_state`` (deepspeed/runtime/engine.py) and `micro_steps`, which DeepSpeed does
not save; scales those of deepspeed/runtime/fp16/loss_scaler.py (``DynamicLossScaler``, ``LossScaleConfig``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import FitError
from ucp.train.items import Item, Prepared, World
from ucp.train.state.stateful import Scaler
from ucp.training import first_rank, progress
from ucp.tree import Opaque, Tree

_SCALE = "loss_scale"
_COUNTERS = ("global_steps", "skipped_steps", "global_samples", "micro_steps")
_TRACKED = ("cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic scale goes by, beside itself: it grows so many steps after the last overflow."""


def items_of(engine: Any) -> Iterator[Item]:
    """The counters, and the loss scale of an engine that has one."""
    for name in _COUNTERS:
        yield Counter(name, engine)
    scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None:
        yield Scaler(_SCALE, scaler)
    elif engine.fp16_enabled() and _keeper(engine) is not None:
        yield LossScale(_SCALE, engine)


@dataclass(frozen=True, slots=True)
class Counter(Item):
    """One of the engine's counters; of other frameworks' checkpoints it is made of their step and samples."""

    name: str
    engine: Any

    def saved(self) -> Tree:
        """The number. FitError between two steps: gradients that wait to be added up are in no checkpoint."""
        _check_boundary(self.engine)
        return int(getattr(self.engine, self.name))

    def told(self, catalog: Catalog) -> Tree:
        """What `catalog` says, or what follows from what it says; None for nothing."""
        return _counted(self.name, self.engine, catalog)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        if self.name == _COUNTERS[0]:
            _check_boundary(self.engine)
        if stored is None:
            return Prepared(None, f"{self.name}: the source tells no step; the engine's own stays")
        if not isinstance(stored, int) or isinstance(stored, bool) or stored < 0:
            raise FitError(f"{self.name}: {stored!r} is no count")
        return Prepared(stored)

    def install(self, state: Any) -> None:
        if state is not None:
            setattr(self.engine, self.name, state)


def _counted(name: str, engine: Any, catalog: Catalog) -> Tree:
    held = first_rank(catalog)
    told, steps = held.get(name), held.get("global_steps", catalog.step)
    if name == "micro_steps":
        each = engine.gradient_accumulation_steps()
        # Another accumulation: any boundary will do, and the count itself is of no further use.
        told = told if isinstance(told, int) and told % each == 0 else None
    if told is not None or not isinstance(steps, int):
        return told
    samples = progress(catalog).consumed_samples
    made = {
        "global_steps": steps,
        "skipped_steps": 0,
        "global_samples": steps * engine.train_batch_size() if samples is None else samples,
        "micro_steps": steps * engine.gradient_accumulation_steps(),
    }
    return made[name]


def _check_boundary(engine: Any) -> None:
    done = engine.micro_steps % engine.gradient_accumulation_steps()
    if done and not engine.pipeline_parallelism:
        raise FitError(
            f"the engine is between two steps: it added up {done} of {engine.gradient_accumulation_steps()} gradients",
            hint="save and load right after a step of the optimizer",
        )


@dataclass(frozen=True, slots=True)
class LossScale(Item):
    """A scale of fp16 training. Whether it moves is for the job's configuration to say; a fixed one stays as it is."""

    name: str
    engine: Any

    def saved(self) -> Tree:
        """``scale``, ``dynamic`` and what a dynamic scale goes by, in torch's words for it too."""
        keeper = _keeper(self.engine)
        dynamic = _is_dynamic(keeper)
        return {"scale": float(keeper.cur_scale), "dynamic": dynamic, **(_tracking(keeper) if dynamic else {})}

    def told(self, catalog: Catalog) -> Tree:
        """The scale that `catalog` tells; empty for sources that did not scale."""
        scale = progress(catalog).loss_scale
        return {} if scale is None else {**_of_deepspeed(catalog), **scale}

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        told = stored if isinstance(stored, Mapping) else {}
        own = _keeper(self.engine).cur_scale
        if not told:
            return Prepared({}, f"{self.name}: the source has none; the engine begins with its own {own:g}")
        scale = told["scale"]
        if not _is_dynamic(_keeper(self.engine)):
            note = f"{self.name}: {scale:g} in the source; the engine's own {own:g} is fixed and stays"
            return Prepared({}, None if scale == own else note)
        return Prepared({"cur_scale": float(scale), **_tracked(told)})

    def install(self, state: Any) -> None:
        keeper = _keeper(self.engine)
        for key, value in state.items():
            if hasattr(keeper, key):
                setattr(keeper, key, value)


def _tracking(keeper: Any) -> dict[str, Tree]:
    steady = max(0, keeper.cur_iter - keeper.last_overflow_iter - 1) % keeper.scale_window
    own = {key: getattr(keeper, key) for key in _TRACKED if hasattr(keeper, key)}
    growth = {"growth_factor": float(keeper.scale_factor), "growth_interval": int(keeper.scale_window)}
    return {**growth, "_growth_tracker": steady, **own}


def _tracked(told: Mapping[Any, Tree]) -> dict[str, int]:
    """What a dynamic scale goes by; of scalers that count the steps since the last overflow, made of that count."""
    found = {key: value for key in _TRACKED if isinstance(value := told.get(key), int)}
    tracker = told.get("_growth_tracker", told.get("growth_tracker"))
    if "cur_iter" not in found and isinstance(tracker, int):
        found.update(cur_iter=tracker, last_overflow_iter=-1)
    return found


def _of_deepspeed(catalog: Catalog) -> dict[str, Tree]:
    """What DeepSpeed's own checkpoints keep of a dynamic scale: a scaler object, or entries of the optimizer."""
    optimizer = first_rank(catalog).get("optimizer")
    if not isinstance(optimizer, dict):
        return {}
    scaler = optimizer.get("loss_scaler")
    held = scaler.attribute if isinstance(scaler, Opaque) else optimizer.get
    return {key: value for key in _TRACKED if isinstance(value := held(key), int)}


def _keeper(engine: Any) -> Any:
    """What holds the current scale: ZeRO's scaler, or the configuration of the unpartitioned fp16 optimizers."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def _is_dynamic(keeper: Any) -> bool:
    return bool(getattr(keeper, "dynamic", getattr(keeper, "dynamic_loss_scale", False)))
