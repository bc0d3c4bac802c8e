"""``ucp gc``: what no checkpoint of a run needs any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.output import Output

if TYPE_CHECKING:
    from ucp.lifecycle.gc import Garbage, GcReport

KEYS = {
    "url": "URL of the run",
    "dry_run": "whether nothing was changed",
    "removed": "list of what was removed, or would be: `kind` (`shared` object, `incomplete` checkpoint or what was "
    "left in one, `stray` file, `lease` of a writer that is no more), `path` in the run, `nbytes`, `due` (0)",
    "condemned": "list of what goes if it stays as it is; `due` is in how many seconds, at the earliest",
    "complete": "list of the complete checkpoints",
    "foreign": "list of what is not ours, and was left alone",
    "waiting": "list of leases of writers that are waited for before shared objects go",
    "bytes_removed": "bytes that were removed",
}


@declare("gc", json_keys=KEYS)
@click.argument("run")
@click.option("--grace", default="24h", show_default=True, help="How long something must stay unneeded: 90m, 24h, 7d.")
@click.option("--dry-run", is_flag=True, help="Change nothing; show what would go.")
def command(out: Output, run: str, grace: str, dry_run: bool) -> None:
    """Remove what no checkpoint of the folder RUN needs.

    That is objects that checkpoints shared which are gone, incomplete checkpoints, and what killed writers have left.
    Each is noted first, and removed by a later run if it has stayed as it is for the grace period, which must be
    longer than any writer may stall. Complete checkpoints and what is not ucp's are never touched.
    """
    from ucp.lifecycle.gc import gc

    report = gc(run, grace=grace, dry_run=dry_run)
    if out.mode == "json":
        out.json({**asdict(report), "bytes_removed": 0 if dry_run else report.nbytes})
    elif out.human:
        _print(out, report)


def _print(out: Output, report: GcReport) -> None:
    word = "to go" if report.dry_run else "removed"
    pairs = [
        ("checkpoints", f"{len(report.complete):,}"),
        (word, _told(report.removed)),
        ("condemned", _told(report.condemned)),
        ("due", _due(report.condemned)),
        ("waiting", f"for {text.plural(len(report.waiting), 'writer')}" if report.waiting else ""),
        ("left alone", " ".join(report.foreign)),
    ]
    out.fields([pair for pair in pairs if pair[1]])
    if out.verbose:
        for one in (*report.removed, *report.condemned):
            out.line((one.kind, "dim"), f"  {one.path}  {text.size(one.nbytes)}")


def _told(found: Sequence[Garbage]) -> str:
    if not found:
        return "nothing"
    nouns = {
        "shared": ("shared object", "shared objects"),
        "incomplete": ("folder with remains", "folders with remains"),
        "stray": ("stray file", "stray files"),
        "lease": ("dead writer", "dead writers"),
    }
    counts = Counter(one.kind for one in found)
    parts = [text.plural(count, *nouns[kind]) for kind, count in counts.items()]
    return f"{', '.join(parts)}, {text.size(sum(one.nbytes for one in found))}"


def _due(condemned: Sequence[Garbage]) -> str:
    if not condemned:
        return ""
    return f"the first in {text.duration(min(one.due for one in condemned))}, by another run of `ucp gc`"
