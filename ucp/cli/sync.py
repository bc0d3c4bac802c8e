"""``ucp sync``: the folder of a run, mirrored."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.progress import shown

if TYPE_CHECKING:
    from ucp.lifecycle.sync import SyncReport

KEYS = {
    "source": "URL of the run",
    "destination": "URL of the mirror",
    "copied": "list of steps whose checkpoints were copied, the newest first",
    "present": "list of steps that were there before",
    "replaced": "list of those of `copied` that were another checkpoint before (--delete)",
    "mended": "list of those of `copied` that were there, but had lost objects since, or damaged ones (--verify)",
    "deleted": "list of steps that the source has no more, and that were deleted (--delete)",
    "vanished": "list of steps that were deleted at the source while they were copied",
    "objects": "number of objects of what was copied or read back",
    "resumed_objects": "how many of them were there before",
    "bytes_copied": "bytes read and written",
    "bytes_verified": "bytes read back from the mirror (--verify)",
    "seconds": "time taken",
}


@declare("sync", json_keys=KEYS)
@click.argument("source")
@click.argument("destination")
@click.option("--delete", is_flag=True, help="Delete what the source has no more, and replace what is another there.")
@click.option("--verify", is_flag=True, help="Read all of the mirror back, what was there before too, and mend it.")
@click.option("--workers", type=click.IntRange(min=1), help="Objects at a time; by default as many as pay.")
def command(out: Output, source: str, destination: str, delete: bool, verify: bool, workers: int | None) -> None:
    """Copy the checkpoints of the run SOURCE that DESTINATION lacks.

    Complete checkpoints (step-...) are copied as `ucp cp` does it, the newest first, with their records. What
    is there and has lost objects gets them back. Nothing is
    deleted unless asked for, and then after everything is copied. Interrupted anywhere, the same command resumes.
    """
    from ucp.lifecycle.sync import sync

    with shown(out, "copying") as show:
        report = sync(source, destination, delete=delete, verify=verify, workers=workers, on_progress=show)
    if out.mode == "json":
        out.json(asdict(report))
    elif out.human:
        _print(out, report)


def _print(out: Output, report: SyncReport) -> None:
    out.line(("run", "bold"), f"  {report.destination}")
    copied = f"{_steps(report.copied)}: {text.size(report.bytes_copied)}" if report.copied else "nothing is missing"
    pairs = [
        ("copied", copied),
        ("present", _steps(report.present)),
        ("replaced", _steps(report.replaced)),
        ("mended", _steps(report.mended)),
        ("deleted", _steps(report.deleted)),
        ("vanished", _steps(report.vanished)),
        ("read back", text.size(report.bytes_verified) if report.bytes_verified else ""),
        ("took", text.duration(report.seconds)),
    ]
    out.fields([pair for pair in pairs if pair[1]])


def _steps(steps: list[int]) -> str:
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}" if steps else ""
