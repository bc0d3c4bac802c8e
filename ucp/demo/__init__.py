"""The demo: train for real, save, convert, resume on other layouts, and compare the losses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ucp.errors import UsageError

TOLERANCE = 2e-5
"""Largest relative difference of losses that other orders of float32 summation explain; a wrong state shows as 1e-2."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of one run on one layout; `losses[i]` is of step `first + i`."""

    label: str
    first: int
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw: the uninterrupted run, the resumed ones, and their largest relative difference."""

    saved_at: int
    uninterrupted: Curve
    resumed: tuple[Curve, ...]

    @property
    def largest_difference(self) -> float:
        """Largest relative difference between a resumed loss and the uninterrupted one of the same step."""
        return max(
            abs(loss - self.uninterrupted.losses[curve.first + i]) / abs(self.uninterrupted.losses[curve.first + i])
            for curve in self.resumed
            for i, loss in enumerate(curve.losses)
        )

    @property
    def held(self) -> bool:
        """Whether every resumed run went on as if nothing had happened."""
        return self.largest_difference <= TOLERANCE


def run(
    folder: Path,
    *,
    engine: str = "auto",
    before: int = 8,
    after: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train on several gloo processes with `engine` (``deepspeed``, ``fsdp2``, ``auto``), convert, resume elsewhere.

    Everything is written below `folder`. `say` is told what happens, a line at a time. UsageError for an engine that is
    not installed; UcpError if a process fails.
    """
    chosen = _choose(engine)
    _quiet_environment()
    if chosen == "deepspeed":
        from ucp.demo.with_deepspeed import run_with_deepspeed

        return run_with_deepspeed(folder, before, after, say)
    from ucp.demo.with_fsdp import run_with_fsdp

    return run_with_fsdp(folder, before, after, say)


def _choose(engine: str) -> str:
    installed = find_spec("deepspeed") is not None
    if engine == "deepspeed" and not installed:
        raise UsageError("DeepSpeed is not installed", hint="pip install 'universal-checkpoint[deepspeed]'")
    return engine if engine != "auto" else "deepspeed" if installed else "fsdp2"


def _quiet_environment() -> None:
    """Processes of the demo run on CPU, one thread each, and find the tools that lie beside the interpreter."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Send what libraries print while they are imported to nowhere."""
    sys.stdout.flush()
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)
