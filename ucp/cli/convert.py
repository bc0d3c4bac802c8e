"""``ucp convert``: a checkpoint of one family becomes one of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.conversion import Asked, conversion_options, rerun
from ucp.cli.output import Output
from ucp.cli.progress import shown
from ucp.errors import InterruptedRunError, StorageError

if TYPE_CHECKING:
    from ucp.run.convert import Conversion
    from ucp.run.progress import Report

KEYS = {
    "source": "URL of the source",
    "destination": "URL of the result",
    "from": "family of the source",
    "to": "family of the result",
    "already_done": "whether the result was complete before",
    "objects": "number of large objects of the result",
    "resumed_objects": "how many of them an earlier run had finished",
    "bytes_read": "bytes of tensor data read",
    "bytes_checked": "bytes read only to check",
    "bytes_written": "bytes written",
    "seconds": "time taken",
    "notes": "list of remarks of the reader",
}


@declare("convert", json_keys=KEYS)
@conversion_options
@click.option("--processes", is_flag=True, help="Workers are processes instead of threads.")
@click.option("--restart", is_flag=True, help="Throw away an unfinished conversion of something else.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the universal checkpoint that is there, once the new one is whole."
)
@click.option("--share", is_flag=True, help="Store what checkpoints beside it hold as well once, in their pool.")
def command(out: Output, asked: Asked, processes: bool, restart: bool, overwrite: bool, share: bool) -> None:
    """Convert the checkpoint SOURCE into a new one at DESTINATION.

    The source is never modified and the destination is no checkpoint until everything is written and checked.
    Interrupted anywhere, the same command resumes; run on a complete result, it does nothing.
    """
    from ucp.run.convert import carry_out

    with _stoppable():
        conversion = asked.prepare(restart=restart, overwrite=overwrite, share=share)
        for note in conversion.notes:
            out.remark(("note", "yellow"), "  ", note)
        with shown(out, "converting") as show:
            report = carry_out(conversion, workers=asked.workers, processes=processes, on_progress=show)
    if out.mode == "json":
        out.json(_document(conversion, report))
    elif out.human:
        _print(out, conversion, report)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Whatever stops a run, the error says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted before anything was written", hint=f"`{rerun()}` starts again") from None
    except InterruptedRunError as error:
        raise InterruptedRunError(error.message, hint=f"`{rerun()}` resumes") from error
    except StorageError as error:
        raise type(error)(error.message, hint=f"{error.hint}\n      `{rerun()}` resumes") from error


def _document(conversion: Conversion, report: Report) -> dict[str, Any]:
    names = ("already_done", "objects", "resumed_objects", "bytes_read", "bytes_checked", "bytes_written", "seconds")
    return {
        "source": conversion.source_url,
        "destination": conversion.destination_url,
        "from": conversion.catalog.source.family,
        "to": conversion.to,
        **{name: getattr(report, name) for name in names},
        "notes": list(conversion.notes),
    }


def _print(out: Output, conversion: Conversion, report: Report) -> None:
    if report.already_done:
        out.line(f"{conversion.destination_url} is already complete")
        return
    out.line((f"{conversion.catalog.source.family} → {conversion.to}", "bold"), f"  {conversion.destination_url}")
    checked = f", and {text.size(report.bytes_checked)} to check" if report.bytes_checked else ""
    resumed = f"{report.resumed_objects:,} of them by an earlier run" if report.resumed_objects else ""
    pairs = [
        ("read", text.size(report.bytes_read) + checked),
        ("written", f"{text.size(report.bytes_written)} in {text.plural(report.objects, 'object')}"),
        ("resumed", resumed),
        ("took", f"{text.duration(report.seconds)}, {_rate(report)}"),
    ]
    out.fields([pair for pair in pairs if pair[1]])
    out.hint(f"`ucp info {conversion.destination_url}` shows it, `ucp verify --deep` reads it back")


def _rate(report: Report) -> str:
    return f"{text.size(report.bytes_read / report.seconds)}/s" if report.seconds else ""
