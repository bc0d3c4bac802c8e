"""Tensors laid out in safetensors files: which file holds what, in which order, under which header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ucp.errors import FitError
from ucp.format.shard import framed
from ucp.layout import FlatRange
from ucp.layout.dtypes import SAFETENSORS
from ucp.plan import BLOCK_BYTES, Cover, Digests, Section, Task, TensorSpec, Witness

_ORDER = (
    "uint64 int64 float64 complex64 float32 uint32 int32 bfloat16 float16 uint16 int16 "
    "float8_e4m3fn float8_e5m2 int8 uint8 bool"
).split()
"""Dtypes in the order in which safetensors lays tensors out (safetensors/src/tensor.rs, ``Dtype``)."""


_RESERVED = "__metadata__"
"""What a header says of the file itself (safetensors, README, "Format")."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to be written under `name`, in `dtype`."""

    name: str
    cover: Cover
    dtype: str
    witness: Witness | None = None

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype as written."""
        return TensorSpec(self.cover.spec.shape, self.dtype)


def split(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """Items by file, in order: a file is closed when the next tensor would make it larger than `shard_bytes`.

    A tensor that is larger has a file of its own (huggingface_hub/serialization/_base.py). Always one file at least.
    """
    files: list[list[Item]] = []
    current: list[Item] = []
    held = 0
    for item in items:
        size = item.spec.nbytes
        if size > shard_bytes:
            files.append([item])
            continue
        if current and held + size > shard_bytes:
            files.append(current)
            current, held = [], 0
        current.append(item)
        held += size
    return [*files, current] if current or not files else files


def file_names(name: str, count: int) -> list[str]:
    """Names of `count` files of what would be `name` in one file (huggingface_hub, ``filename_pattern``)."""
    stem, _, ending = name.rpartition(".")
    return [name] if count == 1 else [f"{stem}-{k:05d}-of-{count:05d}.{ending}" for k in range(1, count + 1)]


@dataclass(frozen=True)
class SafetensorsFrame:
    """Everything but the data of a safetensors file; implements `ucp.plan.Frame`.

    `entries` are (name, dtype, shape) in order of position.
    """

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES

    @property
    def needs_crc32(self) -> bool:
        """No: the format keeps no digests."""
        return False

    @cached_property
    def header(self) -> bytes:
        """The header with its length, padded to a multiple of 8."""
        described: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        position = 0
        for name, dtype, shape in self.entries:
            end = position + TensorSpec(shape, dtype).nbytes
            described[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        return framed(described, align=8)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(TensorSpec(shape, dtype).nbytes for _, dtype, shape in self.entries)

    def literals(self) -> Iterator[tuple[int, bytes]]:
        """The header."""
        yield 0, self.header

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        """Nothing: the data ends the file."""
        del digests
        return self.size, b""


def file_task(path: str, items: Sequence[Item], metadata: Mapping[str, str]) -> Task:
    """The task that writes `items` into one file, laid out as the safetensors library does.

    FitError for the one name that the format keeps for itself.
    """
    if any(item.name == _RESERVED for item in items):
        raise FitError(f"{_RESERVED}: no tensor in a safetensors file can have this name", hint="rename it")
    ordered = sorted(items, key=lambda item: (_ORDER.index(item.dtype), item.name.encode()))
    frame = SafetensorsFrame(tuple((item.name, item.dtype, item.spec.shape) for item in ordered), metadata)
    position, sections = len(frame.header), []
    for item in ordered:
        region = FlatRange(0, item.spec.size)
        sections.append(Section(position, region, item.cover, item.witness, item.dtype))
        position += item.spec.nbytes
    return Task(path, frame.size, frame, tuple(sections))
