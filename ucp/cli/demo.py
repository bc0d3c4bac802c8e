"""``ucp demo``: training, saving, converting and resuming, for real, on this machine."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ucp.cli.command import command as declare
from ucp.cli.output import Output, Span
from ucp.demo import ENGINES, TOLERANCE, Outcome, run
from ucp.errors import ContentError, UsageError

_ROWS = 24
"""Most rows of the table, about."""
KEYS = {
    "engine": "what trained and saved: `deepspeed` or `fsdp2`",
    "saved_at": "number of steps before the save",
    "uninterrupted": "object: `layout`, and `losses` of all steps",
    "resumed": "list of runs that went on from the save: `layout`, `first_step` and `losses`",
    "largest_difference": "largest relative difference between a resumed loss and the uninterrupted one of its step",
    "tolerance": "the largest difference that the order of float32 additions explains",
    "held": "whether the largest difference is within the tolerance; the exit code is then 0, else 6",
    "folder": "where the checkpoints were kept, or null",
    "seconds": "time taken",
}


@declare("demo", json_keys=KEYS, below={"elastic": "ucp.cli.demo_elastic"})
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="Who trains; auto prefers DeepSpeed.",
)
@click.option(
    "--steps", type=click.IntRange(2, 200), default=24, show_default=True, help="Training steps, half before the save."
)
@click.option("--keep", metavar="DIR", type=click.Path(path_type=Path), help="Keep the checkpoints in this new folder.")
def command(out: Output, engine: str, steps: int, keep: Path | None) -> None:
    """Train, save, convert and resume elsewhere, for real.

    A small transformer trains on four processes and saves. The checkpoint is converted, and training goes on from it on
    other numbers of processes and other layouts. The losses are printed beside those of the run that was never
    interrupted; leaves with exit code 6 if they differ by more than float32 explains.
    """
    start = time.perf_counter()
    with kept_folder(keep) as folder:
        outcome = run(folder, engine=engine, steps=steps, say=out.remark)
    seconds = time.perf_counter() - start
    if out.mode == "json":
        out.json(_document(outcome, keep, seconds))
    elif out.human:
        _print(out, outcome)
        out.remark(("took", "dim"), f"  {seconds:.0f} s", f", checkpoints kept in {keep}" if keep else "")
    if not outcome.held:
        _fail(out, outcome)


@contextmanager
def kept_folder(keep: Path | None) -> Iterator[Path]:
    """The new folder `keep`, or one that is deleted in the end; UsageError if there is something in it."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="ucp-demo-") as made:
            yield Path(made)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"{keep} is there already", hint="--keep needs a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def _document(outcome: Outcome, keep: Path | None, seconds: float) -> dict[str, Any]:
    whole = outcome.uninterrupted
    return {
        "engine": outcome.engine,
        "saved_at": outcome.saved_at,
        "uninterrupted": {"layout": whole.label, "losses": whole.losses},
        "resumed": [
            {"layout": curve.label, "first_step": curve.first, "losses": curve.losses} for curve in outcome.resumed
        ],
        "largest_difference": outcome.largest_difference,
        "tolerance": TOLERANCE,
        "held": outcome.held,
        "folder": None if keep is None else str(keep),
        "seconds": seconds,
    }


def _print(out: Output, outcome: Outcome) -> None:
    """One row per step, or per few where there are many, and the verdict."""
    curves = (outcome.uninterrupted, *outcome.resumed)
    header = ("step", *(curve.label for curve in curves), "difference")
    every = -(-len(outcome.steps) // _ROWS)
    rows = [(step, _row(outcome, step)) for step in outcome.steps if step % every == 0 or step == outcome.saved_at]
    widths = [max(map(len, column)) for column in zip(header, *(row for _, row in rows), strict=True)]
    out.line((_aligned(header, widths), "dim"))
    for step, row in rows:
        if step == outcome.saved_at:
            out.line(("saved ".ljust(sum(widths) + 2 * len(widths) - 2, "─"), "dim"))
        out.line(_aligned(row, widths))
    out.line()
    out.line(*_verdict(outcome))


def _row(outcome: Outcome, step: int) -> list[str]:
    losses = [curve.at(step) for curve in (outcome.uninterrupted, *outcome.resumed)]
    cells = ["" if loss is None else f"{loss:.6f}" for loss in losses]
    return [str(step), *cells, f"{outcome.difference(step):.1e}" if step >= outcome.saved_at else ""]


def _aligned(row: tuple[str, ...] | list[str], widths: list[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _verdict(outcome: Outcome) -> list[Span]:
    told = f"  largest relative difference {outcome.largest_difference:.1e}, "
    if outcome.held:
        return [("resumed as if never interrupted", "green"), told, f"within float32 rounding ({TOLERANCE:.0e})"]
    return [("not the same run", "red"), told, f"more than float32 rounding explains ({TOLERANCE:.0e})"]


def _fail(out: Output, outcome: Outcome) -> None:
    if out.mode == "json":
        sys.exit(ContentError.exit_code)
    raise ContentError(
        f"resumed losses differ from the uninterrupted ones by up to {outcome.largest_difference:.1e}",
        hint="this is a bug in ucp or in a framework; please report it with the versions that `pip list` shows",
    )
