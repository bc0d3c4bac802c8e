"""Tensors that are moved through faults, and how what came of them is compared with the truth."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]

SHAPES = ("many small tensors", "few large ones")


def tensors(shape: str) -> Tensors:
    """About 12 MB of random numbers: 192 tensors of 64 KB, or two of 6 MB."""
    generator = torch.Generator().manual_seed(SHAPES.index(shape))
    if shape == SHAPES[0]:
        return {f"layers.{n}.weight": torch.randn(128, 128, generator=generator) for n in range(192)}
    return {f"layers.{n}.weight": torch.randn(1500, 1024, generator=generator) for n in range(2)}


def blank(like: Tensors) -> Tensors:
    """What is to be filled."""
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def differing(found: Tensors, truth: Tensors) -> int:
    """Bytes of `truth` that are not there, or are others."""
    bad = 0
    for name, tensor in truth.items():
        got = found.get(name)
        if got is None or got.shape != tensor.shape or got.dtype != tensor.dtype:
            bad += tensor.nbytes
        else:
            bad += int((got.contiguous().view(torch.uint8) != tensor.contiguous().view(torch.uint8)).sum())
    return bad
