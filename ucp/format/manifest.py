"""The manifest: everything about a checkpoint but its bytes, as ``attributes.ucp`` of the root group.

Normative text: spec/universal-format.md, "Manifest"; schema: spec/universal-manifest.schema.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from ucp.catalog import Catalog, ParamGroup, ProgramRecord, Source
from ucp.errors import CorruptError, UsageError
from ucp.format import parse
from ucp.format.documents import Json, canonical
from ucp.format.pool import SHARED_VERSION
from ucp.format.records import Array, File, Places, Record
from ucp.format.state import Decoder, Encoder
from ucp.lang import to_json
from ucp.lang.identity import identity
from ucp.layout import Mesh
from ucp.plan import BLOCK_BYTES

FAMILY = "universal"
_MEMBERS = frozenset(
    "format version id created_by generation step block_bytes source tensors ties program param_groups notes state "
    "files crc32c".split()
)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a rewrite of a universal checkpoint keeps as it is.

    The original `source`, unknown members of the manifest and of each tensor, foreign attributes of the root group.
    """

    source: Json | None = None
    manifest: Json = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    attributes: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read and found consistent. `state` and `param_groups` are still encoded."""

    raw: Json
    records: tuple[Record, ...]
    files: Mapping[str, File]
    step: int | None
    block_bytes: int
    mesh: Mesh
    detail: Mapping[str, Any]
    ties: Mapping[str, str]
    notes: tuple[str, ...]
    program: ProgramRecord | None = None
    places: Places = field(default_factory=Places)

    @property
    def source(self) -> Source:
        """Who wrote the checkpoint, as a catalog says it: ourselves, with the origin as detail."""
        origin = {"origin": self.raw["source"]["family"], "origin_version": self.raw["source"]["version"]}
        about = {"id": self.raw.get("id"), "created_by": self.raw.get("created_by")}
        return Source(FAMILY, self.raw["version"], self.mesh, {**origin, **about, **self.detail})

    def kept(self, attributes: Json) -> Kept:
        """What a rewrite must keep."""
        extra = {key: value for key, value in self.raw.items() if key not in _MEMBERS}
        tensors = {record.tensor.name: record.extra for record in self.records if record.extra}
        others = {key: value for key, value in attributes.items() if key != "ucp"}
        return Kept(self.raw["source"], extra, tensors, others)

    def param_groups(self, decoder: Decoder, *, where: str) -> tuple[ParamGroup, ...]:
        """The parameter groups."""
        groups = []
        for doc in parse.items(self.raw, "param_groups", dict, where):
            params = tuple(parse.items(doc, "params", str, where))
            options = decoder.decode(parse.member(doc, "options", dict, where), where=where)
            groups.append(ParamGroup(params, parse.member({"options": options}, "options", dict, where)))
        return tuple(groups)


def read_manifest(raw: Json, *, where: str) -> Manifest:
    """Check `raw`; FitError for a newer major version, CorruptError for whatever is wrong."""
    parse.check_version(raw, where=where)
    block_bytes = parse.block_bytes(raw, where)
    places = parse.places(raw, where)
    records = tuple(
        parse.record(doc, _INERT, block_bytes, where, places) for doc in parse.items(raw, "tensors", dict, where)
    )
    files = parse.files(raw, where)
    names = [record.tensor.name for record in records]
    parse.check_unique(names, "tensor", where=where)
    paths = [array.path for record in records for array in record.arrays]
    parse.check_unique([path.lower() for path in paths], "array", where=where)
    ties = dict(parse.members(raw, "ties", str, where))
    parse.check_ties(ties, names, where=where)
    source = parse.member(raw, "source", dict, where)
    parse.text(source, "family", where)
    parse.text(source, "version", where)
    step = None if raw.get("step") is None else parse.natural(raw, "step", where)
    notes = tuple(parse.items(raw, "notes", str, where))
    detail = _INERT.decode(parse.member(source, "detail", dict, where), where=where)
    program = _read_program(raw["program"], where) if "program" in raw else None
    mesh = _mesh(source, where)
    return Manifest(raw, records, files, step, block_bytes, mesh, detail, ties, notes, program, places)


def _read_program(doc: object, where: str) -> ProgramRecord:
    record = parse.member({"program": doc}, "program", dict, where)
    where = f"{where}: program"
    return ProgramRecord(
        parse.member(record, "ast", dict, where),
        _mesh(record, where),
        {name: parse.natural({name: size}, name, where) for name, size in parse.members(record, "sizes", int, where)},
        dict(parse.members(record, "flags", bool, where)),
    )


def _no_tensor(_: object) -> bytes:
    raise CorruptError("a tensor has no place among plain values")


_PLAIN = Encoder(_no_tensor)
_INERT = Decoder({}, _no_tensor)


def _mesh(source: Json, where: str) -> Mesh:
    axes = []
    for pair in parse.items(source, "mesh", list, where):
        if len(pair) != 2:
            raise CorruptError(f"{where}: {pair!r} is no mesh axis")
        doc = {"axis": pair[0], "size": pair[1]}
        axes.append((parse.text(doc, "axis", where), parse.natural(doc, "size", where)))
    try:
        return Mesh(tuple(axes))
    except UsageError as error:
        raise CorruptError(f"{where}: {error}") from error


def make_manifest(
    catalog: Catalog,
    records: Sequence[Record],
    files: Iterable[File],
    *,
    groups: list[Json],
    digests: bytes,
    places: Places,
) -> Json:
    """The manifest of `catalog` laid out as `records`, without its own digest; `groups` are the encoded param groups.

    The same content gives the same manifest but for where things lie: ``id`` is made from content, and there is no time
    in it.
    """
    kept = keeps(catalog)
    content: Json = {
        "format": FAMILY,
        "version": SHARED_VERSION if places.generation or _shares(records) else "1.0",
        "step": catalog.step,
        "block_bytes": BLOCK_BYTES,
        "source": kept.source if kept.source is not None else _source(catalog.source),
        "tensors": [_tensor(record) for record in records],
        "ties": dict(catalog.ties),
        "program": _program(catalog.program or _plain(catalog)),
        "param_groups": groups,
        "notes": list(catalog.notes),
        "state": list(catalog.state),
        "files": [{"path": file.path, "size": file.size, "crc32c": file.crc32c} for file in files],
        **kept.manifest,
    }
    head = {
        "format": FAMILY,
        "version": content["version"],
        "id": _id(_unplaced(content, places), digests),
        "created_by": _created_by(),
    }
    return {**head, **({"generation": places.generation} if places.generation else {}), **content}


def _shares(records: Sequence[Record]) -> bool:
    return any(array.shares for record in records for array in record.arrays)


def keeps(catalog: Catalog) -> Kept:
    """What a universal catalog wants kept; nothing of another family's."""
    return cast("Kept", catalog.options.get(FAMILY, Kept()))


