"""Verification: is a checkpoint whole, and does it agree with itself.

The quick part uses metadata and object sizes only. The deep part reads every byte once and sets it against the source's
own digests, the low-precision copies and the replicas. Everything wrong is listed; nothing stops at the first problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import numpy as np

from ucp.catalog import Catalog
from ucp.errors import ContentError, FitError, NotFoundError, UcpError
from ucp.layout import Box, FlatRange, Region, Shape, as_flat, boxes, itemsize
from ucp.plan import BLOCK_BYTES, Cover, Extent, Fragment, Key, Section, Witness, common
from ucp.run.cast import Array
from ucp.run.executor import default_workers
from ucp.run.gather import gather, read_region
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.run.numbers import not_finite, values
from ucp.run.progress import Counter, Progress
from ucp.run.worker import check_witness
from ucp.store import Store

OnProgress = Callable[[Progress], None]
_POLL_SECONDS = 0.1


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
    ledger = Ledger(Spans(catalog.checksums))
    keys = [Key(name, state) for name, tensor in catalog.tensors.items() for state in tensor.states]

    def check(key: Key, advance: Callable[[int], None]) -> Verdict:
        return _check_state(catalog, store, key, ledger, advance)

    for part in run_checks(keys, check, total=catalog.nbytes, workers=workers, on_progress=on_progress):
        verdict.take(part)
    verdict.take(_checksums(catalog, store, ledger))
    return verdict


def run_checks(
    keys: Iterable[Key],
    check: Callable[[Key, Callable[[int], None]], Verdict],
    *,
    total: int,
    workers: int | None,
    on_progress: OnProgress | None,
) -> Iterator[Verdict]:
    """Run `check` for each key in threads; verdicts in order of `keys`. The first exception ends all and is raised."""
    keys = list(keys)
    counter = Counter(total, len(keys))

    def run(key: Key) -> Verdict:
        verdict = check(key, counter.advance)
        counter.finish_object()
        return verdict

    pool = ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="ucp")
    try:
        futures = [pool.submit(run, key) for key in keys]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            if on_progress is not None:
                on_progress(counter.progress())
            for future in finished:
                future.result()
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


def _check_state(catalog: Catalog, store: Store, key: Key, ledger: Ledger, advance: Callable[[int], None]) -> Verdict:
    """Read one state: count NaN and Inf, compare with the low-precision copy and the replicas."""
    verdict = Verdict()
    try:
        cover = catalog.cover(*key)
        witness = catalog.witness(key.name) if key.state == "value" else None
        _read_state(store, cover, witness, ledger, verdict, advance)
        verdict.findings += _replicas(store, cover, ledger, verdict)
    except FitError:
        return verdict  # `_covers` listed it
    except (ContentError, NotFoundError) as error:
        verdict.findings.append(Finding(error.code, str(key), error.message))
    return verdict


def _read_state(
    store: Store,
    cover: Cover,
    witness: Witness | None,
    ledger: Ledger,
    verdict: Verdict,
    advance: Callable[[int], None],
) -> None:
    section = Section(0, FlatRange(0, cover.spec.size), cover, witness)
    verdict.witnesses += witness is not None
    nan = inf = 0
    for block in section.blocks(BLOCK_BYTES):
        data = read_region(store, cover, block, ledger.record)
        more_nan, more_inf = not_finite(values(data, cover.spec.dtype))
        nan, inf = nan + more_nan, inf + more_inf
        if witness is not None and not _agrees(store, section, witness, block, data, ledger, verdict):
            witness = None
        verdict.bytes_read += data.nbytes
        advance(data.nbytes)
    verdict.nan |= {str(cover.key): nan} if nan else {}
    verdict.inf |= {str(cover.key): inf} if inf else {}


def _agrees(
    store: Store, section: Section, witness: Witness, block: FlatRange, data: Array, ledger: Ledger, verdict: Verdict
) -> bool:
    try:
        check_witness(store, section, witness, block, data.data, ledger)
    except ContentError as error:
        verdict.findings.append(Finding("low-precision-copy", str(section.cover.key), error.message))
        return False
    return True


def _replicas(store: Store, cover: Cover, ledger: Ledger, verdict: Verdict) -> Iterator[Finding]:
    for fragment in cover.replicas:
        verdict.replicas += 1
        if any(
            _differs(store, cover, fragment, part, ledger)
            for part in blocks(fragment.region, cover.spec.shape, cover.spec.dtype)
        ):
            where = f"{fragment.extent.object} at byte {fragment.extent.offset}"
            yield Finding("replica", str(cover.key), f"the copy in {where} differs from the one that is read")


def _differs(store: Store, cover: Cover, fragment: Fragment, part: Region, ledger: Ledger) -> bool:
    shape = (part.length,) if isinstance(part, FlatRange) else part.shape
    target = Fragment(part, Extent.contiguous("", 0, shape, cover.spec.dtype))
    copy = np.empty(target.extent.nbytes, np.uint8)
    gather(store, common(fragment, target, cover.spec.shape), copy.data, ledger.record)
    return not np.array_equal(copy, read_region(store, cover, part, ledger.record))


def blocks(region: Region, shape: Shape, dtype: str) -> Iterator[Region]:
    """Cut `region` of a tensor into parts of at most `BLOCK_BYTES`."""
    most = max(1, BLOCK_BYTES // itemsize(dtype))
    flat = as_flat(region, shape)
    if flat is not None:
        for start in range(flat.start, flat.stop, most):
            yield FlatRange(start, min(most, flat.stop - start))
        return
    for box in boxes(region, shape):
        yield from _cut(box, most)


def _cut(box: Box, most: int) -> Iterator[Box]:
    """Halve `box` along its first dim that has a length until no part has more than `most` elements."""
    if box.size <= most:
        yield box
        return
    dim = next(d for d, n in enumerate(box.shape) if n > 1)
    half = box.shape[dim] // 2
    for skip, length in ((0, half), (half, box.shape[dim] - half)):
        start = tuple(a + skip if d == dim else a for d, a in enumerate(box.start))
        yield from _cut(Box(start, tuple(length if d == dim else n for d, n in enumerate(box.shape))), most)


def _checksums(catalog: Catalog, store: Store, ledger: Ledger) -> Verdict:
    """Set every digest that the source keeps against the bytes that were read; what nobody read is read now."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for piece in ledger.pieces():
        pieces[piece.span].append(replace(piece, span=0))
    verdict = Verdict(checksums=len(catalog.checksums))
    for number, checksum in enumerate(catalog.checksums):
        single = Ledger(Spans([checksum]))
        single.add([*pieces[number], Piece(0, checksum.offset, 0, 0)])
        try:
            verdict.bytes_read += single.verify(store)
        except (ContentError, NotFoundError) as error:
            verdict.findings.append(Finding("checksum", checksum.object, _bare(error, store)))
    return verdict


def _bare(error: UcpError, store: Store) -> str:
    """The message without the URL of the store, which the reader knows."""
    return error.message.removeprefix(f"{store.url}/")
