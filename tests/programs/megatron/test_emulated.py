"""megatron_legacy, megatron_legacy_2021 and megatron_deepspeed on EMULATED ranks: see `emulated`."""

from __future__ import annotations

import pytest

from tests.programs.megatron import emulated
from tests.programs.megatron.models import (
    GPT,
    GRIDS,
    LLAMA,
    MIXED,
    MIXTRAL,
    UNEVEN,
    assert_same,
    axes,
    logical,
    program,
    settings,
    sizes,
)
from tests.support.megatron import ONE, Grid
from ucp.errors import UcpError
from ucp.lang import load_program
from ucp.lang.arrays import gather, scatter
from ucp.layout import Mesh

DENSE = [
    (model, grid)
    for model in (LLAMA, GPT)
    for grid in (ONE, *GRIDS[model])
    if grid.tp <= model.groups and grid != UNEVEN
]
each_dense = pytest.mark.parametrize(("model", "grid"), DENSE, ids=lambda value: value.name)


def round_trip(using, shards, grid, model, *, flags, **more):
    """Gather, compare with the model's tensors by the caller, and cut again."""
    known = axes(using)
    held = {tuple(pair for pair in place if pair[0] in known): state for place, state in shards.items()}
    asked = {
        "mesh": Mesh({axis: size for axis, size in grid.mesh.items() if axis in known}),
        "sizes": {**sizes(model), **more},
        "flags": flags,
    }
    found = gather(using, held, **asked)
    made = scatter(using, found, coordinates=list(held), **asked)
    for place, state in held.items():
        assert_same(made[place], state)
    return found


def ranks(families, model, grid, change):
    return {place: change(state) for place, state in families[model.name].grids[grid].shards.items()}


ENGINE = [(LLAMA, Grid(tp=2, pp=2)), (GPT, Grid(pp=2, vpp=2)), (MIXTRAL, Grid(tp=2, ep=2)), (MIXED, Grid(tp=2, etp=2))]


@pytest.mark.parametrize(("model", "grid"), ENGINE, ids=lambda value: value.name)
def test_transformer_engine_layers(families, model, grid):
    shards = ranks(families, model, grid, lambda state: emulated.transformer_engine(state, model))
    known = axes(program(model))
    held = {tuple(pair for pair in place if pair[0] in known): state for place, state in shards.items()}
    asked = settings(model, grid)
    asked["flags"].update({"te": True, **({"grouped": True} if model.experts else {})})
    found = gather(program(model), held, **asked)
    assert_same(found, logical(model, families[model.name].grids[ONE]))
    if model is MIXED:  # norms of dense layers and of layers with experts go by two names: import only
        return
    made = scatter(program(model), found, coordinates=list(held), **asked)
    for place, state in held.items():
        assert_same(made[place], state)


@each_dense
@pytest.mark.parametrize("split", [False, True], ids=["by group", "split"])
def test_legacy(families, model, grid, split):
    shards = ranks(families, model, grid, lambda state: emulated.legacy(state, model))
    if split:
        shards = {place: emulated.rearranged(state, model, "kind") for place, state in shards.items()}
    flags = {"tied": model.tied, "swiglu": model.gated, "split_qkv": split}
    found = round_trip(load_program("megatron_legacy"), shards, grid, model, flags=flags)
    assert_same(found, logical(model, families[model.name].grids[ONE]))


def test_legacy_never_cuts_a_group(families):
    shards = ranks(families, LLAMA, Grid(tp=4), lambda state: emulated.legacy(state, LLAMA))
    flags = {"tied": False, "swiglu": True, "split_qkv": False}
    with pytest.raises(UcpError, match="groups"):
        round_trip(load_program("megatron_legacy"), shards, Grid(tp=4), LLAMA, flags=flags)


@pytest.mark.parametrize("grid", [ONE, Grid(tp=4), Grid(tp=2, pp=2)], ids=lambda grid: grid.name)
@pytest.mark.parametrize(("version", "order"), [(0, "kind"), (1, "element"), (2, None)])
def test_checkpoint_versions_of_2021(families, grid, version, order):
    shards = ranks(families, GPT, grid, lambda state: emulated.of_2021(state, GPT))
    if order:
        shards = {place: emulated.rearranged(state, GPT, order) for place, state in shards.items()}
    of_2021 = load_program("megatron_legacy_2021")
    asked = {"heads": GPT.heads, "vocab": GPT.vocab, "divisible": GPT.divisible}
    flags = {"v0": version == 0, "v1": version == 1}
    known = axes(of_2021)
    held = {tuple(pair for pair in place if pair[0] in known): state for place, state in shards.items()}
    mesh = Mesh({axis: size for axis, size in grid.mesh.items() if axis in known})
    found = gather(of_2021, held, mesh=mesh, sizes=asked, flags=flags)
    assert_same(found, logical(GPT, families["gpt"].grids[ONE]))
    made = scatter(of_2021, found, mesh=mesh, coordinates=list(held), sizes=asked, flags=flags)
    for place, state in held.items():
        assert_same(made[place], state)


@pytest.mark.parametrize(("first", "behind"), [(2, 0), (3, 1)], ids=["today", "until 2023"])
@pytest.mark.parametrize("split", [False, True], ids=["by group", "split"])
@pytest.mark.parametrize(
    ("model", "grid"), [(LLAMA, ONE), (LLAMA, Grid(tp=2)), (GPT, ONE), (GPT, Grid(tp=4))], ids=lambda value: value.name
)
def test_deepspeed_pipeline(families, model, grid, first, behind, split):
    def change(state):
        made = emulated.deepspeed(state, model, first=first, behind=behind)
        return emulated.rearranged(made, model, "kind") if split else made

    shards = ranks(families, model, grid, change)
    flags = {"tied": model.tied, "swiglu": model.gated, "split_qkv": split}
    found = round_trip(load_program("megatron_deepspeed"), shards, grid, model, flags=flags, first=first, behind=behind)
    assert_same(found, logical(model, families[model.name].grids[ONE]))


def test_a_wrong_first_layer_is_an_error(families):
    shards = ranks(families, LLAMA, ONE, lambda state: emulated.deepspeed(state, LLAMA, first=3, behind=1))
    flags = {"tied": False, "swiglu": True, "split_qkv": False}
    with pytest.raises(UcpError):
        round_trip(load_program("megatron_deepspeed"), shards, ONE, LLAMA, flags=flags, first=2, behind=0)
