"""The manifest of the native distributed form, ``ucp.json``: what each rank's shards hold, as pure data.

Normative text: spec/shard-format.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from crc32c import crc32c

from ucp.catalog import Checksum, Kind, Scalar, Source, Tensor
from ucp.errors import CorruptError, FitError, UsageError
from ucp.format import parse
from ucp.format.documents import Json, canonical, compact, parsed
from ucp.format.pool import SHARED_VERSION, name_in, path_of, shared_name
from ucp.format.records import File
from ucp.format.spreads import Chain, Tables, tables
from ucp.format.state import Blob, Decoder, Encoder
from ucp.layout import Box, Mesh, itemsize
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Extent, Fragment, Key, TensorSpec

FAMILY = "native"
FORM = "distributed"
ROOT = "ucp.json"
"""The root object, put last: a folder without it is no checkpoint."""

VERSION = (1, 1)
"""Newest major and minor version of the format that is known here; 1.0 is written where nothing is shared."""

BLOCK_BYTES = 4 << 20
"""Bytes per digest block of a fragment; part of the format, so it never changes within a major version."""

_KINDS = ("parameter", "frozen", "buffer")
_SHARD = re.compile(r"shards/[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_BLOBS = re.compile(r"state/blobs(-[A-Za-z0-9]{1,32})?\.safetensors")
_OURS = re.compile(r"shards/rank-\d{5,}-\d+(-[0-9a-f]{8})?\.safetensors|state/blobs(-[0-9a-f]{8})?\.safetensors")


def blobs_path(tag: str) -> str:
    """Where a save of that tag puts the tensors of its training state."""
    return f"state/blobs-{tag}.safetensors"


def is_ours(path: str) -> bool:
    """Whether only a save can have put the object at `path` there."""
    return _OURS.fullmatch(path) is not None


@dataclass(frozen=True, slots=True)
class Shard:
    """One object: its size, the byte where data begins, and the crc32c of what is before.

    Its path is that of a file in ``shards/``, or tells its name in the pool of the run (`ucp.format.pool`).
    """

    path: str
    size: int
    data: int
    header: int


@dataclass(frozen=True, slots=True)
class Part:
    """`box` of one state of one tensor lies at byte `offset` of object `path`; `crc32c` of each block of its bytes."""

    box: Box
    path: str
    offset: int
    crc32c: tuple[int, ...]

    def fragment(self, dtype: str) -> Fragment:
        """The same as a fragment."""
        return Fragment(self.box, Extent.contiguous(self.path, self.offset, self.box.shape, dtype))

    def checksums(self, nbytes: int) -> Iterator[Checksum]:
        """One checksum per block of the part's `nbytes` bytes."""
        for number, value in enumerate(self.crc32c):
            at = number * BLOCK_BYTES
            yield Checksum(self.path, self.offset + at, min(BLOCK_BYTES, nbytes - at), "crc32c", value)


@dataclass(frozen=True, slots=True)
class NativeManifest:
    """A manifest. `groups`, `state` and `blobs` are encoded as spec/universal-format.md says under "Trees".

    `spreads` says how tensors lay on the job's meshes. It is written for people and tools, and not read back.
    """

    id: str
    created_by: str
    step: int | None
    source: Source
    shards: tuple[Shard, ...]
    tensors: tuple[Tensor, ...]
    parts: Mapping[Key, tuple[Part, ...]]
    ties: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[Json] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    blobs: Mapping[str, Json] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)
    spreads: Mapping[str, Sequence[Chain]] = field(default_factory=dict)

    def checksums(self) -> Iterator[Checksum]:
        """A checksum over every byte of every object."""
        for shard in self.shards:
            yield Checksum(shard.path, 0, shard.data, "crc32c", shard.header)
        for tensor in self.tensors:
            for state, spec in tensor.states.items():
                for part in self.parts[Key(tensor.name, state)]:
                    yield from part.checksums(part.box.size * itemsize(spec.dtype))
        for file in self.files.values():
            yield Checksum(file.path, 0, file.size, "crc32c", file.crc32c)

    def table(self, *, where: str) -> dict[str, Blob]:
        """Where the tensors of the training state lie."""
        held = next((file for path, file in self.files.items() if _BLOBS.fullmatch(path)), File("", 0, 0))
        found = {}
        for name, row in self.blobs.items():
            offset = parse.natural(row, "offset", where)
            blob = Blob(parse.dtype(row, where), parse.shape(row, "shape", where), offset, held.path)
            if blob.offset + blob.extent.nbytes > held.size:
                raise CorruptError(
                    f"{where}: a tensor reaches past the end of {held.path}", hint="do not trust this file"
                )
            found[name] = blob
        return found


