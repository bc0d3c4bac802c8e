"""Which saved random stream a rank goes on with, when the ranks may have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ucp.layout import Mesh
from ucp.train.state.item import World


@dataclass(frozen=True, slots=True)
class Choice:
    """Go on from `state`, or start anew from `seed`; `told` is for the report, empty where a rank gets its own."""

    told: str = ""
    state: Any = None
    seed: int | None = None


def chosen(name: str, held: Mapping[int, Any], world: World) -> Choice:
    """What this rank does with stream `name`, of which `held` are the saved states by rank; at least one."""
    if world.same_layout and world.rank in held:
        return Choice(state=held[world.rank])
    marks = {rank: _digest(state) for rank, state in held.items()}
    first = min(held)
    if len(set(marks.values())) == 1:
        return Choice(f"one stream for all ranks, as {_ranks(len(held))} had it", held[first])
    place = _place(marks, world)
    if place is not None:
        axes, kept = place
        if kept is not None:
            return Choice(f"kept by the coordinate on {' '.join(axes)}, along which alone it differed", held[kept])
        assert world.mesh is not None
        where = _coordinate(world.mesh, world.rank, axes)
    else:
        where = _apart(world)
    seed = _seed(name, [marks[rank] for rank in sorted(marks)], where)
    return Choice(f"starts anew, from a seed made of {_ranks(len(held))}' streams and the new place", seed=seed)


def _ranks(count: int) -> str:
    return f"the {count} saved ranks" if count > 1 else "the saved rank"


def _place(marks: Mapping[int, bytes], world: World) -> tuple[tuple[str, ...], int | None] | None:
    """The axes along which streams differed, and a saved rank at this rank's coordinate on them, if sizes are kept.

    None where the meshes do not tell: not all ranks' streams are there, or the new mesh has not those axes.
    """
    saved, mesh = world.saved_mesh, world.mesh
    if saved is None or mesh is None or set(marks) != set(range(saved.size)):
        return None
    axes = tuple(axis for axis, _ in saved.axes if _differ(marks, saved, axis))
    sizes, now = dict(saved.axes), dict(mesh.axes)
    if any(axis not in now for axis in axes):
        return None
    if any(sizes[axis] != now[axis] for axis in axes):
        return axes, None
    mine = _coordinate(mesh, world.rank, axes)
    return axes, next(rank for rank in range(saved.size) if _coordinate(saved, rank, axes) == mine)


def _apart(world: World) -> tuple[int, ...]:
    """What tells this rank from those that need not draw alike.

    Tensor-parallel ranks drop out of the same activations, so one that drew something else would be silently wrong.
    """
    if world.mesh is None:
        return (world.rank,)
    axes = tuple(axis for axis, _ in world.mesh.axes if axis.partition("_")[0] != "tp")
    return _coordinate(world.mesh, world.rank, axes)


def _differ(marks: Mapping[int, bytes], mesh: Mesh, axis: str) -> bool:
    """Whether two ranks that differ on `axis` alone have different streams."""
    others = tuple(name for name, _ in mesh.axes if name != axis)
    lines: dict[tuple[int, ...], set[bytes]] = {}
    for rank, mark in marks.items():
        lines.setdefault(_coordinate(mesh, rank, others), set()).add(mark)
    return any(len(line) > 1 for line in lines.values())


def _coordinate(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    place = mesh.coordinate(rank)
    return tuple(place[axis] for axis in axes)


def _seed(name: str, marks: list[bytes], where: tuple[int, ...]) -> int:
    """64 bits that depend on the stream's name, on all that was saved of it, and on the place."""
    told = hashlib.blake2b(name.encode(), digest_size=8, person=b"ucp.rng")
    for mark in marks:
        told.update(mark)
    told.update(repr(where).encode())
    return int.from_bytes(told.digest(), "little") >> 1


def _digest(state: Any) -> bytes:
    told = hashlib.blake2b(digest_size=16)
    for part in _flat(state):
        told.update(len(part).to_bytes(8, "little") + part)
    return told.digest()


def _flat(state: Any) -> Iterator[bytes]:
    """The bytes of a state in a fixed order."""
    if isinstance(state, torch.Tensor):
        state = state.cpu().numpy()
    if isinstance(state, np.ndarray):
        yield np.ascontiguousarray(state).tobytes()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield str(key).encode()
            yield from _flat(state[key])
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _flat(part)
    else:
        yield repr(state).encode()
