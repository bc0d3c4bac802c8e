"""What all ranks hold together: the logical tensors and the training state of a checkpoint, without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ucp.catalog import Scalar, Tensor
from ucp.errors import ConflictError
from ucp.format.native_shard import Piece
from ucp.format.spreads import Chain, LiveMesh, Spread
from ucp.layout import Mesh
from ucp.plan import Cover, Extent, Fragment, Key
from ucp.train.save.message import Layout, Values
from ucp.train.state.item import combined


@dataclass(frozen=True, slots=True)
class Whole:
    """The checkpoint to be, as rank 0 knows it. `groups` are (names of parameters, hyper-parameters).

    `spreads` says how each tensor lies on the meshes of the job.
    """

    step: int | None
    mesh: Mesh
    tensors: Mapping[str, Tensor]
    ties: Mapping[str, str]
    groups: Sequence[tuple[list[str], dict[str, Any]]]
    state: Mapping[str, Any]
    spreads: Mapping[str, Sequence[Chain]] = field(default_factory=dict)


def merged(layouts: Sequence[Layout]) -> dict[str, Tensor]:
    """The tensors of all ranks; ConflictError where two say different things of one, FitError for gaps in them."""
    found: dict[str, Tensor] = {}
    for rank, layout in enumerate(layouts):
        for name, tensor in layout.tensors.items():
            known = found.setdefault(name, tensor)
            if known != tensor:
                raise ConflictError(f"{name}: rank {rank} has {_told(tensor)}, a rank before it {_told(known)}")
    _check_cover(found, {piece for layout in layouts for piece in layout.pieces})
    return found


def with_values(
    tensors: Mapping[str, Tensor], layouts: Sequence[Layout], values: Sequence[Values], step: int | None
) -> Whole:
    """`tensors` with all that the ranks told beside; ConflictError where they contradict each other."""
    scalars = _scalars(values)
    first, world = layouts[0], len(layouts)
    fits = Mesh(first.axes).size == world
    return Whole(
        step=step,
        mesh=Mesh(first.axes if fits else {"rank": world}),
        tensors={name: replace(tensor, scalars=scalars.get(name, {})) for name, tensor in tensors.items()},
        ties={alias: name for layout in layouts for alias, name in layout.ties.items()},
        groups=list(_groups(values)),
        state=_state(values),
    )


def spreads_of(layouts: Sequence[Layout]) -> dict[str, list[Chain]]:
    """All ways in which each tensor lies on meshes; what is plain is the same on all ranks that hold it."""
    found: dict[str, list[Chain]] = defaultdict(list)
    plain: dict[str, list[int]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        for name in layout.tensors:
            chain = layout.spreads.get(name)
            if chain is None:
                plain[name].append(rank)
            elif chain not in found[name]:
                found[name].append(chain)
    for name, ranks in plain.items():
        found[name].append((Spread(LiveMesh((("rank", len(ranks)),), tuple(ranks)), ("R",)),))
    return dict(found)


def _told(tensor: Tensor) -> str:
    states = [f"{state} {spec.dtype}{list(spec.shape)}" for state, spec in tensor.states.items()]
    return ", ".join([tensor.kind, *states])


def _check_cover(tensors: Mapping[str, Tensor], pieces: set[Piece]) -> None:
    """FitError, before anything is written, unless the ranks' boxes hold every element of every tensor once."""
    held: dict[Key, list[Fragment]] = defaultdict(list)
    for piece in pieces:
        held[piece.key].append(Fragment(piece.box, Extent.contiguous("a rank", 0, piece.box.shape, piece.dtype)))
    for name, tensor in tensors.items():
        for state, spec in tensor.states.items():
            Cover.of(Key(name, state), spec, held[Key(name, state)])


def _scalars(values: Sequence[Values]) -> dict[str, Mapping[str, Scalar]]:
    found: dict[str, Mapping[str, Scalar]] = {}
    for rank, one in enumerate(values):
        for name, scalars in one.scalars.items():
            known = found.setdefault(name, scalars)
            if known != scalars:
                told, before = ({key: scalar.value for key, scalar in held.items()} for held in (scalars, known))
                raise ConflictError(f"{name}: rank {rank} has {told}, a rank before it {before}")
    return found


def _groups(values: Sequence[Values]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Groups by number, with the parameters of all ranks: those of a pipeline's stages differ."""
    for number in range(max(len(one.groups) for one in values)):
        groups = [one.groups[number] for one in values if number < len(one.groups)]
        if any(options != groups[0][1] for _, options in groups):
            raise ConflictError(f"group {number} of the optimizer has different hyper-parameters on different ranks")
        yield list(dict.fromkeys(name for names, _ in groups for name in names)), groups[0][1]


def _state(values: Sequence[Values]) -> dict[str, Any]:
    found = {}
    for per_rank, every in ((False, [one.state for one in values]), (True, [one.ranked for one in values])):
        for name in dict.fromkeys(name for one in every for name in one):
            held = {rank: one[name] for rank, one in enumerate(every) if name in one}
            found[name] = combined(name, held, per_rank=per_rank)
    return found
