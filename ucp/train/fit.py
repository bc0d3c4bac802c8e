"""Does one tensor of the source fit one of the target: shape, kind of number, memory."""

from __future__ import annotations

import math
from contextlib import suppress

import torch

from ucp.errors import FitError
from ucp.plan import TensorSpec
from ucp.train.report import Cast, Findings
from ucp.train.shards import dtype_name
from ucp.train.targets import Slot

_WIDER = {
    "uint8": ("int16", "uint16", "int32", "uint32", "int64", "uint64"),
    "int8": ("int16", "int32", "int64"),
    "uint16": ("int32", "uint32", "int64", "uint64"),
    "int16": ("int32", "int64"),
    "uint32": ("int64", "uint64"),
    "int32": ("int64",),
}
"""Integers that hold every value of another."""


def check_slot(findings: Findings, name: str, slot: Slot, spec: TensorSpec) -> bool:
    """Whether `slot`, called `name`, can be filled from `spec`; what hinders it and casts go to `findings`."""
    label = name if slot.state == "value" else f"{name}[{slot.state}]"
    if slot.shape != spec.shape:
        findings.add("shape", label, f"{list(spec.shape)} in the source, {list(slot.shape)} in the target")
        return False
    try:
        _check_memory(slot.held().memory, label)
    except FitError as error:
        findings.add("memory", label, error.message if error.hint is None else f"{error.message}; {error.hint}")
        return False
    return check_dtype(findings, name, slot.state, spec.dtype, slot.dtype)


def _check_memory(local: torch.Tensor, label: str) -> None:
    if local.is_conj() or local.is_neg():
        raise FitError(f"{label}: is a view that conjugates or negates what is in memory", hint="give resolved tensors")
    if any(n > 1 and stride == 0 for n, stride in zip(local.shape, local.stride(), strict=True)):
        raise FitError(f"{label}: several of its elements are one place in memory", hint="give expanded tensors cloned")


def check_number(findings: Findings, label: str, number: float, dtype: torch.dtype) -> bool:
    """Whether a number that the source keeps may become an element of `dtype`: floats round, integers never do."""
    if isinstance(number, int) or not dtype.is_floating_point:
        good = False
        with suppress(RuntimeError, OverflowError):
            good = torch.tensor(number, dtype=dtype).item() == number
    else:
        good = math.isfinite(torch.tensor(number, dtype=dtype).item()) == math.isfinite(number)
    if not good:
        findings.add("dtype", label, f"{number} in the source would change as {dtype_name(dtype)}")
    return good


def check_dtype(findings: Findings, name: str, state: str, source: str, dtype: torch.dtype) -> bool:
    """Whether `source` may become `dtype`: any float may become any other, an integer only one that holds it."""
    target = dtype_name(dtype)
    if source == target:
        return True
    floats = getattr(torch, source).is_floating_point and dtype.is_floating_point
    if not floats and target not in _WIDER.get(source, ()):
        label = name if state == "value" else f"{name}[{state}]"
        findings.add("dtype", label, f"{source} in the source would lose its meaning as {target}")
        return False
    findings.casts.append(Cast(name, state, source, target))
    return True
