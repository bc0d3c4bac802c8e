"""Where right bytes come from: each offer is proved by the digest that the damaged checkpoint itself recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ucp.catalog import Catalog, Checksum
from ucp.converter import find_converter
from ucp.errors import ContentError, FitError, NotFoundError
from ucp.format.pool import with_shared
from ucp.format.records import File
from ucp.layout import Box, FlatRange
from ucp.lifecycle.contents import OWN
from ucp.lifecycle.damage import right_file
from ucp.lifecycle.form import Form, Literal, form_at
from ucp.plan import Cover, Fragment, Key
from ucp.run.crc import crc
from ucp.run.gather import read_region
from ucp.store import Store

PIECE_BYTES = 8 << 20
"""Most bytes of a span that are held at a time."""

Fetch = Callable[[], Iterator[memoryview]]
"""Gives the bytes of a span, a piece at a time."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Bytes for a span that agree with its digest, and whose they are: the URL of a copy, or a word."""

    origin: str
    fetch: Fetch


class Origin:
    """A copy or an older checkpoint, of any family, damaged itself perhaps; `note` says why it is of no use."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.note = ""
        self.form: Form | None = None
        self.catalog: Catalog | None = None
        found, store = find_converter(url)
        self.family, self.store = found.family, store
        try:
            if found.family in OWN:
                self.form = form_at(store)
                self.store = with_shared(store, self.form.sizes)
            else:
                self.catalog = found.read(store)
        except (ContentError, FitError, NotFoundError) as error:
            self.note = error.message

    def file(self, role: str, file: File) -> bytes | None:
        """The small object of that role, if this has the bytes that `file` digests."""
        if self.form is None:
            return None
        for path, other in self.form.files.items():
            if self.form.roles[path] == role and (other.size, other.crc32c) == (file.size, file.crc32c):
                return right_file(self.store, path, file)
        return None

    def same_object(self, span: Checksum) -> Fetch | None:
        """The bytes at the same place of an object of the same name."""

        def fetch() -> Iterator[memoryview]:
            for at in range(0, span.length, PIECE_BYTES):
                length = min(PIECE_BYTES, span.length - at)
                yield memoryview(self.store.read(span.object, span.offset + at, length))

        return fetch if self.store.exists(span.object) else None

    def cover(self, key: Key, like: object) -> Cover | None:
        """Where the state `key` lies here, if it has the shape and dtype of `like`."""
        try:
            if self.form is not None:
                if self.form.specs.get(key) != like:
                    return None
                return Cover.of(key, self.form.specs[key], self.form.fragments[key])
            if self.catalog is None or self.catalog.tensors[key.name].states.get(key.state) != like:
                return None
            return self.catalog.cover(*key)
        except (KeyError, FitError, NotFoundError):
            return None


class Search:
    """Finds bytes for spans of a damaged checkpoint in `store`: what it tells itself, then copies in their order."""

    def __init__(self, store: Store, form: Form, origins: Sequence[Origin], literals: Iterable[Literal]) -> None:
        self.store, self.form, self.origins = store, form, origins
        self._literals = {(path, offset): data for path, offset, data in literals}
        self._held: dict[str, list[tuple[Key, Fragment]]] = defaultdict(list)
        for key, fragments in form.fragments.items():
            for fragment in (one for one in fragments if one.extent.is_contiguous):
                self._held[fragment.extent.object].append((key, fragment))

    def find(self, span: Checksum) -> Offer | None:
        """The first offer that agrees with the digest of `span`."""
        for origin, fetch in self._offers(span):
            if agrees(span, fetch):
                return Offer(origin, fetch)
        return None

    def _offers(self, span: Checksum) -> Iterator[tuple[str, Fetch]]:
        data = self._literals.get((span.object, span.offset))
        if data is not None and len(data) == span.length:
            yield "the manifest", lambda: iter([memoryview(data)])
        for replica in self._replicas(span):
            yield f"its replica in {replica.extent.object}", _extent(self.store, replica)
        for origin in self.origins:
            if (same := origin.same_object(span)) is not None:
                yield origin.url, same
            if (meant := self._by_meaning(origin, span)) is not None:
                yield origin.url, meant

    def _replicas(self, span: Checksum) -> Iterator[Fragment]:
        """Other places in the checkpoint that keep what the span holds, all of it and no more."""
        for key, fragment in self._held[span.object]:
            if (fragment.extent.offset, fragment.extent.nbytes) == (span.offset, span.length):
                held = (one for one in self.form.fragments[key] if one.region == fragment.region)
                yield from (one for one in held if one is not fragment and one.extent.is_contiguous)

    def _by_meaning(self, origin: Origin, span: Checksum) -> Fetch | None:
        """The elements that the span holds, wherever they lie in another checkpoint."""
        for key, fragment in self._held[span.object]:
            start, stop = fragment.extent.span
            if start <= span.offset and span.offset + span.length <= stop:
                cover = origin.cover(key, self.form.specs[key])
                if cover is None:
                    return None
                return _elements(origin.store, cover, fragment, span)
        return None


def agrees(span: Checksum, fetch: Fetch) -> bool:
    """Whether the bytes that `fetch` gives are those of the digest; what cannot be read does not agree."""
    value = length = 0
    try:
        for data in fetch():
            value, length = crc(span.algorithm, data, value), length + len(data)
    except (ContentError, NotFoundError, FitError):
        return False
    return (length, value) == (span.length, span.value)


def _extent(store: Store, fragment: Fragment) -> Fetch:
    at = fragment.extent

    def fetch() -> Iterator[memoryview]:
        for start in range(0, at.nbytes, PIECE_BYTES):
            yield memoryview(store.read(at.object, at.offset + start, min(PIECE_BYTES, at.nbytes - start)))

    return fetch


def _elements(store: Store, cover: Cover, fragment: Fragment, span: Checksum) -> Fetch:
    """The bytes of `span`, which lie inside the extent of `fragment`, from where `cover` has its region."""
    at, width = span.offset - fragment.extent.offset, fragment.extent.itemsize

    def fetch() -> Iterator[memoryview]:
        region = fragment.region
        if isinstance(region, FlatRange):
            first, last = at // width, -(-(at + span.length) // width)
            data = read_region(store, cover, FlatRange(region.start + first, last - first))
            yield data.data[at - first * width :][: span.length]
            return
        # A box of which the span holds some rows, or parts of them, in C order.
        row = max(1, region.size // max(1, region.shape[0])) * width if region.shape else width
        first, last = at // row, -(-(at + span.length) // row)
        data = read_region(store, cover, _rows(region, first, last))
        yield data.data[at - first * row :][: span.length]

    return fetch


def _rows(box: Box, first: int, last: int) -> Box:
    if not box.shape:
        return box
    return Box((box.start[0] + first, *box.start[1:]), (last - first, *box.shape[1:]))


__all__ = ["Fetch", "Offer", "Origin", "Search", "agrees"]
