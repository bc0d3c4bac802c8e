"""The models and grids of ranks that are run, and how the shipped programs are asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.megatron import Coordinate, Grid, Held, Model
from ucp.lang import Program, load_program
from ucp.lang.arrays import gather, scatter
from ucp.lang.ast import MeshAxes
from ucp.layout import Mesh

Arrays = Mapping[str, np.ndarray]

LLAMA = Model("llama")
GPT = Model("gpt", norm="LayerNorm", gated=False, bias=True, tied=True, learned_positions=True, groups=4, ffn=80)
QWEN2 = Model("qwen2", qkv_bias=True, tied=True)
QWEN3 = Model("qwen3", qk_norm=True)
MIXTRAL = Model("mixtral", experts=4)
MIXED = Model("mixed", experts=4, ffn_shared=28, routed_with_bias=True, expert_layers=(0, 1, 1, 1))
"""A dense layer before those with experts, an expert that all tokens share, and a router with biases."""

BIASED = Model("biased", experts=4, bias=True)
"""Experts with biases."""

UNEVEN = Grid(pp=2, first_stage=1)
"""One layer in the first stage, three in the second."""

GRIDS: dict[Model, tuple[Grid, ...]] = {
    LLAMA: (Grid(tp=2), Grid(tp=2, pp=2), Grid(pp=2, vpp=2), Grid(tp=4), Grid(tp=2, dp=2), UNEVEN),
    GPT: (Grid(tp=4), Grid(tp=2, pp=2), Grid(pp=2, vpp=2)),
    QWEN2: (Grid(tp=2, pp=2),),
    QWEN3: (Grid(tp=2, pp=2), Grid(tp=4)),
    MIXTRAL: (
        Grid(ep=2, dp=2),
        Grid(ep=2, dp=2, pp=2),
        Grid(tp=2, etp=2),
        Grid(tp=2, ep=2),
        Grid(tp=2, dp=2, ep=2, etp=2),
    ),
    MIXED: (Grid(ep=2, dp=2), Grid(tp=2, etp=2)),
    BIASED: (Grid(ep=2, dp=2),),
}
CASES = [(model, grid) for model, grids in GRIDS.items() for grid in grids]
NAMES = [f"{model.name}-{grid.name}" for model, grid in CASES]


def program(model: Model) -> Program:
    return load_program("megatron_core_moe" if model.experts else "megatron_core_gpt")


def axes(of: Program) -> tuple[str, ...]:
    (statement,) = (s for s in of.statements if isinstance(s, MeshAxes))
    return statement.axes


def sizes(model: Model) -> dict[str, int]:
    """What shapes alone do not tell."""
    heads = {"groups": model.groups, "r": model.heads // model.groups}
    return {**heads, "vocab": model.vocab, "divisible": model.divisible}


def flags(model: Model) -> dict[str, bool]:
    experts = {"grouped": False} if model.experts else {}
    return {"tied": model.tied, "swiglu": model.gated, "te": False, **experts}


def settings(model: Model, grid: Grid) -> dict[str, Any]:
    known = axes(program(model))
    mesh = Mesh({axis: size for axis, size in grid.mesh.items() if axis in known})
    return {"mesh": mesh, "sizes": sizes(model), "flags": flags(model)}


def cuts(model: Model, grid: Grid) -> dict[tuple[str, tuple[str, ...]], tuple[int, ...]]:
    """Which layers are whose, where stages differ; told only to cut: in what is read the names show it."""
    first = grid.first_stage
    return {} if first is None else {("l", ("vpp", "pp")): (0, first, model.layers)}


def shards(model: Model, held: Held) -> dict[Coordinate, Arrays]:
    """What each rank holds, at its coordinate on the axes of the program."""
    known = axes(program(model))
    return {tuple(pair for pair in place if pair[0] in known): state for place, state in held.shards.items()}


def logical(model: Model, held: Held) -> dict[str, np.ndarray]:
    return gather(program(model), shards(model, held), **settings(model, held.grid))


def sharded(model: Model, tensors: Arrays, held: Held) -> dict[Coordinate, dict[str, np.ndarray]]:
    """The logical tensors as the ranks of another grid would hold them."""
    places = list(shards(model, held))
    asked = {**settings(model, held.grid), "cuts": cuts(model, held.grid)}
    return scatter(program(model), tensors, coordinates=places, **asked)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Same names, shapes, dtypes and bits."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)
