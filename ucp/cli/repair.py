"""``ucp repair``: what is damaged is put right from copies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.progress import shown
from ucp.errors import ContentError

if TYPE_CHECKING:
    from ucp.lifecycle.repair import RepairReport

KEYS = {
    "url": "where the checkpoint lies",
    "family": "its family",
    "dry_run": "whether nothing was written",
    "ok": "whether the checkpoint is whole now, or would be; the exit code is then 0, else 6",
    "objects": "number of objects that were looked at",
    "bytes_read": "bytes of the checkpoint that were read",
    "repaired": "list of objects put right: `path`, `kind` (`damaged`, `missing`, `truncated`, `too-long`), `nbytes` "
    "taken, `origins` they were taken from",
    "lost": "list of objects that cannot be put right: `path`, `kind`, and `nbytes` that nobody has",
    "notes": "list of remarks, such as which copies were of no use",
    "seconds": "time taken",
}


@declare("repair", json_keys=KEYS)
@click.argument("url")
@click.option("--from", "copies", multiple=True, metavar="URL", help="A copy, or another checkpoint; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Say what is damaged and could be put right; change nothing.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; the number of cores by default.")
def command(out: Output, url: str, copies: Sequence[str], dry_run: bool, workers: int | None) -> None:
    """Put damaged and missing objects of a checkpoint right.

    Everything is read. What fails its digest is taken, block by block, from what the checkpoint holds elsewhere, from
    copies, or from other checkpoints that hold the same bytes, such as those of earlier steps; and only where the
    digest that the checkpoint recorded proves it. Objects are replaced, never changed in place. Leaves with exit code 6
    if something cannot be put right. The universal and the native form digest every byte, and so do copies made by
    `ucp cp`; of others, what their files digest can be put right.
    """
    from ucp.lifecycle.repair import repair

    with shown(out, "reading") as show:
        report = repair(url, copies=copies, dry_run=dry_run, workers=workers, on_progress=show)
    if out.mode == "json":
        out.json({**asdict(report), "ok": report.ok})
    else:
        _print(out, report)
    if not report.ok:
        _fail(out, report)


def _print(out: Output, report: RepairReport) -> None:
    word = "can be repaired" if report.dry_run else "repaired"
    for one in report.repaired:
        taken = f"{one.kind}, {text.size(one.nbytes)} from {', '.join(one.origins)}"
        out.line((word, "green"), "  ", (one.path, "bold"), f"  {taken}")
    for lost in report.lost:
        out.line(("lost", "red"), "  ", (lost.path, "bold"), f"  {lost.kind}, {text.size(lost.nbytes)}")
    for note in report.notes:
        out.remark(("note", "yellow"), "  ", note)
    if out.human and report.ok and not report.repaired:
        looked = f"{text.plural(report.objects, 'object')}, {text.size(report.bytes_read)} read"
        out.line(("ok", "green"), f"  {report.url}  (nothing to repair; {looked})")


def _fail(out: Output, report: RepairReport) -> None:
    """Leave with the exit code of damage; in JSON mode the document has said it all."""
    if out.mode == "json":
        sys.exit(ContentError.exit_code)
    raise ContentError(
        f"{report.url}: {text.plural(len(report.lost), 'object')} cannot be put right",
        hint="name further copies with --from; every one helps that has some of the bytes",
    )
