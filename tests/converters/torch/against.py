"""Compares what is read with the truth that a job recorded, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ucp


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def check_truth(url: str | Path, truth: dict[str, Any], *, buffers_told: bool = False, **options: Any) -> Any:
    """Everything in `truth` is in the checkpoint at `url` under the same names; gives the opened checkpoint.

    With `buffers_told`, floating-point buffers are told from frozen parameters.
    """
    ckpt = ucp.open(str(url), **options)
    names = set(ckpt) | set(ckpt.ties)
    assert names >= set(truth["values"])
    for name, value in truth["values"].items():
        assert same(ckpt[name]["value"][...], value), name
        kind = truth["kinds"][name]
        assert ckpt[name].kind == kind or (ckpt[name].kind == "frozen" and kind == "buffer" and not buffers_told), name
    held = {name: set(ckpt.catalog.tensors[name].states) - {"value"} for name in ckpt}
    assert {name: states for name, states in held.items() if states} == {
        name: set(states) for name, states in truth["states"].items() if states
    }
    for name, states in truth["states"].items():
        for state, value in states.items():
            assert same(ckpt[name][state][...], value), (name, state)
        assert ckpt[name].scalars["step"] == truth["steps"][name]
    assert [(list(group.params), dict(group.options)) for group in ckpt.param_groups] == truth["groups"]
    assert ckpt.step == truth["step"]
    return ckpt
