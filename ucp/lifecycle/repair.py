"""Repair a damaged checkpoint of ours from what it holds itself, from copies, and from others with the same bytes.

Nothing is believed: bytes are taken where they agree with the digest that the damaged checkpoint itself recorded. An
object is never changed in place, but replaced by a whole one, which is read back; the root comes last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from ucp.catalog import Checksum
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.format.pool import with_shared
from ucp.lifecycle.contents import OWN
from ucp.lifecycle.damage import Damage, by_object, examine, right_file
from ucp.lifecycle.foreign import foreign_form
from ucp.lifecycle.form import Form, form_at
from ucp.lifecycle.origins import Offer, Origin, Search
from ucp.lifecycle.rewrite import put_small, rewrite
from ucp.lifecycle.stream import OnProgress, Reader
from ucp.run.claim import claim_of
from ucp.run.crc import crc
from ucp.run.executor import as_finished, default_workers
from ucp.run.progress import Counter
from ucp.store import Store, open_store

ITSELF = "the checkpoint itself"


@dataclass(frozen=True, slots=True)
class Repaired:
    """An object that was put right, or can be: what was wrong, how many bytes were taken, and from where."""

    path: str
    kind: str
    nbytes: int
    origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """An object that cannot be put right, or not wholly: what is wrong, and of how many bytes nobody has the right."""

    path: str
    kind: str
    nbytes: int


@dataclass(slots=True)
class RepairReport:
    """What a repair found and did. `objects` were looked at; with `dry_run`, nothing was written.

    `notes` say which of the other checkpoints were of no use, and why.
    """

    url: str
    family: str
    dry_run: bool
    objects: int = 0
    bytes_read: int = 0
    repaired: list[Repaired] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is whole now, or would be."""
        return not self.lost


