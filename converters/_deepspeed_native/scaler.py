"""The loss scaler that a job of the wanted precision finds: ZeRO 3 cannot load without one."""

from __future__ import annotations

from collections.abc import Mapping

from ucp.catalog import Catalog
from ucp.container.values import Reference
from ucp.training import first_rank, progress
from ucp.tree import Opaque, Tree

from .._deepspeed_universal.scaler import loss_scale
from .groups import Remarks
from .wanted import Wanted

_MODULE = "deepspeed.runtime.fp16.loss_scaler"
_FIRST_SCALE = 2.0**16
"""DeepSpeed's default (deepspeed/runtime/precision_config.py), as is the window below."""


def scaler_entries(catalog: Catalog, wanted: Wanted, remarks: Remarks) -> dict[str, Tree]:
    """``loss_scaler``, ``dynamic_loss_scale`` and ``overflow``; empty where the job is to keep its own.

    Only fp16 is scaled: a job of another precision gets the scaler that does nothing, as it has anyway, whatever the
    source's was (deepspeed/runtime/fp16/loss_scaler.py, ``CreateLossScaler``). ZeRO 1 and 2 keep the job's scaler where
    a checkpoint has none; ZeRO 3 asks for one.
    """
    saved = first_rank(catalog).get("optimizer")
    told = progress(catalog).loss_scale
    if wanted.dtype != "float16":
        if told is not None:
            remarks.notes.append(f"left out: the loss scale {told['scale']}, which only fp16 has use for")
        still = Opaque(_MODULE, "LossScaler", state={"cur_scale": 1.0, "dynamic": False})
        return {"loss_scaler": still, "dynamic_loss_scale": False, "overflow": False}
    entries = loss_scale(saved) if isinstance(saved, dict) else {}
    if entries or (told is None and wanted.stage < 3):
        return entries
    if told is None:
        remarks.notes.append(f"the source tells no loss scale: fp16 starts with {_FIRST_SCALE:g}, which adapts")
    return {"loss_scaler": _dynamic(told or {}), "dynamic_loss_scale": True, "overflow": False}


def _dynamic(told: Mapping[str, Tree]) -> Opaque:
    """The scaler that goes on from what `told` has, in the words of torch's ``GradScaler``, or DeepSpeed's own."""

    def number(key: str, default: float) -> float:
        value = told.get(key)
        return float(value) if isinstance(value, int | float) else default

    state = {
        "cur_scale": number("scale", _FIRST_SCALE),
        "cur_iter": int(number("cur_iter", number("_growth_tracker", 0))),
        "last_overflow_iter": int(number("last_overflow_iter", -1)),
        "scale_factor": number("growth_factor", 2.0),
        "scale_window": int(number("growth_interval", 1000)),
        "min_scale": 1,
        "delayed_shift": 2,
        "cur_hysteresis": int(number("cur_hysteresis", 2)),
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True,
        "dynamic": True,
        "dtype": Reference("torch", "float16"),
    }
    return Opaque(_MODULE, "DynamicLossScaler", state=state)
