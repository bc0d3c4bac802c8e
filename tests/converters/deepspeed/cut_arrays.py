"""Arrays that NumPy cuts over ranks in the ways that ``universal_checkpoint_info`` can say, and their way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ucp.converters._deepspeed.info import Parameter, read_info
from ucp.converters._deepspeed.tensor_parallel import translated
from ucp.converters._deepspeed.translate import Translation
from ucp.lang import format_program
from ucp.lang.arrays import at, gather
from ucp.layout import Mesh

Array = np.ndarray[Any, Any]

Shards = Mapping[str, Sequence[Array]]


def whole(*shape: int) -> Array:
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def cut(full: Array, dim: int, tp: int = 2) -> list[Array]:
    return list(np.split(full, tp, dim))


def cut_parts(full: Array, dim: int, parts: Sequence[Sequence[int]]) -> list[Array]:
    """Parts one after the other along `dim`, each cut to these widths over ranks."""
    pieces = np.split(full, np.cumsum([sum(widths) for widths in parts])[:-1], dim)
    each = [np.split(piece, np.cumsum(w)[:-1], dim) for piece, w in zip(pieces, parts, strict=True)]
    return [np.concatenate([part[rank] for part in each], dim) for rank in range(len(parts[0]))]


def translation(info: Mapping[str, Any], shards: Shards, kinds: Mapping[str, Any] | None = None) -> Translation:
    known = kinds or {}
    parameters = [
        Parameter(name, known.get(name, "parameter"), tuple(part.shape for part in parts))
        for name, parts in shards.items()
    ]
    return translated(read_info(dict(info), "info"), parameters)[0]


def joined(info: Mapping[str, Any], shards: Shards, kinds: Mapping[str, Any] | None = None) -> dict[str, Array]:
    made = translation(info, shards, kinds)
    ranks = len(next(iter(shards.values())))
    held = {at(tp=rank): {name: parts[rank] for name, parts in shards.items()} for rank in range(ranks)}
    return gather(made.program, held, mesh=Mesh({"tp": ranks}), cuts=made.cuts, placements=made.placements)


def text(info: Mapping[str, Any], shards: Shards) -> str:
    return format_program(translation(info, shards).program)


def check(info: Mapping[str, Any], shards: Shards, expected: Mapping[str, Array]) -> None:
    found = joined(info, shards)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].reshape(-1), value.reshape(-1), name)
        assert found[name].shape == value.shape, name


SUBS = "parameter_with_sub_params"


def sub(shape: Sequence[Any], dim: int, name: str = "w") -> dict[str, Any]:
    return {"patterns": [name], "shape": shape, "partition_dim": dim}


# AutoTP's maps.


def piece(
    full: Sequence[int], shard: Sequence[int], dim: int, run: tuple[int, int], place: int, **more: Any
) -> dict[str, Any]:
    strides, steps = (np.cumprod([1, *shape[:0:-1]])[::-1].tolist() for shape in (full, shard))
    shape = [*full]
    shape[dim] = run[1]
    source, dest = [run[0] * strides[dim], strides], [place * steps[dim], steps]
    return {"shape": shape, "source": source, "dest": dest, "locations": [0], **more}


def affine(full: Sequence[int], dim: int, runs: Sequence[Sequence[tuple[int, int]]], **more: Any) -> dict[str, Any]:
    ranks = {}
    for rank, held in enumerate(runs):
        shard = [*full]
        shard[dim] = sum(length for _, length in held)
        places = np.cumsum([0, *(length for _, length in held)]).tolist()
        pieces = [piece(full, shard, dim, run, at, **more) for run, at in zip(held, places, strict=False)]
        ranks[rank] = {"shard_shape": shard, "pieces": pieces}
    return {"logical_shape": [*full], "ranks": ranks}


def affine_info(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"universal_checkpoint_version": 0.4, "affine_map": {"version": 1, "params": {r"^w$": entry}}}


def taken(full: Array, dim: int, runs: Sequence[Sequence[tuple[int, int]]]) -> list[Array]:
    return [np.take(full, [i for start, n in held for i in range(start, start + n)], dim) for held in runs]
