"""A model that tells by itself from which step it is, and a process that reads what a manager is about to delete."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import ucp
from ucp.errors import ContentError, NotFoundError

ROOT = Path(__file__).parents[3]


class Told(nn.Module):
    """A frozen base, the same in each step, and a parameter of which every element is the step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.arange(2.0**19), requires_grad=False)
        self.step = nn.ParameterList(nn.Parameter(torch.full((1000,), float(step))) for _ in range(5))


def build(step: int) -> nn.Module:
    return Told(step)


def reads(url: str) -> int:
    """The step that all of the checkpoint at `url` is of; AssertionError for a mixture."""
    with ucp.open(url) as found:
        values = {name: found[name]["value"][...] for name in found}
    base = values.pop("base")
    assert torch.equal(base, torch.arange(2.0**19))
    steps = {float(value) for tensor in values.values() for value in tensor.unique()}
    assert len(values) == 5, values.keys()
    assert len(steps) == 1, f"a mixture of steps {steps}"
    return int(steps.pop())


def _folders(run: Path) -> Iterator[Path]:
    yield from sorted(run.glob("step-????????"), reverse=True) if run.exists() else ()


def main(run: Path, stop: Path) -> None:
    """Read, the newest first, until told to stop; note how many checkpoints were whole, and how many gone."""
    whole = gone = 0
    seen = stop.with_name(f"seen-{os.getpid()}")
    while not stop.exists():
        for folder in _folders(run):
            try:
                assert reads(str(folder)) == int(folder.name.removeprefix("step-"))
                whole += 1
            except (NotFoundError, ContentError):
                gone += 1
            seen.write_text(f"{whole} {gone}")
        time.sleep(0.001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
