"""The demo: train for real, save, convert, resume on other layouts, and compare the losses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ucp.demo.curves import TOLERANCE, Curve, Outcome
from ucp.demo.quiet import prepare_environment
from ucp.errors import UsageError

ENGINES = ("auto", "deepspeed", "fsdp2")

__all__ = ["ENGINES", "TOLERANCE", "Curve", "Outcome", "run"]


def run(
    folder: Path,
    *,
    engine: str = "auto",
    steps: int = 24,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train on several gloo processes with `engine`, save, convert, and resume elsewhere.

    Half of `steps` come before the save. Everything is written below `folder`. `say` is told what happens, a line at a
    time. Sets environment variables of this process and forks it: call it from a process that has no threads.

    UsageError for an engine that is not installed, UcpError if a process fails.
    """
    before = steps // 2
    if before < 1:
        raise UsageError(f"{steps} steps cannot be interrupted", hint="give at least 2")
    chosen = _choose(engine)
    prepare_environment()
    if chosen == "deepspeed":
        from ucp.demo.with_deepspeed import run_with_deepspeed

        return run_with_deepspeed(folder, before, steps - before, say)
    from ucp.demo.with_fsdp import run_with_fsdp

    return run_with_fsdp(folder, before, steps - before, say)


def _choose(engine: str) -> str:
    installed = find_spec("deepspeed") is not None
    if engine == "deepspeed" and not installed:
        raise UsageError("DeepSpeed is not installed", hint="pip install 'universal-checkpoint[deepspeed]'")
    return engine if engine != "auto" else "deepspeed" if installed else "fsdp2"
