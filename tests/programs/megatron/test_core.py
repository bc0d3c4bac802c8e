"""megatron_core_gpt and megatron_core_moe against what Megatron-Core's own resharding puts on each rank."""

from __future__ import annotations

import numpy as np
import pytest

from tests.programs.megatron.models import (
    CASES,
    GPT,
    GRIDS,
    LLAMA,
    MIXED,
    MIXTRAL,
    NAMES,
    UNEVEN,
    assert_same,
    logical,
    sharded,
    shards,
)
from tests.support.megatron import ONE, Grid
from ucp.errors import ConflictError, ProgramError, UcpError

each_grid = pytest.mark.parametrize(("model", "grid"), CASES, ids=NAMES)


@each_grid
def test_every_grid_computes_the_same(families, model, grid):
    """The ground all else stands on: the ranks' weights are one model's."""
    family = families[model.name]
    assert np.abs(family.grids[ONE].logits).max() > 1
    np.testing.assert_allclose(family.grids[grid].logits, family.grids[ONE].logits, atol=2e-5)


@each_grid
def test_every_grid_makes_the_tensors_of_a_single_rank(families, model, grid):
    family = families[model.name]
    assert_same(logical(model, family.grids[grid]), logical(model, family.grids[ONE]))


@each_grid
def test_a_single_rank_is_cut_as_the_framework_cuts_it(families, model, grid):
    """Every shard of every rank, padding too, bit for bit; so a strict load_state_dict takes it."""
    family = families[model.name]
    held = family.grids[grid]
    made = sharded(model, logical(model, family.grids[ONE]), held)
    for place, state in shards(model, held).items():
        assert_same(made[place], state)


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        (LLAMA, Grid(tp=2, pp=2), Grid(tp=4)),
        (LLAMA, Grid(tp=4), Grid(pp=2, vpp=2)),
        (LLAMA, Grid(tp=2, pp=2), UNEVEN),
        (LLAMA, Grid(pp=2, vpp=2), Grid(tp=2, pp=2)),
        (GPT, Grid(pp=2, vpp=2), Grid(tp=2, pp=2)),
        (GPT, Grid(tp=2, pp=2), Grid(tp=4)),
        (MIXTRAL, Grid(ep=2, dp=2, pp=2), Grid(tp=2, etp=2)),
        (MIXTRAL, Grid(tp=2, etp=2), Grid(tp=2, ep=2)),
        (MIXTRAL, Grid(tp=2, dp=2, ep=2, etp=2), Grid(ep=2, dp=2)),
        (MIXED, Grid(ep=2, dp=2), Grid(tp=2, etp=2)),
    ],
    ids=lambda value: value.name,
)
def test_from_grid_to_grid(families, model, source, target):
    family = families[model.name]
    held = family.grids[target]
    made = sharded(model, logical(model, family.grids[source]), held)
    for place, state in shards(model, held).items():
        assert_same(made[place], state)


@pytest.mark.parametrize("model", GRIDS, ids=lambda model: model.name)
def test_padding_of_the_vocabulary_is_no_part_of_a_tensor(families, model):
    found = logical(model, families[model.name].grids[ONE])
    assert found["embed.weight"].shape == (model.vocab, model.hidden)
    assert found["lm_head.weight"].shape == (model.vocab, model.hidden)


def test_logical_names_are_the_shared_ones(families):
    layer = {name.removeprefix("layers.2.") for name in logical(LLAMA, families["llama"].grids[ONE]) if ".2." in name}
    assert layer == {
        "attn.norm.weight", "attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight",
        "mlp.norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight",
    }  # fmt: skip
    moe = {name.removeprefix("layers.2.") for name in logical(MIXED, families["mixed"].grids[ONE]) if ".2." in name}
    assert moe - layer == {
        "moe.router.weight", "moe.router.expert_bias", "moe.gate", "moe.up", "moe.down",
        "moe.shared.gate.weight", "moe.shared.up.weight", "moe.shared.down.weight",
        "moe.shared.router.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "grid", "name"),
    [
        (LLAMA, Grid(tp=2), "decoder.layers.1.input_layernorm.weight"),
        (LLAMA, Grid(tp=2, dp=2), "decoder.layers.1.mlp.linear_fc1.weight"),
        (GPT, Grid(tp=2, pp=2), "output_layer.weight"),
        (GPT, Grid(tp=4), "decoder.layers.0.mlp.linear_fc2.bias"),
        (MIXTRAL, Grid(tp=2, ep=2), "decoder.layers.3.mlp.router.weight"),
    ],
)
def test_a_copy_that_differs_is_an_error(families, model, grid, name):
    held = shards(model, families[model.name].grids[grid])
    place = max(place for place in held if name in held[place])
    changed = held[place][name].copy()
    changed.reshape(-1)[0] += 1
    damaged = {**held, place: {**held[place], name: changed}}
    with pytest.raises(ConflictError, match="differs from its other copies"):
        logical(model, _with(families[model.name].grids[grid], damaged))


@pytest.mark.parametrize(
    ("model", "grid", "name"),
    [
        (LLAMA, Grid(tp=2), "decoder.layers.1.mlp.linear_fc2.weight"),
        (LLAMA, Grid(pp=2, vpp=2), "decoder.final_layernorm.weight"),
        (LLAMA, Grid(tp=2, pp=2), "embedding.word_embeddings.weight"),
        (MIXTRAL, Grid(ep=2, dp=2), "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"),
    ],
)
def test_a_part_that_is_missing_is_an_error(families, model, grid, name):
    held = shards(model, families[model.name].grids[grid])
    place = max(place for place in held if name in held[place])
    damaged = {**held, place: {key: array for key, array in held[place].items() if key != name}}
    with pytest.raises(UcpError):
        logical(model, _with(families[model.name].grids[grid], damaged))


def test_a_tensor_no_rule_knows_is_an_error(families):
    held = shards(LLAMA, families["llama"].grids[ONE])
    more = {place: {**state, "decoder.layers.0.adapter.weight": np.zeros(3)} for place, state in held.items()}
    with pytest.raises((ProgramError, UcpError), match=r"adapter\.weight"):
        logical(LLAMA, _with(families["llama"].grids[ONE], more))


def _with(held, changed):
    return type(held)(held.grid, changed, held.logits)
