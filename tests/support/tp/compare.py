"""What a tensor-parallel job really held against what was read of its checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ucp
from tests.support.tp.case import VOCAB


def truth(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the job, whole, without the padding of a vocabulary."""
    return {key: unpadded(key, value) for key, value in load_file(str(folder / "truth.safetensors")).items()}


def unpadded(key: str, value: torch.Tensor) -> torch.Tensor:
    """Rows of real tokens alone, for the embeddings and heads of the Megatron-style model."""
    return value[:VOCAB] if re.search(r"word_embeddings|/\d+\.lm_head", key) else value


def record(folder: Path) -> dict[str, Any]:
    """What is no tensor."""
    described: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return described


def differences(checkpoint: ucp.Checkpoint, expected: dict[str, torch.Tensor]) -> list[str]:
    """Every state of every tensor that is missing, too many or not the same bit for bit."""
    left = {(tensor.name, state) for tensor in checkpoint.catalog.tensors.values() for state in tensor.states}
    wrong = []
    for key, value in expected.items():
        kind, _, name = key.partition("/")
        if kind == "lowp":
            continue
        state = "value" if kind in ("param", "frozen", "buffer") else kind
        if (name, state) not in left:
            wrong.append(f"{key}: missing")
            continue
        left.remove((name, state))
        found = checkpoint[name][state][...]
        if found.shape != value.shape or not torch.equal(found, value):
            wrong.append(f"{key}: {list(found.shape)} differs from {list(value.shape)}")
    return wrong + [f"{name} {state}: not in the truth" for name, state in sorted(left)]
