"""``ucp cp``: a checkpoint as it is, somewhere else."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ucp.cli import text
from ucp.cli.command import Reading, family_options
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.progress import shown

if TYPE_CHECKING:
    from ucp.lifecycle.copy import CopyReport

KEYS = {
    "source": "URL of the source",
    "destination": "URL of the copy",
    "family": "family of both",
    "already_done": "whether the copy was complete before",
    "objects": "number of objects",
    "resumed_objects": "how many of them an earlier run had copied",
    "bytes_copied": "bytes read and written",
    "bytes_verified": "bytes read back from the copy (--verify)",
    "digests": "number of the source's own digests that were set against the bytes on the way",
    "seconds": "time taken",
}


@declare("cp", json_keys=KEYS)
@click.argument("source")
@click.argument("destination")
@click.option("--verify", is_flag=True, help="Read the copy back and compare it with what was written.")
@click.option("--restart", is_flag=True, help="Throw away an unfinished copy of something else.")
@click.option("--workers", type=click.IntRange(min=1), help="Objects at a time; by default as many as pay.")
@family_options
def command(
    out: Output, source: str, destination: str, verify: bool, restart: bool, workers: int | None, reading: Reading
) -> None:
    """Copy the checkpoint SOURCE, of any family, to DESTINATION.

    Every object is copied byte for byte, without local disk, and set against the digests that the checkpoint keeps. The
    copy is no checkpoint until everything is there. Interrupted anywhere, the same command resumes; run on a complete
    copy, it does nothing but what --verify asks for.
    """
    from ucp.lifecycle.copy import copy

    with shown(out, "copying") as show:
        report = copy(
            source,
            destination,
            family=reading.family,
            verify=verify,
            restart=restart,
            workers=workers,
            on_progress=show,
            **reading.options,
        )
    if out.mode == "json":
        out.json(asdict(report))
    elif out.human:
        _print(out, report)


def _print(out: Output, report: CopyReport) -> None:
    if report.already_done:
        checked = f", and equal: {text.size(report.bytes_verified)} read back" if report.bytes_verified else ""
        out.line(f"{report.destination} is already complete{checked}")
        return
    out.line((report.family, "bold"), f"  {report.destination}")
    rate = f", {text.size(report.bytes_copied / report.seconds)}/s" if report.seconds else ""
    pairs = [
        ("copied", f"{text.size(report.bytes_copied)} in {text.plural(report.objects, 'object')}"),
        ("checked", text.plural(report.digests, "digest") if report.digests else "crc32c of what was read"),
        ("read back", text.size(report.bytes_verified) if report.bytes_verified else ""),
        ("resumed", f"{report.resumed_objects:,} of them by an earlier run" if report.resumed_objects else ""),
        ("took", f"{text.duration(report.seconds)}{rate}"),
    ]
    out.fields([pair for pair in pairs if pair[1]])
