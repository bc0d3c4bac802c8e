"""A checkpoint of the test family, and the program run on it: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import ucp.converter
from tests.cli import shards
from ucp.cli.app import program

REPOSITORY = Path(__file__).parents[2]


def arrays(*, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a small model; sizes that no rank count divides."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed.weight": (13, 7),
        "layers.0.attn.weight": (5, 6),
        "layers.9.bias": (11,),
        "layers.10.bias": (3,),
        "norm.running": (1,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shards.write(tmp_path / "source", arrays())


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same state written by three ranks instead of two."""
    return shards.write(tmp_path / "other", arrays(), ranks=3)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the program in this process."""
    monkeypatch.setattr(ucp.converter, "_entries", shards.entries)
    return lambda *arguments, **options: CliRunner().invoke(
        program, [str(a) for a in arguments], prog_name="ucp", **options
    )


@pytest.fixture
def document(invoke: Callable[..., Result]) -> Callable[..., Any]:
    """Run the program with --json and give its document."""

    def run(*arguments: Any, exit_code: int = 0) -> Any:
        result = invoke(*arguments, "--json")
        assert result.exit_code == exit_code, result.output
        assert result.stderr == ""
        return json.loads(result.stdout)

    return run


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("UCP_") and key != "NO_COLOR"}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error", **more}


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real program, knowing the test family and the universal form, as a process of its own."""

    def run(*arguments: Any, module: str = "tests.cli.shards", **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment(**variables), timeout=60
        )

    return run