def encode_groups(catalog: Catalog, encoder: Encoder) -> list[Json]:
    """The parameter groups; their tensors, if any, are collected by `encoder`."""
    return [
        {"params": list(group.params), "options": encoder.encode(dict(group.options), where="param_groups")}
        for group in catalog.param_groups
    ]


def _program(record: ProgramRecord) -> Json:
    mesh = [[name, size] for name, size in record.mesh.axes]
    return {"ast": dict(record.ast), "mesh": mesh, "sizes": dict(record.sizes), "flags": dict(record.flags)}


def _plain(catalog: Catalog) -> ProgramRecord:
    """What says that every tensor is itself, where no program was needed."""
    return ProgramRecord(to_json(identity(catalog.tensors)), Mesh({}))


def _source(source: Source) -> Json:
    mesh = [[name, size] for name, size in source.mesh.axes]
    detail = _PLAIN.encode(dict(source.detail), where="source")
    return {"family": source.family, "version": source.version, "mesh": mesh, "detail": detail}


def _tensor(record: Record) -> Json:
    tensor = record.tensor
    found: Json = {"name": tensor.name, "kind": tensor.kind}
    if tensor.dims is not None:
        found["dims"] = list(tensor.dims)
    found["arrays"] = [_array(array) for array in record.arrays]
    if tensor.scalars:
        found["scalars"] = {
            key: {"value": _PLAIN.encode(scalar.value), "dtype": scalar.dtype} for key, scalar in tensor.scalars.items()
        }
    if tensor.undecided is not None:
        found["undecided"] = tensor.undecided
    return found | dict(record.extra)


def _array(array: Array) -> Json:
    objects = [
        {
            "size": shard.size,
            "data": shard.data,
            "header_crc32c": shard.header,
            "index_crc32c": shard.index,
            "blocks_crc32c": shard.blocks,
            **({"shared": shard.shared} if shard.shared else {}),
        }
        for shard in array.shards
    ]
    return {
        "path": array.path,
        "dtype": array.grid.dtype,
        "shape": list(array.grid.shape),
        "states": list(array.states),
        "chunk": list(array.grid.chunk),
        "rows": array.grid.rows,
        "objects": objects,
    }


def _unplaced(content: Json, places: Places) -> Json:
    """`content` as it would be without a generation: where a checkpoint lies does not make it another one."""
    if not places.generation:
        return content
    tensors = [
        {**tensor, "arrays": [{**array, "path": places.plain(array["path"])} for array in tensor["arrays"]]}
        for tensor in content["tensors"]
    ]
    files = [{**file, "path": places.plain(file["path"])} for file in content["files"]]
    version = SHARED_VERSION if any("shared" in row for row in _rows(content)) else "1.0"
    return {**content, "version": version, "tensors": tensors, "files": files}


def _rows(content: Json) -> Iterator[Json]:
    return (row for tensor in content["tensors"] for array in tensor["arrays"] for row in array["objects"])


def _id(content: Json, digests: bytes) -> str:
    """A UUID (RFC 9562, version 8) of everything the checkpoint holds."""
    number = int.from_bytes(hashlib.sha256(canonical(content) + digests).digest()[:16])
    number = number & ~(0xF << 76) | 0x8 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _created_by() -> str:
    try:
        return f"ucp {version('universal-checkpoint')}"
    except PackageNotFoundError:
        return "ucp"
