"""Proof that the measured results are right: every tensor of ours against DeepSpeed's own conversion, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import ucp

STATES = {"value": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Our names of states and DeepSpeed's (deepspeed/checkpoint/ds_to_universal.py, ``zero/<parameter>/<state>.pt``)."""


def compare(ours: Path, stock: Path, *, tensors: int) -> int:
    """Compare all states of all parameters of two results; the number of equal tensors.

    `tensors` is the number of parameters that the model has. AssertionError names the first difference.
    """
    zero = stock / "universal" / "zero"
    checkpoint = ucp.open(str(ours))
    names = sorted(folder.name for folder in zero.iterdir() if folder.is_dir())
    assert len(names) == tensors, f"ds_to_universal.py wrote {len(names)} of {tensors} parameters"
    assert sorted(checkpoint) == names, f"other names: {sorted(set(checkpoint) ^ set(names))[:5]}"
    for name in names:
        for state, file in STATES.items():
            theirs = _tensor(torch.load(zero / name / f"{file}.pt", weights_only=True))
            mine = checkpoint[name][state][...]
            # Bits, not values: NaN equals NaN, and zeros have signs.
            same = mine.numel() == theirs.numel() and torch.equal(_bits(mine), _bits(theirs))
            assert same, f"{name}[{state}] differs from DeepSpeed's"
    return len(names) * len(STATES)


def _tensor(stored: Tensor | dict[str, Tensor]) -> Tensor:
    """From ZeRO-1 and -2 DeepSpeed makes a dict with the tensor under ``param``, from ZeRO-3 the flat tensor alone."""
    return stored["param"] if isinstance(stored, dict) else stored


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().contiguous().view(torch.int32)
