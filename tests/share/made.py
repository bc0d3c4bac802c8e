"""Runs whose checkpoints share: half of what each holds is the same in all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ucp
from tests.format.build import universal

Truth = dict[str, dict[str, np.ndarray]]


def tensors(step: int, *, shape: tuple[int, ...] = (40, 30)) -> Truth:
    """What the checkpoint of `step` holds: two frozen tensors, and one that is another one in each step."""
    fixed = np.random.default_rng(7)
    base = {f"base.{i}": {"value": fixed.standard_normal(shape).astype("f4")} for i in range(2)}
    adapter = {"value": np.full((3, 5), step, "f4"), "exp_avg": np.full((3, 5), step / 2, "f4")}
    return {**base, "adapter": adapter}


def source(folder: Path, step: int) -> str:
    """A checkpoint of `step` to be converted."""
    made = folder / f"source-{step}" / "universal"
    return str(made) if made.exists() else universal(made.parent, tensors(step), step=step).url


def exported(folder: Path, *steps: int, **options: object) -> Path:
    """A run with a shared checkpoint of each of `steps`, ``step-1`` and so on; its folder."""
    for step in steps:
        ucp.convert(source(folder, step), str(folder / "run" / f"step-{step}"), share=True, **options)
    return folder / "run"


def check(url: str | Path, step: int) -> None:
    """AssertionError unless the checkpoint at `url` holds what that of `step` does."""
    with ucp.open(str(url)) as found:
        for name, states in tensors(step).items():
            for state, expected in states.items():
                assert np.array_equal(found[name][state][...].numpy(), expected), (name, state)


def pool(run: Path) -> set[str]:
    """Names of the objects in the pool of a run."""
    return {path.name for path in (run / "shared").iterdir() if len(path.name) == 64}


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
