"""The fp16 loss scale, in the form that ZeRO's loaders take."""

from __future__ import annotations

from collections.abc import Mapping

from ucp.container.values import Reference
from ucp.tree import Opaque, Tree

_MODULE = "deepspeed.runtime.fp16.loss_scaler"


def loss_scale(saved: Mapping[str, Tree]) -> dict[str, Tree]:
    """``loss_scaler`` and its companions; empty where there is no scale to speak of.

    A job whose optimizer state says nothing keeps its own scaler (deepspeed/runtime/zero/stage_1_and_2.py,
    ``_load_global_state``). That is what a job in another precision needs: the scaler of a bf16 job, taken over by an
    fp16 one, would switch its dynamic scaling off.
    """
    scaler = saved.get("loss_scaler")
    if not isinstance(scaler, Opaque):
        scaler = _from_numbers(saved)
    if scaler is None or not (scaler.attribute("dynamic") or scaler.attribute("cur_scale") not in (1, None)):
        return {}
    return {
        "loss_scaler": scaler,
        "dynamic_loss_scale": bool(scaler.attribute("dynamic")),
        "overflow": bool(saved.get("overflow", False)),
    }


def _from_numbers(saved: Mapping[str, Tree]) -> Opaque | None:
    """The scaler that does what ZeRO-0's fp16 wrappers do with the numbers they save.

    They double the scale after `scale_window` steps without overflow and halve it at the first overflow, which is a
    hysteresis of one (deepspeed/runtime/fp16/fused_optimizer.py, ``_update_scale``).
    """
    scale = saved.get("cur_scale")
    if not isinstance(scale, int | float):
        return None
    if not saved.get("dynamic_loss_scale"):
        return Opaque(_MODULE, "LossScaler", state={"cur_scale": scale, "dynamic": False})
    state = {
        "cur_scale": scale,
        "cur_iter": saved.get("cur_iter", 0),
        "last_overflow_iter": saved.get("last_overflow_iter", -1),
        "scale_factor": saved.get("scale_factor", 2.0),
        "scale_window": saved.get("scale_window", 1000),
        "min_scale": saved.get("min_loss_scale", 1),
        "delayed_shift": 1,
        "cur_hysteresis": 1,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True,
        "dynamic": True,
        "dtype": Reference("torch", "float16"),
    }
    return Opaque(_MODULE, "DynamicLossScaler", state=state)
