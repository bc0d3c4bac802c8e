"""The tensor-parallel ranks of a DeepSpeed checkpoint as one catalog, by the program that its metadata amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ucp.catalog import Catalog
from ucp.converter import Sharded
from ucp.errors import ConflictError, FitError
from ucp.layout import FlatRange
from ucp.mapping import consolidate
from ucp.run.gather import read_region
from ucp.store import Store

from .info import INFO, PROGRAM_HINT, Info, Parameter, info_of, read_info
from .load import MIXED_HINT
from .translate import Translation, translate

_SAMPLE = 64


def join(store: Store, sharded: Sharded, *, strict: bool = True) -> Catalog:
    """One catalog of whole tensors.

    FitError without ``universal_checkpoint_info``, for what it says of no parameter (unless `strict` is off), and for
    what cannot be told from it; ConflictError for ranks that hold different parameters.
    """
    catalogs = [catalog for _, catalog in sharded.parts]
    parameters = _parameters(catalogs)
    info = _info(catalogs[0], len(catalogs))
    translation, notes = translated(info, parameters)
    if (note := _replicas_joined(store, catalogs, info.joined)) is not None:
        notes.append(note)
    if info.unused:
        notes += _unused(catalogs[0].url, info.unused, strict=strict)
    made = consolidate(
        sharded.parts,
        translation.program,
        mesh=sharded.mesh,
        cuts=translation.cuts,
        placements=translation.placements,
    )
    first = catalogs[0]
    ties = {alias: name for alias, name in first.ties.items() if name in made.tensors}
    return replace(
        made,
        source=replace(made.source, mesh=sharded.mesh),
        ties=ties,
        state=first.state,
        options=first.options,
        notes=(*dict.fromkeys((*made.notes, *notes)),),
    )


def translated(info: Info, parameters: Sequence[Parameter]) -> tuple[Translation, list[str]]:
    """The program for `parameters`, and remarks on what was assumed."""
    cuts = {parameter: info.cut_of(parameter) for parameter in parameters}
    return translate(cuts), list(info.notes)


def _info(first: Catalog, degree: int) -> Info:
    told = info_of(first.state)
    if told is None:
        raise FitError(
            f"{first.url}: {degree} tensor-parallel ranks, and no {INFO} that says how they cut parameters",
            hint=PROGRAM_HINT,
        )
    return read_info(told, f"{first.url}: {INFO}")


def _unused(url: str, unused: Sequence[str], *, strict: bool) -> list[str]:
    what = f"{len(unused)} patterns of {INFO} match no parameter, such as {unused[0]!r}"
    if strict:
        raise FitError(
            f"{url}: {what}",
            hint="parameters may have other names than when this was written; strict=False reads it none the less",
        )
    return [what]


def _parameters(catalogs: Sequence[Catalog]) -> list[Parameter]:
    first = catalogs[0]
    for rank, catalog in enumerate(catalogs):
        differing = sorted(first.tensors.keys() ^ catalog.tensors.keys())
        if differing:
            raise ConflictError(
                f"{first.url}: {differing[0]} is on some tensor-parallel ranks alone, rank 0 or {rank} lacks it",
                hint=MIXED_HINT,
            )
    return [
        Parameter(name, tensor.kind, tuple(catalog.tensors[name].states["value"].shape for catalog in catalogs))
        for name, tensor in first.tensors.items()
    ]


def _replicas_joined(store: Store, catalogs: Sequence[Catalog], names: Sequence[str]) -> str | None:
    """A remark on parameters whose parts, though joined, begin alike on all ranks."""
    alike = [name for name in names if len({_beginning(store, catalog, name) for catalog in catalogs}) == 1]
    if not alike:
        return None
    more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
    return (
        f"no pattern names {alike[0]}{more}, of one dim: the parts are joined, as DeepSpeed does, though they begin "
        "alike on all ranks; a norm or bias of which every rank has all belongs in tp_replicated_parameter_patterns"
    )


def _beginning(store: Store, catalog: Catalog, name: str) -> bytes:
    cover = catalog.cover(name, "value")
    return bytes(read_region(store, cover, FlatRange(0, min(cover.spec.size, _SAMPLE))))
