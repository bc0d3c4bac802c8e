"""Does one tensor of the source fit one of the target: shape, kind of number, memory."""

from __future__ import annotations

import torch

from ucp.errors import FitError
from ucp.plan import TensorSpec
from ucp.train.report import Cast, Findings
from ucp.train.shards import local_tensor, parts

_WIDER = {
    "uint8": ("int16", "uint16", "int32", "uint32", "int64", "uint64"),
    "int8": ("int16", "int32", "int64"),
    "uint16": ("int32", "uint32", "int64", "uint64"),
    "int16": ("int32", "int64"),
    "uint32": ("int64", "uint64"),
    "int32": ("int64",),
}
"""Integers that hold every value of another."""


def check_tensor(findings: Findings, name: str, state: str, spec: TensorSpec, tensor: torch.Tensor) -> bool:
    """Whether `tensor` can be filled from `spec`; what hinders it goes to `findings`, and so does a cast."""
    label = name if state == "value" else f"{name}[{state}]"
    if tuple(tensor.shape) != spec.shape:
        findings.add("shape", label, f"{list(spec.shape)} in the source, {list(tensor.shape)} in the target")
        return False
    try:
        local_tensor(tensor, label)
        parts(tensor, label)
    except FitError as error:
        findings.add("memory", label, error.message if error.hint is None else f"{error.message}; {error.hint}")
        return False
    return check_dtype(findings, name, state, spec.dtype, tensor.dtype)


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


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")
