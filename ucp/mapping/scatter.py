"""Scattering: a catalog of logical tensors, seen through a conversion program, as what coordinates of a mesh hold.

The inverse of consolidating, and nothing is read here either: the fragments of a shard still lie in the objects of the
source, wherever the source has the elements that the program puts there. Padding reads as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ucp.catalog import Catalog
from ucp.converter import Sharded
from ucp.errors import FitError
from ucp.lang import Program
from ucp.lang.bind import Placements
from ucp.lang.export import Exporter, Shard, Wanted, export
from ucp.lang.solve import Cuts
from ucp.layout import Mesh, Shape, itemsize, linear, row_major_strides
from ucp.layout.block import View
from ucp.mapping.sharing import Sharing
from ucp.plan import Cover, Extent, Fragment, Key, Reduction, TensorSpec
from ucp.plan.place import Laid, in_one_view, padded, placed


def scatter(
    catalog: Catalog,
    program: Program,
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    coordinates: Iterable[Mapping[str, int]] | None = None,
) -> Sharded:
    """What each of `coordinates` of `mesh` (default: all) holds of the tensors of `catalog`, as `program` says.

    Each part's catalog has the names of the program's left side and local shapes. Optimizer states, numbers per
    parameter, param groups, replicas and low-precision copies follow their tensors; training state is that of the
    whole in every part. The other arguments are those of `ucp.lang.export.export`. The result has the sizes and flags
    that were found as its `config` and `flags`.

    ProgramError and FitError as `export` raises them; FitError for a tensor whose parts differ in kind, dtype, numbers
    or hyper-parameters.
    """
    logical = {name: spec.shape for name, tensor in catalog.tensors.items() if (spec := tensor.states.get("value"))}
    exporter = export(
        program,
        logical,
        mesh=mesh,
        sizes=sizes,
        config=config,
        flags=flags,
        cuts=cuts,
        placements=placements,
        ties=catalog.ties,
    )
    states = list(dict.fromkeys(state for tensor in catalog.tensors.values() for state in ("value", *tensor.states)))
    chosen = list(mesh.coordinates()) if coordinates is None else list(coordinates)
    parts = [(coordinate, _part(catalog, exporter, mesh, coordinate, states)) for coordinate in chosen]
    return Sharded(parts, mesh, dict(exporter.setting.sizes), dict(exporter.flags))


def _part(
    catalog: Catalog, exporter: Exporter, mesh: Mesh, coordinate: Mapping[str, int], states: Sequence[str]
) -> Catalog:
    sharing = Sharing(catalog, exporter, mesh, {"": coordinate})
    job = sharing.share(states)
    keys = [Key(name, state) for name, tensor in job.tensors.items() for state in tensor.states]
    made = {key: _Made.of(sharing, job, key) for key in keys}
    return replace(
        job,
        fragments={key: one.fragments for key, one in made.items()},
        views={key: one.view for key, one in made.items()},
        reductions={key: one.reduce for key, one in made.items() if one.reduce is not None},
        witnesses={key.name: one.witness for key, one in made.items() if one.witness is not None},
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """One state of one shard: where its elements lie, and its low-precision copy."""

    view: View
    fragments: tuple[Fragment, ...]
    reduce: Reduction | None
    witness: tuple[TensorSpec, tuple[Fragment, ...]] | None

    @classmethod
    def of(cls, sharing: Sharing, job: Catalog, key: Key) -> _Made:
        catalog, shard, spec = sharing.catalog, sharing.shards[key], job.tensors[key.name].states[key.state]
        covers = [(wanted, catalog.cover(sharing.holder(wanted.name), key.state)) for wanted in shard.blocks]
        low = _witnesses(sharing, shard) if key.state == "value" else []
        groups = [[laid for one in held for laid in _laid(*one, spec.shape)] for held in (covers, low)]
        view, (exact, rounded) = in_one_view(groups, spec.shape)
        witness = None
        if low:
            low_spec = replace(spec, dtype=low[0][1].spec.dtype)
            witness = low_spec, tuple(padded(rounded, view, low_spec.dtype))
        return cls(view, tuple(padded(exact, view, spec.dtype)), _reduction(key, covers), witness)


def _reduction(key: Key, covers: Sequence[tuple[Wanted, Cover]]) -> Reduction | None:
    """How the terms of all parts are put together, which must be alike."""
    kinds = {(cover.reduce, len(cover.terms)) for _, cover in covers} or {(None, 0)}
    if len(kinds) > 1:
        raise FitError(
            f"{key}: some of its parts are means or sums of what ranks hold, in different ways",
            hint="convert the source to the universal form first, then that",
        )
    return kinds.pop()[0]


def _witnesses(sharing: Sharing, shard: Shard) -> list[tuple[Wanted, Cover]]:
    """Covers of the low-precision copies; none unless all parts have one, in one dtype."""
    found = []
    for wanted in shard.blocks:
        witness = sharing.catalog.witness(sharing.holder(wanted.name))
        if witness is None:
            return []
        found.append((wanted, witness.cover))
    return found if len({cover.spec.dtype for _, cover in found}) == 1 else []


def _laid(wanted: Wanted, cover: Cover, shape: Shape) -> Iterator[Laid]:
    """What fills `wanted`'s block of a shard of `shape`, from the tensor that `cover` covers."""
    target = _target(wanted, shape, cover.spec.dtype)
    for term, one in enumerate(cover.sources):
        for copy in one.copies_into(target, wanted.view):
            yield from placed(copy, shape, term=term)
        replicas = one.replica_copies_into(target, wanted.view) if one.replicas else ()
        for number, copies in enumerate(replicas, 1):
            for copy in copies:
                yield from placed(copy, shape, replica=number, term=term)


def _target(wanted: Wanted, shape: Shape, dtype: str) -> Fragment:
    """The block as a fragment of the logical tensor that lies in a buffer of the shard's shape."""
    offset, strides = linear(wanted.block, row_major_strides(shape))
    return Fragment(wanted.block.box, Extent("", offset * itemsize(dtype), wanted.block.box.shape, strides, dtype))
