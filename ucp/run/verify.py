"""Verification: is a checkpoint whole, and does it agree with itself.

The quick part uses metadata and object sizes only. The deep part reads every byte once and sets it against the source's
own digests, the low-precision copies and the replicas. Everything wrong is listed; nothing stops at the first problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from ucp.catalog import Catalog
from ucp.errors import ConflictError, ContentError, FitError, NotFoundError, UcpError
from ucp.format.pool import name_in, stored_name
from ucp.layout import FlatRange, itemsize
from ucp.plan import BLOCK_BYTES, Cover, Key, Section, Witness
from ucp.run.cast import Array
from ucp.run.executor import as_finished, default_workers
from ucp.run.gather import read_region
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.run.numbers import not_finite, values
from ucp.run.progress import Counter, Progress
from ucp.run.worker import check_replicas, check_witness
from ucp.store import Store

OnProgress = Callable[[Progress], None]
Check = Callable[[FlatRange, memoryview], None]
"""Called with a block and its data; ConflictError where something disagrees."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `kind` is a stable word, `where` a tensor, state or object."""

    kind: str
    where: str
    message: str


@dataclass(slots=True)
class Verdict:
    """What a verification found, and how much it looked at. `nan` and `inf` count elements by ``name[state]``."""

    findings: list[Finding] = field(default_factory=list)
    bytes_read: int = 0
    checksums: int = 0
    replicas: int = 0
    witnesses: int = 0
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. NaN and infinite elements are facts, not faults."""
        return not self.findings

    def take(self, other: Verdict) -> None:
        """Add what another verdict of the same checkpoint says."""
        self.findings += other.findings
        self.bytes_read += other.bytes_read
        self.checksums += other.checksums
        self.replicas += other.replicas
        self.witnesses += other.witnesses
        self.nan |= other.nan
        self.inf |= other.inf


def verify(
    catalog: Catalog,
    store: Store,
    *,
    deep: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Verdict:
    """Check the checkpoint `catalog`, which lies in `store`; with `deep`, read everything.

    Damage becomes findings of the verdict; StorageError is raised, since it says nothing about the content.
    """
    verdict = Verdict(findings=[*_objects(catalog, store), *_covers(catalog)])
    if not deep:
        return verdict
    spans = _spans(catalog, store, verdict)
    ledger = Ledger(spans)
    keys = [Key(name, state) for name, tensor in catalog.tensors.items() for state in tensor.states]

    def check(key: Key, advance: Callable[[int], None]) -> Verdict:
        return _check_state(catalog, key, _Reading(store, ledger, advance))

    threads = workers or default_workers(store)
    for part in run_checks(keys, check, total=catalog.nbytes, workers=threads, on_progress=on_progress):
        verdict.take(part)
    verdict.take(_checksums(spans, store, ledger))
    verdict.take(_shared(catalog, store))
    return verdict


def run_checks(
    keys: Iterable[Key],
    check: Callable[[Key, Callable[[int], None]], Verdict],
    *,
    total: int,
    workers: int,
    on_progress: OnProgress | None,
) -> Iterator[Verdict]:
    """Run `check` for each key in threads; verdicts in order of `keys`. The first exception ends all and is raised."""
    keys = list(keys)
    counter = Counter(total, len(keys))

    def run(key: Key) -> Verdict:
        verdict = check(key, counter.advance)
        counter.finish_object()
        return verdict

    pool = ThreadPoolExecutor(workers, thread_name_prefix="ucp")
    try:
        futures = [pool.submit(run, key) for key in keys]
        for finished in as_finished(futures):
            if finished is not None:
                finished.result()
            if on_progress is not None:
                on_progress(counter.progress())
        yield from (future.result() for future in futures)
    finally:
        counter.stop()
        pool.shutdown(cancel_futures=True)


def _objects(catalog: Catalog, store: Store) -> Iterator[Finding]:
    """Objects that are missing, of another size, or too short for what the metadata says lies in them."""
    needed = _needed(catalog)
    for path in sorted({*needed, *catalog.objects}):
        try:
            size = store.entry(path).size
        except NotFoundError:
            yield Finding("missing-object", path, "is not there")
            continue
        recorded = catalog.objects.get(path, (size, ""))[0]
        if size != recorded:
            yield Finding("object-size", path, f"has {size} bytes instead of {recorded}")
        elif size < needed.get(path, 0):
            yield Finding("object-size", path, f"has {size} bytes, but data up to byte {needed[path]}: it is truncated")


def _needed(catalog: Catalog) -> dict[str, int]:
    """For each object that holds tensor data: the byte after the last one used."""
    ends: dict[str, int] = defaultdict(int)
    witnesses = (fragments for _, fragments in catalog.witnesses.values())
    for fragments in (*catalog.fragments.values(), *witnesses):
        for fragment in fragments:
            name = fragment.extent.object
            ends[name] = max(ends[name], fragment.extent.span[1])
    return dict(ends)


def _covers(catalog: Catalog) -> Iterator[Finding]:
    for name, tensor in catalog.tensors.items():
        for state in tensor.states:
            try:
                catalog.cover(name, state)
            except (FitError, KeyError) as error:
                yield Finding(
                    "incomplete", str(Key(name, state)), str(error) if isinstance(error, FitError) else "has no bytes"
                )


@dataclass(slots=True)
class _Reading:
    """One state being read: where from, and what is known so far."""

    store: Store
    ledger: Ledger
    advance: Callable[[int], None]
    verdict: Verdict = field(default_factory=Verdict)

    def record(self, object: str, offset: int, data: memoryview) -> None:
        """Note a range that was read."""
        self.ledger.record(object, offset, data)
        self.verdict.bytes_read += len(data)

    def found(self, kind: str, key: Key, message: str) -> None:
        """Note that something is wrong."""
        self.verdict.findings.append(Finding(kind, str(key), message))


def _check_state(catalog: Catalog, key: Key, reading: _Reading) -> Verdict:
    """Read one state: count NaN and Inf, compare with the low-precision copy and the replicas."""
    try:
        cover = catalog.cover(*key)
    except (FitError, KeyError):
        return reading.verdict  # `_covers` listed it
    try:
        _read_state(cover, catalog.witness(key.name) if key.state == "value" else None, reading)
    except (ContentError, NotFoundError, FitError) as error:
        reading.found(error.code, key, _bare(error, reading.store))
    return reading.verdict


def _read_state(cover: Cover, witness: Witness | None, reading: _Reading) -> None:
    section = Section(0, FlatRange(0, cover.spec.size), cover, witness)
    checks = _checks(section, reading)
    reading.verdict.witnesses += witness is not None
    reading.verdict.replicas += len(cover.replicas)
    nan = inf = 0
    for block in section.blocks(BLOCK_BYTES):
        data = read_region(reading.store, cover, block, reading.record)
        more_nan, more_inf = not_finite(values(data, cover.spec.dtype))
        nan, inf = nan + more_nan, inf + more_inf
        checks = {
            kind: check for kind, check in checks.items() if _agrees(kind, check, cover.key, block, data, reading)
        }
        reading.advance(data.nbytes)
    reading.verdict.nan |= {str(cover.key): nan} if nan else {}
    reading.verdict.inf |= {str(cover.key): inf} if inf else {}


def _checks(section: Section, reading: _Reading) -> dict[str, Check]:
    """What can be set against the data, by the kind of finding where it disagrees."""
    checks: dict[str, Check] = {}
    if section.witness is not None:
        checks["low-precision-copy"] = partial(_check_witness, section, section.witness, reading)
    if section.cover.replicas:
        checks["replica"] = partial(_check_replicas, section, reading)
    return checks


def _check_witness(section: Section, witness: Witness, reading: _Reading, block: FlatRange, data: memoryview) -> None:
    reading.verdict.bytes_read += block.length * itemsize(witness.cover.spec.dtype)
    check_witness(reading.store, section, witness, block, data, reading.ledger)


def _check_replicas(section: Section, reading: _Reading, block: FlatRange, data: memoryview) -> None:
    target = section.target(block)
    groups = [group for cover in section.cover.sources for group in cover.replica_copies_into(target)]
    reading.verdict.bytes_read += sum(copy.source.nbytes for group in groups for copy in group)
    check_replicas(reading.store, section, block, data, reading.ledger)


def _agrees(kind: str, check: Check, key: Key, block: FlatRange, data: Array, reading: _Reading) -> bool:
    try:
        check(block, data.data)
    except ConflictError as error:
        reading.found(kind, key, error.message.removeprefix(f"{key}: ").removeprefix(f"{key.name}: "))
        return False
    return True


def _spans(catalog: Catalog, store: Store, verdict: Verdict) -> Spans:
    """The source's digests; where these are damaged themselves, that is found and the rest is checked without them."""
    try:
        return Spans(tuple(catalog.checksums))
    except (ContentError, NotFoundError) as error:
        verdict.findings.append(Finding("checksum", "digests", _bare(error, store)))
        return Spans(())