def dumps(manifest: NativeManifest) -> bytes:
    """The bytes of ``ucp.json``."""
    numbers = {shard.path: number for number, shard in enumerate(manifest.shards)}
    source, record = manifest.source, tables(manifest.spreads)
    doc: Json = {
        "format": FORM,
        "version": SHARED_VERSION if any(name_in(shard.path) for shard in manifest.shards) else "1.0",
        "id": manifest.id,
        "created_by": manifest.created_by,
        "step": manifest.step,
        "source": {
            "family": source.family,
            "version": source.version,
            "mesh": [[name, size] for name, size in source.mesh.axes],
            "detail": _PLAIN.encode(dict(source.detail), where="source"),
        },
        "shards": [
            {**_place(s.path), "size": s.size, "data": s.data, "header_crc32c": s.header} for s in manifest.shards
        ],
        "meshes": record.meshes,
        "layouts": record.layouts,
        "tensors": [_tensor_doc(tensor, manifest.parts, numbers, record) for tensor in manifest.tensors],
        "ties": dict(manifest.ties),
        "param_groups": list(manifest.groups),
        "state": dict(manifest.state),
        "blobs": dict(manifest.blobs),
        "files": [{"path": f.path, "size": f.size, "crc32c": f.crc32c} for f in manifest.files.values()],
    }
    return compact({**doc, "crc32c": crc32c(canonical(doc))})


def _place(path: str) -> Json:
    shared = name_in(path)
    return {"path": path} if shared is None else {"shared": shared}


def _tensor_doc(
    tensor: Tensor, parts: Mapping[Key, tuple[Part, ...]], numbers: Mapping[str, int], record: Tables
) -> Json:
    states = {
        state: {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "fragments": [
                [numbers[part.path], part.offset, list(part.box.start), list(part.box.shape), list(part.crc32c)]
                for part in parts[Key(tensor.name, state)]
            ],
        }
        for state, spec in tensor.states.items()
    }
    scalars = {
        key: {"value": _PLAIN.encode(scalar.value), "dtype": scalar.dtype} for key, scalar in tensor.scalars.items()
    }
    layout = {"layout": record.of[tensor.name]} if tensor.name in record.of else {}
    return {"name": tensor.name, "kind": tensor.kind, **layout, "states": states, "scalars": scalars}


def loads(data: bytes, *, where: str) -> NativeManifest:
    """Read and check ``ucp.json``; FitError for a newer major version, CorruptError for whatever is wrong."""
    doc = parsed(data, where=where)
    check_version(doc, where)
    without = {key: value for key, value in doc.items() if key != "crc32c"}
    if parse.natural(doc, "crc32c", where) != crc32c(canonical(without)):
        raise CorruptError(
            f"{where}: damaged, or changed after it was written", hint="restore this file from another copy"
        )
    shards = _shards(doc, where)
    tensors, parts = _tensors(doc, shards, where)
    _check_tiling(shards, parts, {t.name: t for t in tensors}, where)
    ties = dict(parse.members(doc, "ties", str, where))
    parse.check_ties(ties, [tensor.name for tensor in tensors], where=where)
    return NativeManifest(
        id=parse.text(doc, "id", where),
        created_by=parse.text(doc, "created_by", where),
        step=None if doc.get("step") is None else parse.natural(doc, "step", where),
        source=_source(parse.member(doc, "source", dict, where), where),
        shards=shards,
        tensors=tensors,
        parts=parts,
        ties=ties,
        groups=parse.items(doc, "param_groups", dict, where),
        state=parse.member(doc, "state", dict, where),
        blobs=dict(parse.members(doc, "blobs", dict, where)),
        files=parse.files(doc, where),
    )


def check_version(doc: Json, where: str) -> None:
    """FitError for a newer major version, CorruptError for what is no manifest."""
    found = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", parse.text(doc, "version", where))
    if doc.get("format") != FORM or found is None:
        raise CorruptError(f"{where}: no distributed checkpoint of a known version")
    if int(found[1]) > VERSION[0]:
        raise FitError(
            f"{where}: has format version {doc['version']}; this ucp reads up to {'.'.join(map(str, VERSION))}",
            hint="upgrade: pip install -U universal-checkpoint",
        )


def _source(doc: Json, where: str) -> Source:
    pairs = parse.items(doc, "mesh", list, where)
    if any(len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int for pair in pairs):
        raise CorruptError(f"{where}: {pairs!r} is no mesh"[:300])
    try:
        mesh = Mesh(tuple((name, size) for name, size in pairs))
    except UsageError as error:
        raise CorruptError(f"{where}: {error}") from error
    detail = _INERT.decode(parse.member(doc, "detail", dict, where), where=where)
    return Source(parse.text(doc, "family", where), parse.text(doc, "version", where), mesh, detail)


