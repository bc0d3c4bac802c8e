"""Progress of long runs on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ucp.cli import text
from ucp.cli.output import Output

if TYPE_CHECKING:
    from ucp.run.progress import Progress

CALM_SECONDS = 10.0
"""Seconds between lines where there is no terminal."""

Show = Callable[["Progress"], None]


def describe(progress: Progress) -> str:
    """``288.6 MB/1.2 GB  24%  2.3 GB/s  eta 12.0 s``."""
    done, total = progress.bytes_done, progress.bytes_total
    share = 100 * done // total if total else 100
    parts = [f"{text.size(done)}/{text.size(total)}", f"{share:3}%"]
    fresh = done - progress.resumed_bytes
    if fresh > 0 and progress.seconds > 0:
        rate = fresh / progress.seconds
        parts += [f"{text.size(rate)}/s", f"eta {text.duration((total - done) / rate)}"]
    return "  ".join(parts)


@contextmanager
def shown(out: Output, label: str) -> Iterator[Show]:
    """A function to call with each `Progress`; it may be called often."""
    if not out.progress:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(label) as show:
            yield show
    elif out.human:
        yield _calm(out, label)
    else:
        yield lambda _: None


def _calm(out: Output, label: str) -> Show:
    last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= CALM_SECONDS:
            last = time.monotonic()
            out.remark(f"{label}  {describe(progress)}")

    return show


@contextmanager
def _bar(label: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    label_column, words = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[words]"))
    columns = (label_column, BarColumn(), words)
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, words="")

        def show(progress: Progress) -> None:
            bars.update(
                task, completed=progress.bytes_done, total=max(progress.bytes_total, 1), words=describe(progress)
            )

        yield show
