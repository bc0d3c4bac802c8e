"""A folder that ``torch.distributed.checkpoint`` loads: ``__{rank}_0.distcp`` as tasks, and ``.metadata``.

What is laid out is given as entries (tensors, cut into chunks that say which bytes fill them) and blobs (anything else,
pickled already). Chunks and blobs are dealt to files by number; the file's name, as torch's own, says by which rank it
would have been written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ucp.container.distcp import DistcpFrame, TensorItem
from ucp.container.torchwrite import dumps
from ucp.errors import FitError
from ucp.layout import FlatRange, Shape, itemsize, numel
from ucp.plan import Cover, Extent, Section, Task, TensorSpec, Witness
from ucp.tree import TensorLeaf, Tree

from .describe import BlobRecord, Place, Plain, TensorRecord, describe

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Run:
    """Elements `region`, C order, of a source's tensor, to be written in `dtype` (empty: in the cover's own)."""

    cover: Cover
    region: FlatRange
    witness: Witness | None = None
    dtype: str = ""

    @classmethod
    def whole(cls, cover: Cover, *, witness: Witness | None = None, dtype: str = "") -> Run:
        """All of `cover`."""
        return cls(cover, FlatRange(0, cover.spec.size), witness, dtype)

    def section(self, offset: int) -> Section:
        """The section of a task at byte `offset`."""
        return Section(offset, self.region, self.cover, self.witness, self.dtype)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The box of a tensor that starts at `offsets` and has `sizes`, stored in file number `file`.

    Its bytes are those of `runs`, one after the other, or are given.
    """

    offsets: Shape
    sizes: Shape
    runs: tuple[Run, ...] | bytes
    file: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor under `key`. `aliases` are further keys of the same tensor, which is stored once."""

    key: str
    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Blob:
    """An object under `key`, as the bytes that ``torch.save`` (or whoever is to load it) makes of it."""

    key: str
    data: bytes
    file: int = 0

    @classmethod
    def of(cls, key: str, tree: Tree, *, file: int = 0, classes: Collection[str] = ()) -> Blob:
        """`tree` as ``torch.save`` would write it; its tensors must hold their bytes. UsageError as `dumps`."""
        return cls(key, dumps(tree, classes=classes), file)


@dataclass(frozen=True, slots=True)
class Folder:
    """Tasks that write the files, and the bytes of ``.metadata``, which must be put after all of them."""

    tasks: tuple[Task, ...]
    metadata: bytes = field(repr=False)


def torch_name(file: int) -> str:
    """What rank `file` calls its file."""
    return f"__{file}_0.distcp"


def lay_out(
    entries: Iterable[Entry],
    blobs: Iterable[Blob] = (),
    *,
    planner: Mapping[str, tuple[str | int, ...]] | None = None,
    extra: Mapping[str, Plain] | None = None,
    folder: str = "",
    name: Callable[[int], str] = torch_name,
) -> Folder:
    """Lay `entries` and `blobs` out in files.

    `planner` gives the path in the nested state dict that each key was flattened from; Megatron-Core has None. `extra`
    are further attributes of the pickled ``Metadata``. `folder` is the path of the folder of ``.metadata`` in the
    checkpoint, empty or ending in a slash; `name` names a file by its number. FitError where a key comes twice.
    """
    tensors, objects = list(entries), list(blobs)
    _check_keys([*(key for entry in tensors for key in (entry.key, *entry.aliases)), *(blob.key for blob in objects)])
    files: dict[int, _File] = {}
    for blob in objects:
        files.setdefault(blob.file, _File()).add(blob.data)
    for entry in tensors:
        for chunk in entry.chunks:
            files.setdefault(chunk.file, _File()).add_chunk(chunk, entry)
    frames = {number: file.frame() for number, file in sorted(files.items())}
    places = {number: _places(name(number), frame) for number, frame in frames.items()}
    # In the order in which they were dealt, so that each takes the next place of its file.
    located: list[TensorRecord | BlobRecord] = [BlobRecord(blob.key, next(places[blob.file])) for blob in objects]
    for entry in tensors:
        located.extend(_records(entry, places))
    tasks = tuple(files[number].task(folder + name(number), frame) for number, frame in frames.items())
    return Folder(tasks, describe(located, planner=planner, extra=extra))


def _places(path: str, frame: DistcpFrame) -> Iterator[Place]:
    for offset, length in frame.places:
        yield Place(path, offset, length)


def _records(entry: Entry, places: Mapping[int, Iterator[Place]]) -> Iterator[TensorRecord]:
    chunks = tuple((chunk.offsets, chunk.sizes, next(places[chunk.file])) for chunk in entry.chunks)
    for key in (entry.key, *entry.aliases):
        yield TensorRecord(key, entry.shape, entry.dtype, chunks)


def _check_keys(keys: list[str]) -> None:
    for key, times in Counter(keys).items():
        if times > 1:
            raise FitError(
                f"{key}: two things of the checkpoint would have this key",
                hint="give the model, the optimizer or the other state another prefix",
            )


class _File:
    """What is in one file, in order."""

    def __init__(self) -> None:
        self._items: list[bytes | TensorItem] = []
        self._runs: list[Run] = []

    def add(self, blob: bytes) -> None:
        self._items.append(blob)

    def add_chunk(self, chunk: Chunk, entry: Entry) -> None:
        spec = TensorSpec(chunk.sizes, entry.dtype)
        if isinstance(chunk.runs, bytes):
            self._items.append(dumps(_leaf(spec, chunk.runs)))
            return
        width = itemsize(entry.dtype)
        for run in chunk.runs:
            written = run.dtype or run.cover.spec.dtype
            assert written == entry.dtype, f"{entry.key}: {written} would be written as {entry.dtype}"
        assert sum(run.region.length for run in chunk.runs) == numel(chunk.sizes), f"{entry.key}: wrong chunk"
        self._items.append(TensorItem(spec, tuple(run.region.length * width for run in chunk.runs)))
        self._runs.extend(chunk.runs)

    def frame(self) -> DistcpFrame:
        return DistcpFrame(tuple(self._items))

    def task(self, path: str, frame: DistcpFrame) -> Task:
        sections = tuple(run.section(offset) for run, offset in zip(self._runs, frame.offsets, strict=True))
        return Task(path, frame.size, frame, sections)


def _leaf(spec: TensorSpec, data: bytes) -> TensorLeaf:
    assert len(data) == spec.nbytes, f"{len(data)} bytes are no {spec}"
    return TensorLeaf(Extent.contiguous("", 0, spec.shape, spec.dtype), inline=data)