def _shards(doc: Json, where: str) -> tuple[Shard, ...]:
    found = []
    for row in parse.items(doc, "shards", dict, where):
        shared, size = shared_name(row, where), parse.natural(row, "size", where)
        path = parse.text(row, "path", where) if shared is None else path_of(shared)
        data = parse.natural(row, "data", where, below=size + 1)
        if shared is None and not _SHARD.fullmatch(path):
            raise CorruptError(f"{where}: {path!r} is not a path of a shard", hint="do not trust this file")
        found.append(Shard(path, size, data, parse.natural(row, "header_crc32c", where, below=2**32)))
    parse.check_unique([shard.path.lower() for shard in found], "shard", where=where)
    return tuple(found)


def _tensors(doc: Json, shards: Sequence[Shard], where: str) -> tuple[tuple[Tensor, ...], dict[Key, tuple[Part, ...]]]:
    tensors, parts = [], {}
    for row in parse.items(doc, "tensors", dict, where):
        name, kind = parse.text(row, "name", where), parse.text(row, "kind", where)
        here = f"{where}: tensor {name!r}"
        if kind not in _KINDS:
            raise CorruptError(f"{here}: unknown kind {kind!r}")
        specs = {}
        for state, held in parse.members(row, "states", dict, here):
            specs[state] = spec = TensorSpec(parse.shape(held, "shape", here), parse.dtype(held, here))
            rows = parse.items(held, "fragments", list, here)
            parts[Key(name, state)] = tuple(_part(entry, spec, shards, f"{here}[{state}]") for entry in rows)
            if sum(part.box.size for part in parts[Key(name, state)]) != spec.size:
                raise CorruptError(f"{here}[{state}]: fragments do not hold {spec.size} elements")
        scalars = {key: _scalar(held, here) for key, held in parse.members(row, "scalars", dict, here)}
        tensors.append(Tensor(name, cast("Kind", kind), specs, scalars))
    parse.check_unique([tensor.name for tensor in tensors], "tensor", where=where)
    return tuple(tensors), parts


def _part(row: list[Any], spec: TensorSpec, shards: Sequence[Shard], where: str) -> Part:
    doc = dict(zip(("object", "offset", "start", "shape", "crc32c"), row, strict=False))
    shard = shards[parse.natural(doc, "object", where, below=len(shards))]
    start, shape = parse.shape(doc, "start", where), parse.shape(doc, "shape", where)
    offset, digests = parse.natural(doc, "offset", where), parse.items(doc, "crc32c", int, where)
    if len(start) != len(shape) or not Box(start, shape).within(spec.shape) or not Box(start, shape).size:
        raise CorruptError(f"{where}: {row!r} is no box of {list(spec.shape)}"[:300], hint="do not trust this file")
    box, nbytes = Box(start, shape), Box(start, shape).size * itemsize(spec.dtype)
    if len(digests) != -(-nbytes // BLOCK_BYTES) or any(not 0 <= value < 2**32 for value in digests):
        raise CorruptError(f"{where}: {len(digests)} digests for {nbytes} bytes")
    if offset < shard.data or offset + nbytes > shard.size:
        raise CorruptError(f"{where}: reaches out of {shard.path}", hint="do not trust this file")
    return Part(box, shard.path, offset, tuple(digests))


def _scalar(doc: Json, where: str) -> Scalar:
    value, kind = _INERT.decode(doc.get("value"), where=where), parse.text(doc, "dtype", where)
    if not isinstance(value, int | float) or kind not in (*ITEMSIZE, "int", "float", "bool"):
        raise CorruptError(f"{where}: {value!r} is no scalar of dtype {kind}"[:300])
    return Scalar(value, kind)


def _check_tiling(
    shards: Sequence[Shard], parts: Mapping[Key, tuple[Part, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """CorruptError unless the parts of each shard follow each other without gap: then every byte is digested."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for key, held in parts.items():
        width = itemsize(tensors[key.name].states[key.state].dtype)
        for part in held:
            spans[part.path].append((part.offset, part.offset + part.box.size * width))
    for shard in shards:
        end = shard.data
        for start, stop in [*sorted(spans[shard.path]), (shard.size, shard.size)]:
            if start != end:
                raise CorruptError(f"{where}: {shard.path} has a gap or an overlap at byte {min(start, end)}")
            end = stop


def _no_tensor(_: object) -> bytes:
    raise CorruptError("a tensor has no place among plain values")


_PLAIN = Encoder(_no_tensor)
_INERT = Decoder({}, _no_tensor)
