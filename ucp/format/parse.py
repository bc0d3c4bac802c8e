"""From the manifest's JSON to records, believing nothing: types, sizes, offsets, paths and names are all checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar, cast

from ucp.catalog import Kind, Scalar, Tensor
from ucp.errors import CorruptError, FitError
from ucp.format.documents import Json
from ucp.format.grid import Grid
from ucp.format.pool import shared_name
from ucp.format.records import VERSION, Array, File, Places, Record, Shard
from ucp.format.state import Decoder
from ucp.layout import Shape, itemsize
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import TensorSpec

T = TypeVar("T")
_PART = r"[A-Za-z0-9=_-][A-Za-z0-9._=@-]{0,254}"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_PLACE = re.compile(_PART)
_KINDS = ("parameter", "frozen", "buffer")
_MOST = 2**63
_MOST_DIMS = 32

TENSOR_MEMBERS = frozenset({"name", "kind", "dims", "arrays", "scalars", "undecided"})
"""Members of a tensor that this version knows."""


def check_version(manifest: Json, *, where: str) -> None:
    """FitError if `manifest` has a newer major version, CorruptError if it has none."""
    found = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", text(manifest, "version", where))
    if manifest.get("format") != "universal" or found is None:
        raise CorruptError(f"{where}: no universal checkpoint of a known version")
    if int(found[1]) > VERSION[0]:
        ours = ".".join(map(str, VERSION))
        raise FitError(
            f"{where}: has format version {manifest['version']}; this ucp reads up to {ours}",
            hint="upgrade: pip install -U universal-checkpoint",
        )


def member(doc: Json, key: str, kind: type[T], where: str) -> T:
    """Member `key` of `doc`, which must be a `kind`; CorruptError naming `where` otherwise."""
    value = doc.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CorruptError(f"{where}: {key!r} is {value!r}, not a {kind.__name__}"[:300], hint="the file is damaged")
    return value


def text(doc: Json, key: str, where: str) -> str:
    """A member that is a string."""
    return member(doc, key, str, where)


def natural(doc: Json, key: str, where: str, *, below: int = _MOST) -> int:
    """A member that is an integer of at least 0 and less than `below`."""
    value = member(doc, key, int, where)
    if not 0 <= value < below:
        raise CorruptError(f"{where}: {key!r} is {value}, out of range", hint="the file is damaged")
    return value


def items(doc: Json, key: str, kind: type[T], where: str) -> list[T]:
    """A member that is a list of `kind`."""
    found = member(doc, key, list, where)
    for value in found:
        member({key: value}, key, kind, where)
    return cast("list[T]", found)


def members(doc: Json, key: str, kind: type[T], where: str) -> Iterator[tuple[str, T]]:
    """(name, value) of a member that is an object whose values are all `kind`."""
    found = member(doc, key, dict, where)
    for name in found:
        yield name, member(found, name, kind, where)


def shape(doc: Json, key: str, where: str) -> Shape:
    """A member that is the shape of a tensor."""
    values = items(doc, key, int, where)
    if len(values) > _MOST_DIMS or any(not 0 <= n < _MOST for n in values):
        raise CorruptError(f"{where}: {key!r} is {values[:40]}, no shape", hint="the file is damaged")
    return tuple(values)


def dtype(doc: Json, where: str) -> str:
    """Member ``dtype``, one that ucp knows."""
    found = text(doc, "dtype", where)
    if found not in ITEMSIZE:
        raise CorruptError(f"{where}: unknown dtype {found!r}")
    return found


def places(doc: Json, where: str) -> Places:
    """Where the objects of the manifest's generation lie."""
    found = text({"generation": "", **doc}, "generation", where)
    if not re.fullmatch(r"\w{0,32}", found, re.ASCII):
        raise CorruptError(f"{where}: {found!r} is no generation", hint="do not trust this file")
    return Places(found)


def record(doc: Json, decoder: Decoder, block_bytes: int, where: str, places: Places) -> Record:
    """One tensor of the manifest, whose data has digests every `block_bytes`."""
    name = text(doc, "name", where)
    where = f"{where}: tensor {name!r}"
    kind = text(doc, "kind", where)
    if kind not in _KINDS:
        raise CorruptError(f"{where}: unknown kind {kind!r}")
    arrays = tuple(_array(array, block_bytes, where, places) for array in items(doc, "arrays", dict, where))
    specs = [(state, TensorSpec(a.grid.shape, a.grid.dtype)) for a in arrays for state in a.states]
    if len(dict(specs)) != len(specs):
        raise CorruptError(f"{where}: a state is given twice")
    dims = tuple(items(doc, "dims", str, where)) if "dims" in doc else None
    held = members({"scalars": {}, **doc}, "scalars", dict, where)
    scalars = {key: _scalar(value, decoder, f"{where}: {key}") for key, value in held}
    undecided = text(doc, "undecided", where) if "undecided" in doc else None
    tensor = Tensor(name, cast("Kind", kind), dict(specs), scalars, dims, undecided)
    return Record(tensor, arrays, {key: value for key, value in doc.items() if key not in TENSOR_MEMBERS})