def repair(
    url: str,
    *,
    copies: Sequence[str] = (),
    dry_run: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> RepairReport:
    """Find what is damaged, cut short or missing in the checkpoint at `url`, and put it right.

    The universal and the native form digest every byte. Of other families, what ``ucp-copy.json`` of a copy notes can
    be put right, else what their files digest themselves. Everything is read and set against the digests. What fails is
    taken, block by block, from what the checkpoint holds elsewhere, then from `copies`: copies of it, or any other
    checkpoints, such as those of earlier steps, that hold the same bytes of the same tensors; in this order. With
    `dry_run` nothing is written. What could not be repaired is in `lost` of the report.

    NotFoundError where there is no checkpoint, or no way to tell which one it was; UsageError for a copy that is the
    checkpoint itself; what reading the copies raises; StorageError.
    """
    store = open_store(url)
    origins = [Origin(copy) for copy in copies]
    for origin in origins:
        if store.overlaps(origin.store):
            raise UsageError(f"{origin.url}: is the checkpoint itself, or lies in it", hint="name another copy")
    start = time.perf_counter()
    with ExitStack() as stack:
        if not dry_run:
            if not store.children():
                raise NotFoundError(f"{store.url}: no such folder, or it is empty")
            stack.enter_context(store.exclusive())
            store.tidy()
        found = _Repair(url, store, origins, dry_run, workers or default_workers(), on_progress).run()
    found.seconds = time.perf_counter() - start
    return found


class _Repair:
    """One repair."""

    def __init__(
        self, url: str, store: Store, origins: list[Origin], dry_run: bool, workers: int, on_progress: OnProgress | None
    ) -> None:
        self.url, self.store, self.origins, self.dry_run = url, store, origins, dry_run
        self.workers, self.on_progress = workers, on_progress
        self.small: dict[str, bytes] = {}

    def run(self) -> RepairReport:
        """Find the root, then what it names; put things right in the other order."""
        form, adopted = self._form()
        self.report = RepairReport(self.store.url, form.family, self.dry_run, objects=len(form.files) + bool(form.root))
        self.report.notes += [f"{origin.url}: {origin.note}" for origin in self.origins if origin.note]
        self.whole = with_shared(self.store, form.sizes)
        self._small_files(form)
        self._large(form)
        if adopted is not None:
            self._root(form, adopted)
        return self.report

    def _form(self) -> tuple[Form, str | None]:
        """What should be there; and if the root is to be replaced, whose it is."""
        if not any(self.store.exists(root) for root in OWN.values()) and not any(one.form for one in self.origins):
            return foreign_form(self.store, self.url), None
        try:
            return form_at(self.store), None
        except (CorruptError, NotFoundError) as error:
            if claim_of(self.store) is not None:
                raise NotFoundError(
                    f"{self.store.url}: was never finished", hint="run the command that wrote it again: it resumes"
                ) from error
            for origin in self.origins:
                if origin.form is not None and self._is_of(origin.form):
                    return origin.form, origin.url
            raise NotFoundError(
                f"{self.store.url}: its root cannot be read, and no copy proves to be one of it ({error.message})",
                hint="a copy proves it where its root has the same id, or where everything else is equal",
            ) from error

    def _is_of(self, form: Form) -> bool:
        """Whether the copy whose root this is is one of what lies here: by its id, or because all else is equal."""
        path = form.root_path
        if self.store.exists(path) and f'"{form.id}"'.encode() in self.store.read(path):
            return True
        if any(right_file(self.store, path, file) is None for path, file in form.files.items()):
            return False
        digests = b"" if form.digests is None else self.store.read(form.digests)
        checksums = by_object(form.checksums(digests))
        store = with_shared(self.store, form.sizes)
        with closing(Reader(store, threads=2, ahead=1)) as reader:
            return not any(
                examine(reader, path, size, checksums.get(path, ()), lambda _: None)
                for path, size in form.sizes.items()
            )

    def _small_files(self, form: Form) -> None:
        for path, file in form.files.items():
            self.report.bytes_read += file.size
            if right_file(self.store, path, file) is not None:
                continue
            kind = "damaged" if self.store.exists(path) else "missing"
            for origin, data in self._candidates(form, path):
                if (len(data), crc("crc32c", data)) == (file.size, file.crc32c):
                    self.small[path] = data
                    self.report.repaired.append(Repaired(path, kind, file.size, (origin,)))
                    if not self.dry_run:
                        put_small(self.store, path, data)
                    break
            else:
                self.report.lost.append(Lost(path, kind, file.size))

    def _candidates(self, form: Form, path: str) -> Iterator[tuple[str, bytes]]:
        if path in form.made:
            yield ITSELF, form.made[path]
        if path == form.digests and (data := form.gathered(self.whole)) is not None:
            yield ITSELF, data
        for origin in self.origins:
            if (data := origin.file(form.roles[path], form.files[path])) is not None:
                yield origin.url, data

    def _large(self, form: Form) -> None:
        digests = b""
        if form.digests is not None:
            if any(lost.path == form.digests for lost in self.report.lost):
                self.report.notes.append(f"without {form.digests} nobody can tell which bytes of tensors are right")
                return
            digests = self.small.get(form.digests) or self.store.read(form.digests)
        every = form.checksums(digests)
        checksums = by_object(every)
        search = Search(self.whole, form, self.origins, form.literals(every))
        self.report.objects += len(form.sizes)
        with closing(Reader(self.whole, threads=self.workers, ahead=1)) as reader:
            for damage in self._damaged(reader, form, checksums):
                self._put_right(reader, damage, search)

    def _damaged(self, reader: Reader, form: Form, checksums: Mapping[str, Sequence[Checksum]]) -> list[Damage]:
        """What is wrong with large objects; all are read."""
        counter = Counter(sum(form.sizes.values()), len(form.sizes))
        found = []
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ucp-repair") as pool:
            futures = [
                pool.submit(examine, reader, path, size, checksums.get(path, ()), counter.advance)
                for path, size in form.sizes.items()
            ]
            try:
                for future in as_finished(futures):
                    if future is not None:
                        counter.finish_object()
                        found.append(future.result())
                    if self.on_progress is not None:
                        self.on_progress(counter.progress())
            except BaseException:
                counter.stop()
                pool.shutdown(cancel_futures=True)
                raise
        self.report.bytes_read += counter.bytes_done
        return sorted((damage for damage in found if damage is not None), key=lambda damage: damage.path)

    def _put_right(self, reader: Reader, damage: Damage, search: Search) -> None:
        offers: dict[int, Offer] = {}
        lost = 0
        for span in damage.spans:
            offer = search.find(span)
            if offer is None:
                lost += span.length
            else:
                offers[span.offset] = offer
        lost = lost if damage.provable else damage.size
        if lost:
            self.report.lost.append(Lost(damage.path, damage.kind, lost))
            return
        if not self.dry_run:
            rewrite(reader, damage, offers)
        origins = tuple(dict.fromkeys(offer.origin for offer in offers.values()))
        nbytes = sum(span.length for span in damage.spans)
        self.report.repaired.append(Repaired(damage.path, damage.kind, nbytes, origins or (ITSELF,)))

    def _root(self, form: Form, origin: str) -> None:
        """The root makes it a checkpoint again, so it comes last, and only if all else is whole."""
        path = form.root_path
        entry = self.store.entry(path) if self.store.exists(path) else None
        kind = "missing" if entry is None else "damaged"
        if self.report.lost:
            self.report.lost.append(Lost(path, kind, len(form.root)))
            return
        if not self.dry_run:
            mark = None if entry is None else entry.fingerprint
            self.store.put(path, form.root, if_absent=entry is None, if_match=mark)
        self.report.repaired.append(Repaired(path, kind, len(form.root), (origin,)))


__all__ = ["Lost", "RepairReport", "Repaired", "repair"]
