"""The patterns of the paper's table (Lian et al., section 5.3.1), each with the paper's own example.

Shards are cut here with NumPy, as the frameworks cut them; programs join them and cut them for another mesh.
"""

from __future__ import annotations

import numpy as np
import pytest

from ucp.errors import ConflictError, FitError, UcpError
from ucp.lang import parse
from ucp.lang.arrays import at, gather, scatter
from ucp.layout import Mesh


def program(text):
    return parse("format 1\n" + text, file="patterns.ucp")


def numbers(*shape, start=0):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def along(axis, shards):
    """Shards by coordinate on one axis."""
    return {at(**{axis: index}): shard for index, shard in enumerate(shards)}


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


def test_unique_a_pipeline_stage_alone_holds_its_layers():
    text = program(
        "mesh pp\nsize a b\nin layers.{l/pp} <-> layers.{l} {\n  w [a, b] <-> w\n}\nhead [a] <-> head on pp -1"
    )
    weights = [numbers(2, 3, start=100 * layer) for layer in range(4)]
    head = numbers(2)
    two = along("pp", [
        {"layers.0.w": weights[0], "layers.1.w": weights[1]},
        {"layers.0.w": weights[2], "layers.1.w": weights[3], "head": head},
    ])  # fmt: skip
    whole = gather(text, two, mesh=Mesh({"pp": 2}))
    same(whole, {"head": head, **{f"layers.{layer}.w": weights[layer] for layer in range(4)}})
    four = scatter(text, whole, mesh=Mesh({"pp": 4}))
    for stage in range(4):
        same(four[at(pp=stage)], {"layers.0.w": weights[stage], **({"head": head} if stage == 3 else {})})


REPLICATE = program(
    "mesh pp tp\nsize hidden vocab\nflag tied\n"
    "norm.weight [hidden] <-> norm.weight on pp -1\n"
    "embed.weight [vocab/tp, hidden] <-> embed.weight on pp 0\n"
    "head.weight [vocab/tp, hidden] <-> lm_head.weight on pp -1\n"
    "tie lm_head.weight to embed.weight when tied"
)


def replicated():
    """A norm that all tensor-parallel ranks have, and an embedding that the first and the last stage have."""
    norm, embedding = numbers(3), numbers(8, 3, start=50)
    shards = {}
    for tp, rows in enumerate(np.split(embedding, 2)):
        shards[at(pp=0, tp=tp)] = {"embed.weight": rows.copy()}
        shards[at(pp=1, tp=tp)] = {"head.weight": rows.copy(), "norm.weight": norm.copy()}
    return shards, {"norm.weight": norm, "embed.weight": embedding, "lm_head.weight": embedding}


def test_replicate_norms_under_tensor_and_embeddings_under_pipeline_parallelism():
    shards, expected = replicated()
    mesh = Mesh({"pp": 2, "tp": 2})
    whole = gather(REPLICATE, shards, mesh=mesh, flags={"tied": True})
    same(whole, expected)
    assert whole["lm_head.weight"] is whole["embed.weight"]
    made = scatter(REPLICATE, whole, mesh=mesh, flags={"tied": True})
    for place, state in shards.items():
        same(made[place], state)


@pytest.mark.parametrize("name", ["norm.weight", "head.weight"])
def test_replicate_copies_are_compared(name):
    shards, _ = replicated()
    shards[at(pp=1, tp=1)][name][0] += 1
    with pytest.raises(ConflictError, match="differs"):
        gather(REPLICATE, shards, mesh=Mesh({"pp": 2, "tp": 2}), flags={"tied": True})


def test_partial_alibi_embedding_is_averaged():
    text = program("mesh tp\nsize heads positions\nalibi [heads, positions] mean tp <-> alibi")
    copies = [numbers(2, 4), numbers(2, 4, start=8)]
    mean = (copies[0] + copies[1]) / 2
    whole = gather(text, along("tp", [{"alibi": copy} for copy in copies]), mesh=Mesh({"tp": 2}))
    same(whole, {"alibi": mean})
    for state in scatter(text, whole, mesh=Mesh({"tp": 3})).values():
        same(state, {"alibi": mean})


