"""Proof that a result is what it should be: read back against its own digests, or made again and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from ucp.converter import read_catalog
from ucp.errors import CorruptError
from ucp.run.convert import Conversion
from ucp.run.destination import recorded
from ucp.run.executor import default_workers, run_tasks
from ucp.run.progress import Counter, Progress
from ucp.run.verify import verify
from ucp.store import Buffer, Store, Writer

Check = Literal["auto", "deep", "source", "sizes"]
"""``deep`` reads a result back against its own digests, ``source`` makes it again from the source and compares each
byte, ``auto`` does the latter where the form has no digests, and ``sizes`` looks at metadata and sizes alone."""


def prove(
    conversion: Conversion, url: str, *, check: Check, workers: int | None, on_progress: Callable[[Progress], None]
) -> dict[str, int | str]:
    """Check the result of a conversion that is done, at `url`; says by what, and how many bytes were read of it.

    CorruptError for the first thing that is wrong.
    """
    deep = check in ("auto", "deep")
    found = read_catalog(url, family=conversion.to)
    verdict = verify(*found, deep=deep, workers=workers, on_progress=on_progress)
    for finding in verdict.findings:
        more = f" (and {len(verdict.findings) - 1} more)" if len(verdict.findings) > 1 else ""
        where = f"{conversion.destination_url}: {finding.kind} {finding.where}"
        raise CorruptError(f"{where}: {finding.message}{more}")
    if check == "source" or (check == "auto" and not verdict.checksums):
        return {"check": "source", "bytes_verified": _make_again(conversion, workers, on_progress)}
    return {"check": "deep" if deep else "sizes", "bytes_verified": verdict.bytes_read}


def _make_again(conversion: Conversion, workers: int | None, on_progress: Callable[[Progress], None]) -> int:
    """Run the conversion into nothing, with each byte set against the one that is there; gives their number."""
    record = recorded(conversion.destination, conversion.target.root)
    placed = conversion.placed(record.generation if record else "")
    tasks = placed.plan.tasks
    counter = Counter(sum(task.nbytes for task in tasks), len(tasks))
    running = run_tasks(
        tasks,
        source=placed.source,
        destination=cast("Store", _Expected(placed.destination)),
        checksums=placed.catalog.checksums,
        counter=counter,
        workers=max(1, min(workers or default_workers(placed.source, placed.destination), len(tasks))),
        processes=False,
    )
    compared = 0
    for done in running:
        compared += 0 if done is None else done.moved.written
        on_progress(counter.progress())
    return compared


class _Expected:
    """A store in which what is written must be there already."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def create(self, path: str, size: int) -> Writer:
        found = self.store.entry(path).size
        if found != size:
            raise CorruptError(f"{self.store.url}/{path}: has {found} bytes, not {size}")
        return _Comparing(self.store, path)


class _Comparing(Writer):
    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path = store, path

    def write_at(self, offset: int, data: Buffer) -> None:
        wanted = memoryview(data).cast("B")
        if self.store.read(self.path, offset, len(wanted)) != wanted:
            where = f"{self.store.url}/{self.path}: bytes {offset} to {offset + len(wanted)}"
            raise CorruptError(f"{where} are not what the source gives")

    def close(self) -> None:
        return None

    def abort(self) -> None:
        return None
