"""Whether the optimizer stands where the engine and its scheduler do."""

from __future__ import annotations

from collections.abc import Mapping

from ucp.errors import ConflictError

from . import nodes
from .found import Found
from .load import MIXED_HINT, RankFile, Save


def step_notes(save: Save, found: Found) -> list[str]:
    """Remarks where the optimizer stands at another step than the engine, or learns at other rates than its schedule.

    Either alone may be: a job may start its optimizer anew or set a learning rate, and the 16-bit wrappers of ZeRO 0
    step once to make their states (deepspeed/runtime/fp16/unfused_optimizer.py, ``initialize_optimizer_states``).
    ConflictError for both at once: then the model file and the optimizer files are of different saves.
    """
    model = save.model(0)
    steps, rates = _step_remark(model, found), _rate_remark(model, found)
    if steps and rates:
        raise ConflictError(
            f"{model.path} and the optimizer are of different steps: {steps}, and {rates}", hint=MIXED_HINT
        )
    return [remark for remark in (steps, rates) if remark]


def _step_remark(model: RankFile, found: Found) -> str | None:
    steps = {scalars["step"].value for scalars in found.scalars.values() if "step" in scalars}
    counted, skipped = model.root.get("global_steps"), model.root.get("skipped_steps") or 0
    # FusedAdam counts in the first parameter of a group alone (deepspeed/ops/adam/fused_adam.py).
    if not steps or not nodes.is_number(counted) or not nodes.is_number(skipped) or max(steps) == counted - skipped:
        return None
    return f"the optimizer counted {max(steps):g} steps, the engine {counted} of which {skipped} skipped"


def _rate_remark(model: RankFile, found: Found) -> str | None:
    """Compares with ``_last_lr``, which torch's schedulers save (torch/optim/lr_scheduler.py)."""
    schedule = model.root.get("lr_scheduler")
    last = schedule.get("_last_lr") if isinstance(schedule, Mapping) else None
    rates = [group.options.get("lr") for group in found.groups]
    if not isinstance(last, list) or len(last) != len(rates) or not all(map(nodes.is_number, [*last, *rates])):
        return None
    return None if last == rates else f"its learning rates are {rates}, the schedule's {last}"