def test_partial_asynchronous_training_averages_everything_that_each_group_trained_alone():
    text = program("mesh dp tp\nsize a b\nw [a/tp, b] mean dp <-> w\nstate * : like param")
    groups = [numbers(4, 3), numbers(4, 3, start=100)]
    for state in ("value", "exp_avg"):
        shards = {
            at(dp=dp, tp=tp): {"w": part.copy()}
            for dp, group in enumerate(groups)
            for tp, part in enumerate(np.split(group, 2))
        }
        whole = gather(text, shards, mesh=Mesh({"dp": 2, "tp": 2}), state=state)
        same(whole, {"w": (groups[0] + groups[1]) / 2})


@pytest.mark.parametrize(
    ("layout", "dim"), [("[ffn/tp, hidden]", 0), ("[ffn, hidden/tp]", 1)], ids=["Shard-H, rows", "Shard-V, columns"]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shard_along_one_dim(layout, dim, ranks):
    text = program(f"mesh tp\nsize ffn hidden\nw {layout} <-> w [ffn, hidden]")
    weight = numbers(8, 12)
    whole = gather(text, along("tp", [{"w": part} for part in np.split(weight, 2, axis=dim)]), mesh=Mesh({"tp": 2}))
    same(whole, {"w": weight})
    made = scatter(text, whole, mesh=Mesh({"tp": ranks}))
    for place, part in along("tp", np.split(weight, ranks, axis=dim)).items():
        same(made[place], {"w": part})


def test_shard_v_flattened_parameters_of_zero_3():
    """The paper's numbers: 1024 elements are 342 on each of 3 ranks, two of them padding; 512 on each of 2."""
    text = program("mesh dp\nsize a b\nflat [(a b + _)/dp] <-> w [a, b]")
    weight = numbers(32, 32)
    padded = np.concatenate([weight.reshape(-1), [7, 7]]).astype(np.float32)
    three = along("dp", [{"flat": part} for part in np.split(padded, 3)])
    assert {state["flat"].shape for state in three.values()} == {(342,)}
    whole = gather(text, three, mesh=Mesh({"dp": 3}), sizes={"a": 32, "b": 32})
    same(whole, {"w": weight})
    two = scatter(text, whole, mesh=Mesh({"dp": 2}))
    for place, part in along("dp", np.split(weight.reshape(-1), 2)).items():
        same(two[place], {"flat": part})


@pytest.mark.parametrize("mesh", [{"tp": 2, "dp": 2}, {"tp": 1, "dp": 4}, {"tp": 4, "dp": 1}])
def test_shard_hy_along_several_dims(mesh):
    text = program("mesh tp dp\nsize a b\nw [a/tp, b/dp] <-> w [a, b]")
    weight = numbers(8, 12)

    def grid(tp, dp):
        return {
            at(tp=i, dp=j): {"w": block}
            for i, rows in enumerate(np.split(weight, tp))
            for j, block in enumerate(np.split(rows, dp, axis=1))
        }

    whole = gather(text, grid(2, 2), mesh=Mesh({"tp": 2, "dp": 2}))
    same(whole, {"w": weight})
    made = scatter(text, whole, mesh=Mesh(mesh))
    for place, state in grid(**mesh).items():
        same(made[place], state)


def test_shard_nc_fused_experts_cut_inside_each_expert():
    """``[n_experts * hidden_out, hidden_in]``, of which every rank has its part of every expert."""
    text = program("mesh tp\nsize experts out in\nw [experts out/tp, in] <-> w [experts, out, in]")
    weight = numbers(3, 8, 5)

    def cut(ranks):
        parts = np.split(weight, ranks, axis=1)
        return along("tp", [{"w": part.reshape(-1, 5)} for part in parts])

    whole = gather(text, cut(2), mesh=Mesh({"tp": 2}), sizes={"experts": 3})
    same(whole, {"w": weight})
    made = scatter(text, whole, mesh=Mesh({"tp": 4}))
    for place, state in cut(4).items():
        same(made[place], state)
    plain = np.concatenate([state["w"] for state in cut(2).values()])
    assert not np.array_equal(plain, weight.reshape(-1, 5)), "joined end to end it would be another tensor"


GQA = program(
    "mesh tp\nsize heads groups d hidden\n"
    "qkv [heads/tp d + groups/tp d + groups/tp d, hidden] "
    "<-> q [heads d, hidden], k [groups d, hidden], v [groups d, hidden]"
)


def test_shard_nc_fused_queries_keys_and_values_of_different_sizes():
    """``[q + k + v, hidden]`` with q larger than k and v, each cut by itself."""
    q, k, v = numbers(24, 5), numbers(12, 5, start=1000), numbers(12, 5, start=2000)

    def cut(ranks):
        each = zip(*(np.split(part, ranks) for part in (q, k, v)), strict=True)
        return along("tp", [{"qkv": np.concatenate(parts)} for parts in each])

    sizes = {"heads": 8, "groups": 4}
    whole = gather(GQA, cut(2), mesh=Mesh({"tp": 2}), sizes=sizes)
    same(whole, {"q": q, "k": k, "v": v})
    made = scatter(GQA, whole, mesh=Mesh({"tp": 4}), sizes=sizes)
    for place, state in cut(4).items():
        same(made[place], state)


def test_shard_nc_as_one_tensor_that_keeps_its_fused_rows():
    """Where the model computes with the fused tensor, it stays one: which rows each rank has is recorded."""
    text = program("mesh tp\nsize rows unit hidden\nqkv [rows@tp unit, hidden] <-> qkv [rows unit, hidden]")
    fused = numbers(16 * 3, 5)
    held = {0: (0, 1, 2, 3, 8, 9, 12, 13), 1: (4, 5, 6, 7, 10, 11, 14, 15)}
    blocks = fused.reshape(16, 3, 5)
    shards = along("tp", [{"qkv": blocks[list(rows)].reshape(-1, 5)} for rows in held.values()])
    asked = {"sizes": {"rows": 16, "unit": 3}, "placements": {("rows", "tp"): held}}
    whole = gather(text, shards, mesh=Mesh({"tp": 2}), **asked)
    same(whole, {"qkv": fused})
    made = scatter(text, whole, mesh=Mesh({"tp": 2}), **asked)
    for place, state in shards.items():
        same(made[place], state)


def test_more_ranks_than_groups_hold_copies_of_keys_and_values():
    text = program(
        "mesh tp\naxis tp = kv * rep\nsize groups r d hidden\nlet kv = min(tp, groups)\n"
        "qkv [groups/kv r/rep d + groups/kv d + groups/kv d, hidden] "
        "<-> q [groups r d, hidden], k [groups d, hidden], v [groups d, hidden]"
    )
    q, k, v = numbers(2 * 4 * 3, 5), numbers(2 * 3, 5, start=1000), numbers(2 * 3, 5, start=2000)
    sizes = {"groups": 2, "r": 4}

    def cut(ranks):
        keys, values = np.split(k, 2), np.split(v, 2)
        parts = [
            (part, keys[rank * 2 // ranks], values[rank * 2 // ranks]) for rank, part in enumerate(np.split(q, ranks))
        ]
        return along("tp", [{"qkv": np.concatenate(part)} for part in parts])

    whole = gather(text, cut(4), mesh=Mesh({"tp": 4}), sizes=sizes)
    same(whole, {"q": q, "k": k, "v": v})
    made = scatter(text, whole, mesh=Mesh({"tp": 8}), sizes=sizes)
    for place, state in cut(8).items():
        same(made[place], state)
    damaged = cut(4)
    damaged[at(tp=3)]["qkv"][-1] += 1
    with pytest.raises(ConflictError):
        gather(text, damaged, mesh=Mesh({"tp": 4}), sizes=sizes)


def test_a_shard_of_the_wrong_size_is_no_pattern():
    shards = along("tp", [{"qkv": numbers(24, 5)}, {"qkv": numbers(23, 5)}])
    with pytest.raises(UcpError):
        gather(GQA, shards, mesh=Mesh({"tp": 2}), sizes={"heads": 8, "groups": 4})


def test_a_rank_that_is_missing_is_a_hole():
    shards = along("tp", [{"qkv": numbers(24, 5)}])
    with pytest.raises(FitError):
        gather(GQA, shards, mesh=Mesh({"tp": 2}), sizes={"heads": 8, "groups": 4})