def _checksums(spans: Spans, store: Store, ledger: Ledger) -> Verdict:
    """Set every digest that the source keeps against the bytes that were read; what nobody read is read now."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for piece in ledger.pieces():
        pieces[piece.span].append(replace(piece, span=0))
    verdict = Verdict(checksums=len(spans.checksums))
    for number, checksum in enumerate(spans.checksums):
        single = Ledger(Spans([checksum]))
        single.add([*pieces[number], Piece(0, checksum.offset, 0, 0)])
        try:
            verdict.bytes_read += single.verify(store)
        except (ContentError, NotFoundError) as error:
            verdict.findings.append(Finding("checksum", checksum.object, _bare(error, store)))
    return verdict


def _shared(catalog: Catalog, store: Store) -> Verdict:
    """Whether the content of each object that is shared with other checkpoints is the one that it is named by."""
    verdict = Verdict()
    for path, (size, _) in catalog.objects.items():
        name = name_in(path)
        if name is None:
            continue
        try:
            found = stored_name(store, path, size)
        except (ContentError, NotFoundError):
            continue  # `_objects` and `_checksums` listed it
        verdict.bytes_read += size
        if found != name:
            verdict.findings.append(Finding("shared", path, f"its content has the BLAKE3 {found}"))
    return verdict


def _bare(error: UcpError, store: Store) -> str:
    """The message without the URL of the store, which the reader knows."""
    return error.message.removeprefix(f"{store.url}/")
