"""Checkpoints of real jobs, made once per session each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.torch_jobs import make

Job = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """Gives the checkpoint that a job of a kind saved, and the truth about it."""
    made: dict[str, Job] = {}

    def get(kind: str) -> Job:
        if kind not in made:
            out = make(kind, tmp_path_factory.mktemp("jobs") / kind)
            made[kind] = out / "ckpt", torch.load(out / "truth.pt", weights_only=False)
        return made[kind]

    return get
