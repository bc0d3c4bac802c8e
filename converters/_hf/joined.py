"""Pieces of files as whole tensors with their fragments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.catalog import Kind, Tensor
from ucp.errors import ConflictError, CorruptError
from ucp.layout import Box, Shape
from ucp.plan import Cover, Extent, Fragment, Key, TensorSpec

from .pieces import File, Piece

_FLOATS = ("float", "bfloat", "complex")
_MIXED = "the folder mixes two saves, or a file is missing: copy it again from where it was written"


@dataclass(slots=True)
class Joined:
    """Tensors by name in the files' order, their fragments, and further names of the same bytes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fragments: dict[Key, tuple[Fragment, ...]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def joined(files: Sequence[File], url: str) -> Joined:
    """Every tensor of `files`.

    CorruptError for a tensor that two files hold whole, ConflictError for regions of one tensor that differ in dtype or
    in their number of dims, FitError for regions that overlap or leave a hole.
    """
    found, owners = Joined(), dict[Extent, str]()
    for name, pieces in _by_name(files).items():
        whole = pieces[0].start is None
        if whole and len(pieces) > 1:
            a, b = (piece.extent.object for piece in pieces[:2])
            raise CorruptError(f"{url}: {name} is in two files, {a} and {b}", hint=_MIXED)
        owner = owners.setdefault(pieces[0].extent, name) if pieces[0].extent.size and whole else name
        if owner != name:
            found.ties[name] = owner
            continue
        key, spec, fragments = Key(name, "value"), *_parts(name, pieces, url)
        if not whole:
            Cover.of(key, spec, fragments)
        found.tensors[name] = Tensor(name, kind_of(spec.dtype), {"value": spec})
        found.fragments[key] = fragments
    return found


def kind_of(dtype: str) -> Kind:
    """What a file without any word on it most likely holds: numbers that are no floats are never trained."""
    return "parameter" if dtype.startswith(_FLOATS) else "buffer"


def add_replicas(found: Joined, files: Sequence[File], url: str) -> None:
    """Let the same tensors in other `files` be compared with those in `found`.

    ConflictError for shapes or dtypes that differ, and for a tensor that is in one of the two only.
    """
    others = joined(files, url)
    for name in {**found.tensors, **others.tensors}:
        specs = [held.tensors[name].states["value"] if name in held.tensors else None for held in (found, others)]
        if specs[0] != specs[1]:
            told = " and ".join("missing" if s is None else f"{s.dtype} {list(s.shape)}" for s in specs)
            raise ConflictError(
                f"{url}: {name} is {told} in the whole files and in the shards they were made of",
                hint="the consolidation was cut short or is of another save: read the folder of the shards by itself",
            )
        key = Key(name, "value")
        found.fragments[key] += tuple(replace(fragment, replica=1) for fragment in others.fragments[key])


def _by_name(files: Iterable[File]) -> Mapping[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for file in files:
        for piece in file.pieces:
            found.setdefault(piece.name, []).append(piece)
    return found


def _parts(name: str, pieces: Sequence[Piece], url: str) -> tuple[TensorSpec, tuple[Fragment, ...]]:
    """The tensor that `pieces` add up to: its shape is how far they reach."""
    first = pieces[0].extent
    for piece in pieces[1:]:
        if piece.start is None or piece.extent.dtype != first.dtype or len(piece.extent.shape) != len(first.shape):
            raise ConflictError(
                f"{url}: {name} is {first.dtype} {list(first.shape)} in {first.object} "
                f"and {piece.extent.dtype} {list(piece.extent.shape)} in {piece.extent.object}",
                hint=_MIXED,
            )
    placed = [Fragment(Box(_start(piece), piece.extent.shape), piece.extent) for piece in pieces]
    return TensorSpec(_reach(pieces), first.dtype), tuple(placed)


def _reach(pieces: Sequence[Piece]) -> Shape:
    ends = [[a + n for a, n in zip(_start(piece), piece.extent.shape, strict=True)] for piece in pieces]
    return tuple(max(dims) for dims in zip(*ends, strict=True))


def _start(piece: Piece) -> Shape:
    return piece.start or (0,) * len(piece.extent.shape)
