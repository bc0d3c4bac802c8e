"""Catalogs of what each rank of ``mp_rank_*`` folders holds, and the program that puts them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ucp.catalog import Catalog, Source
from ucp.converter import Sharded
from ucp.errors import ConflictError
from ucp.layout import Box, Mesh
from ucp.plan import Fragment, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .._deepspeed.same import Comparison
from .around import groups_of, iteration_of, rng_of, state_of
from .experts import single
from .folder import Folder
from .found import Found, Held, tensors_of
from .groups import Optimizer, Parameter
from .legacy_names import program_of
from .legacy_optimizer import read_optimizers
from .ranks import Legacy, Place, load, told
from .sizes import sizes_of

_BUFFERS = ("expert_bias",)

Members = Sequence[tuple[Optimizer, Sequence[tuple[int, Parameter]]]]
"""Each optimizer of a rank, and its parameters with the model chunk they are in."""


def read_legacy(store: Store, folder: Folder, *, vocab: int | None) -> Sharded:
    """What each model-parallel rank holds of each model chunk, and the program for its names."""
    legacy = load(store, folder)
    found = {place: [Found() for _ in rank.chunks] for place, rank in legacy.ranks.items()}
    comparison = Comparison(store, [checksum for file in legacy.files for checksum in file.checksums])
    for place, rank in legacy.ranks.items():
        for chunk, held in zip(rank.chunks, found[place], strict=True):
            held.weights = dict(_weights(legacy, chunk))
            held.buffers = {name for name in held.weights if name.endswith(_BUFFERS)}
    members = {place: read_optimizers(legacy, rank, found[place]) for place, rank in legacy.ranks.items()}
    _check_copies(legacy, comparison)
    _drop_copies(legacy, found)
    return _sharded(legacy, found, members, vocab=vocab)


def _weights(legacy: Legacy, chunk: Mapping[str, TensorLeaf]) -> Iterator[tuple[str, Held]]:
    for name, leaf in chunk.items():
        if not name.endswith("_extra_state"):
            for one, extent in single(name, leaf.extent, experts=legacy.args.local_experts):
                spec = TensorSpec(extent.shape, extent.dtype)
                yield one, (spec, (Fragment(Box.whole(extent.shape), extent),))


def _check_copies(legacy: Legacy, comparison: Comparison) -> None:
    """ConflictError if expert-parallel ranks differ in what is no expert, whose masters lie with the first only."""
    for place, rank in legacy.ranks.items():
        other = legacy.ranks.get(Place(place.pp, place.tp))
        if place.ep == 0 or other is None:
            continue
        for number, chunk in enumerate(rank.chunks):
            for name, leaf in chunk.items():
                same = other.chunks[number].get(name)
                if not legacy.is_expert(name) and (same is None or not comparison.equal(leaf, same)):
                    raise ConflictError(
                        f"{legacy.store.url}/{rank.path}: {name} differs from that in {other.path}",
                        hint="files of two saves are mixed, or ranks have drifted apart",
                    )


def _drop_copies(legacy: Legacy, found: Mapping[Place, list[Found]]) -> None:
    """Leave what is no expert to the expert-parallel rank whose distributed optimizer has its masters."""
    for place, rank in legacy.ranks.items():
        if place.ep and rank.parameters is not None and Place(place.pp, place.tp) in legacy.ranks:
            for held in found[place]:
                held.keep(legacy.is_expert)


def _sharded(
    legacy: Legacy, found: Mapping[Place, list[Found]], members: Mapping[Place, Members], *, vocab: int | None
) -> Sharded:
    args, fitting = legacy.args, program_of(legacy)
    sizes, notes = sizes_of(args, _rows(legacy), vocab=vocab)
    optimizers = [optimizer for optimizer, _ in members[legacy.first.place]]
    state = state_of(legacy.store, legacy.first.root, args, optimizers, _rng(legacy))
    parts = []
    for place in legacy.ranks:
        for number, held in enumerate(found[place]):
            at = {"tp": place.tp, "pp": place.pp, "vpp": number, "ep": place.ep, "etp": place.tp % args.etp}
            catalog = _catalog(legacy, held, members[place], number, state)
            catalog = replace(catalog, notes=(*catalog.notes, *notes))
            parts.append(({axis: index for axis, index in at.items() if axis in fitting.axes}, catalog))
    edp = max(1, args.tp * args.dp // (args.ep * args.etp))
    degrees = {"pp": args.pp, "vpp": args.vpp, "tp": args.tp, "dp": args.dp, "ep": args.ep, "etp": args.etp, "edp": edp}
    mesh = Mesh({axis: size for axis, size in degrees.items() if axis in fitting.axes})
    return Sharded(parts, mesh, config=sizes, flags={**args.flags(), **fitting.flags}, program=fitting.name)


def _rows(legacy: Legacy) -> int | None:
    """Rows of the embedding over all ranks, padding counted."""
    held = [leaf for name, leaf in legacy.first.chunks[0].items() if name.endswith("word_embeddings.weight")]
    return held[0].extent.shape[0] * legacy.args.tp if held else None


def _rng(legacy: Legacy) -> Tree:
    ranks = {place: rank.root.get("rng_state") for place, rank in legacy.ranks.items()}
    return rng_of({told(place, legacy.args).replace(" ", "="): rng for place, rng in ranks.items() if rng is not None})


def _catalog(legacy: Legacy, found: Found, optimizers: Members, chunk: int, state: Mapping[str, Tree]) -> Catalog:
    """What a rank holds of one model chunk."""
    known = [optimizer for optimizer, _ in optimizers]
    held = [[one for number, one in parameters if number == chunk] for _, parameters in optimizers]
    groups, left = groups_of(found, legacy.args, known, held, where=legacy.where)
    made = tensors_of(found)
    args = legacy.args
    dtypes = sorted({spec.dtype for spec, _ in found.weights.values()})
    detail = {"format": "mp_rank", "model_dtype": " ".join(dtypes) or None}
    mesh = Mesh({"tp": args.tp, "pp": args.pp, "ep": args.ep, "dp": args.dp})
    return Catalog(
        url=legacy.store.url,
        source=Source("megatron", "", mesh, detail),
        tensors=made.tensors,
        fragments=made.fragments,
        witnesses=made.witnesses,
        step=iteration_of(legacy.first.root, legacy.folder.iteration, where=legacy.where),
        param_groups=groups,
        state={**state, **left},
        checksums=tuple(checksum for file in legacy.files for checksum in file.checksums),
        objects={file.entry.path: (file.entry.size, file.entry.fingerprint) for file in legacy.files},
        notes=tuple(found.notes),
    )