def _scalar(doc: Json, decoder: Decoder, where: str) -> Scalar:
    value, kind = decoder.decode(doc.get("value"), where=where), text(doc, "dtype", where)
    if not isinstance(value, int | float) or kind not in (*ITEMSIZE, "int", "float", "bool"):
        raise CorruptError(f"{where}: {value!r} is no scalar of dtype {kind}")
    return Scalar(value, kind)


def _array(doc: Json, block_bytes: int, where: str, places: Places) -> Array:
    path = text(doc, "path", where)
    where = f"{where}: array {path}"
    folder, _, name = path.partition("/")
    if folder != places.tensors or not _PLACE.fullmatch(name):
        raise CorruptError(f"{where}: not a path of an array", hint="do not trust this file")
    states = tuple(items(doc, "states", str, where))
    if not states:
        raise CorruptError(f"{where}: has no state")
    grid = _grid(doc, len(states), where)
    shards = tuple(_shard(shard, where) for shard in items(doc, "objects", dict, where))
    array = Array(path, states, grid, shards)
    if len(shards) != grid.count:
        raise CorruptError(f"{where}: lists {len(shards)} of {grid.count} objects")
    for number, shard in enumerate(shards):
        if shard.size != shard.data + grid.states * grid.run_bytes(number) + grid.index_bytes(number, block_bytes):
            raise CorruptError(f"{where}: the sizes of object {number} contradict each other")
    return array


def _grid(doc: Json, states: int, where: str) -> Grid:
    full, chunk, kind = shape(doc, "shape", where), shape(doc, "chunk", where), dtype(doc, where)
    if math.prod(max(1, n) for n in full) * itemsize(kind) * states >= _MOST:
        raise CorruptError(f"{where}: shape {list(full)} is too large", hint="do not trust this file")
    rows = natural(doc, "rows", where)
    grid = Grid(states, full, kind, chunk, rows)
    if not _divides(chunk, full) or rows < 1 or rows % (chunk[0] if chunk else 1):
        raise CorruptError(f"{where}: chunks {list(chunk)} and {rows} rows do not cut shape {list(full)}")
    return grid


def _divides(chunk: Shape, shape: Shape) -> bool:
    """Whether `chunk` is one run of bytes of a tensor of `shape` and tiles it."""
    full = tuple(max(1, n) for n in shape)
    if len(chunk) != len(shape) or any(c < 1 or n % c for c, n in zip(chunk, full, strict=True)):
        return False
    leading = next((dim for dim, c in enumerate(chunk) if c > 1), len(chunk))
    return chunk[leading + 1 :] == full[leading + 1 :]


def block_bytes(doc: Json, where: str) -> int:
    """Bytes per digest block: a multiple of 16, so that blocks never cut an element."""
    found = natural(doc, "block_bytes", where)
    if found < 16 or found % 16:
        raise CorruptError(f"{where}: digest blocks of {found} bytes")
    return found


def _shard(doc: Json, where: str) -> Shard:
    size, data = natural(doc, "size", where), natural(doc, "data", where)
    header, index, blocks = (
        natural(doc, f"{part}_crc32c", where, below=2**32) for part in ("header", "index", "blocks")
    )
    return Shard(size, data, header, index, blocks, shared_name(doc, where) or "")


def files(doc: Json, where: str) -> dict[str, File]:
    """The small files by path."""
    found = {}
    for entry in items(doc, "files", dict, where):
        path, size = text(entry, "path", where), natural(entry, "size", where)
        if not _PATH.fullmatch(path):
            raise CorruptError(f"{where}: {path!r} is not a safe path", hint="do not trust this file")
        found[path] = File(path, size, natural(entry, "crc32c", where, below=2**32))
    return found


def check_unique(names: Sequence[str], what: str, *, where: str) -> None:
    """CorruptError if a name is given twice."""
    if len(set(names)) != len(names):
        twice = next(name for name, same in groupby(sorted(names)) if len(list(same)) > 1)
        raise CorruptError(f"{where}: {what} {twice!r} is given twice", hint="do not trust this file")


def check_ties(ties: Mapping[str, Any], names: Sequence[str], *, where: str) -> None:
    """CorruptError for an alias that is a tensor's name or that leads nowhere."""
    known = set(names)
    for alias, name in ties.items():
        if alias in known or name not in known:
            raise CorruptError(f"{where}: tie {alias!r} to {name!r} does not fit the tensors")
