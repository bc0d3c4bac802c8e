"""Each construct of the language by a small example that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from ucp.errors import ConflictError, FitError
from ucp.lang import parse
from ucp.lang.arrays import Array, at, gather, scatter
from ucp.lang.bind import bind
from ucp.lang.export import export
from ucp.lang.held import Held
from ucp.layout import Mesh


def tensor(*shape: int) -> Array:
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def test_factored_axis_replicates_keys_over_more_ranks_than_there_are_groups() -> None:
    """tp = kv * rep: q is cut by both, k and v by kv alone (2 groups on 4 ranks)."""
    program = parse(
        "format 1\nmesh tp\naxis tp = kv * rep\nsize groups r d h\nlet kv = min(tp, groups)\n"
        "qkv [groups/kv r/rep d + groups/kv d + groups/kv d, h]"
        " <-> q [groups r d, h], k [groups d, h], v [groups d, h]\n"
    )
    whole = {"q": tensor(16, 3), "k": 100 + tensor(8, 3), "v": 200 + tensor(8, 3)}
    sizes = {"groups": 2, "r": 2, "d": 4, "h": 3}
    shards = scatter(program, whole, mesh=Mesh({"tp": 4}), sizes=sizes)
    assert (shards[at(tp=1)]["qkv"] == np.concatenate([whole["q"][4:8], whole["k"][:4], whole["v"][:4]])).all()
    back = gather(program, shards, mesh=Mesh({"tp": 4}), sizes=sizes)
    assert all((back[name] == array).all() for name, array in whole.items())
    shards[at(tp=3)]["qkv"][5] += 1
    with pytest.raises(ConflictError, match=r"k: qkv at tp 3 differs"):
        gather(program, shards, mesh=Mesh({"tp": 4}), sizes=sizes)
    one = scatter(program, whole, mesh=Mesh({"tp": 1}), sizes=sizes)
    assert (one[at(tp=0)]["qkv"] == np.concatenate([whole["q"], whole["k"], whole["v"]])).all()


def test_uneven_cuts_are_read_off_the_shards() -> None:
    program = parse("format 1\nmesh tp\nsize k d h\nw [k/tp d, h] <-> w [k d, h]\n")
    whole = tensor(12, 2)
    shards = {at(tp=0): {"w": whole[:8]}, at(tp=1): {"w": whole[8:]}}
    back = gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"d": 4})
    assert (back["w"] == whole).all()
    with pytest.raises(FitError, match="cannot cut evenly"):
        scatter(program, {"w": whole}, mesh=Mesh({"tp": 2}), sizes={"d": 4})
    again = scatter(program, {"w": whole}, mesh=Mesh({"tp": 2}), cuts={("k", ("tp",)): (0, 2, 3)})
    assert all((again[place]["w"] == shards[place]["w"]).all() for place in shards)


def test_stages_of_different_depth() -> None:
    program = parse("format 1\nmesh pp\nsize h\nlayer.{l/pp}.w [h] <-> layers.{l}.w\n")
    shards = {
        at(pp=0): {"layer.0.w": tensor(2)},
        at(pp=1): {"layer.0.w": 10 + tensor(2), "layer.1.w": 20 + tensor(2), "layer.2.w": 30 + tensor(2)},
    }
    back = gather(program, shards, mesh=Mesh({"pp": 2}))
    assert [back[f"layers.{n}.w"][0] for n in range(4)] == [1, 11, 21, 31]
    with pytest.raises(FitError, match=r"l is 5 \(given\), but names show"):
        gather(program, shards, mesh=Mesh({"pp": 2}), sizes={"l": 5})


def test_a_gap_in_the_layers_of_a_stage_is_refused() -> None:
    program = parse("format 1\nmesh pp\nsize h\nlayer.{l/pp}.w [h] <-> layers.{l}.w\n")
    shards = {at(pp=0): {"layer.0.w": tensor(2), "layer.2.w": tensor(2)}, at(pp=1): {"layer.0.w": tensor(2)}}
    with pytest.raises(FitError, match="no tensor has l 1 at pp 0"):
        gather(program, shards, mesh=Mesh({"pp": 2}))


def test_placements_recorded_per_rank() -> None:
    """Fully sharded sparse data parallelism: any set and number of experts on a rank, and some on two."""
    program = parse("format 1\nmesh ep\nsize h\nexperts.{e@ep}.w [h] <-> moe.w [e, h]\n")
    whole = tensor(4, 2)
    placements = {("e", "ep"): {0: (3, 0, 1), 1: (), 2: (2, 0)}}
    sizes = {"e": 4}
    shards = scatter(program, {"moe.w": whole}, mesh=Mesh({"ep": 3}), sizes=sizes, placements=placements)
    assert [len(shards[at(ep=n)]) for n in range(3)] == [3, 0, 2]
    assert (shards[at(ep=0)]["experts.0.w"] == whole[3]).all()
    back = gather(program, shards, mesh=Mesh({"ep": 3}), placements=placements)
    assert (back["moe.w"] == whole).all()
    with pytest.raises(FitError, match=r"e is 5 \(given\), but the largest e in its recorded placement is 3"):
        gather(program, shards, mesh=Mesh({"ep": 3}), sizes={"e": 5}, placements=placements)
    shards[at(ep=2)]["experts.1.w"][0] += 1
    with pytest.raises(ConflictError):
        gather(program, shards, mesh=Mesh({"ep": 3}), sizes=sizes, placements=placements)


def test_placed_rows_of_one_tensor_may_be_copies_too() -> None:
    """A fused tensor whose keys are on every rank: rows 4 and 5 twice."""
    program = parse("format 1\nmesh tp\nsize qkv h\nw [qkv@tp, h] <-> w [qkv, h]\n")
    whole = tensor(6, 2)
    placements = {("qkv", "tp"): {0: (0, 1, 4, 5), 1: (2, 3, 4, 5)}}
    shards = {at(tp=0): {"w": whole[[0, 1, 4, 5]]}, at(tp=1): {"w": whole[[2, 3, 4, 5]]}}
    back = gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"qkv": 6}, placements=placements)
    assert (back["w"] == whole).all()
    shards[at(tp=1)]["w"][3] += 1
    with pytest.raises(ConflictError):
        gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"qkv": 6}, placements=placements)


def test_mean_needs_every_copy() -> None:
    program = parse("format 1\nmesh tp\nsize h\nb [h] mean tp <-> b\n")
    shards = {at(tp=n): {"b": np.full(3, float(n), np.float32)} for n in range(4)}
    assert (gather(program, shards, mesh=Mesh({"tp": 4}))["b"] == 1.5).all()
    del shards[at(tp=2)]
    with pytest.raises(FitError, match="a mean over tp needs 4 copies, 3 are there"):
        gather(program, shards, mesh=Mesh({"tp": 4}))


def test_any_takes_the_first_copy() -> None:
    shards = {at(tp=n): {"b": np.full(3, float(n), np.float32)} for n in range(2)}
    program = parse("format 1\nmesh tp\nsize h\nb [h] any tp <-> b\n")
    assert (gather(program, shards, mesh=Mesh({"tp": 2}))["b"] == 0).all()
    with pytest.raises(ConflictError):
        gather(parse("format 1\nmesh tp\nsize h\nb [h] <-> b\n"), shards, mesh=Mesh({"tp": 2}))


def test_a_sum_is_import_only() -> None:
    program = parse("format 1\nmesh dp\nsize h\ngrad [h] sum dp -> grad\n")
    shards = {at(dp=n): {"grad": np.full(2, float(n + 1), np.float32)} for n in range(3)}
    assert (gather(program, shards, mesh=Mesh({"dp": 3}))["grad"] == 6).all()
    with pytest.raises(FitError, match="writes it"):
        scatter(program, {"grad": tensor(2)}, mesh=Mesh({"dp": 3}))


def test_factored_states_lack_a_dim() -> None:
    """Adafactor's row and column factors of a matrix that is cut by rows."""
    program = parse(
        "format 1\nmesh tp\nsize a b\nw [a/tp, b] <-> w\n"
        "state row : like param lacking -1\nstate col : like param lacking -2\n"
    )
    row, col = tensor(4), tensor(3)
    at0, at1 = {"tp": 0}, {"tp": 1}
    held = [Held("w", (2, 3), "float32", c) for c in (at0, at1)]
    held += [Held("w", (2,), "float32", c, "row") for c in (at0, at1)]
    held += [Held("w", (3,), "float32", c, "col") for c in (at0, at1)]
    bound = bind(program, held, mesh=Mesh({"tp": 2}))
    assert bound.tensors["w", "row"].shape == (4,) and bound.tensors["w", "col"].shape == (3,)
    assert [piece.replica for piece in bound.pieces["w", "col"]] == [0, 1]
    assert [piece.replica for piece in bound.pieces["w", "row"]] == [0, 0]
    value = {at(tp=n): {"w": tensor(2, 3)} for n in range(2)}
    assert gather(program, value, mesh=Mesh({"tp": 2}))["w"].shape == (4, 3)
    assert row.size and col.size


def test_state_of_each_replica_group_stands_beside_global_state() -> None:
    """Local-update training: every dp group has its own inner moments, the outer momentum is the same everywhere."""
    program = parse(
        "format 1\nmesh dp tp\nsize a\nw [a/tp] <-> w\nstate inner : like param each dp\nstate outer : like param\n"
    )
    held = [
        Held("w", (2,), "float32", {"dp": d, "tp": t}, state)
        for state in ("value", "inner", "outer")
        for d in range(3)
        for t in range(2)
    ]
    bound = bind(program, held, mesh=Mesh({"dp": 3, "tp": 2}))
    assert bound.tensors["w", "inner"].shape == (3, 4)
    assert bound.tensors["w", "inner"].dims == ("dp", "a")
    assert bound.tensors["w", "outer"].shape == (4,)
    assert {piece.replica for piece in bound.pieces["w", "inner"]} == {0}
    assert {piece.replica for piece in bound.pieces["w", "outer"]} == {0, 1, 2}


def test_an_axis_in_a_logical_name_keeps_what_each_rank_has() -> None:
    program = parse("format 1\nmesh dp\nsize a\nema [a] <-> ema.{dp}\n")
    shards = {at(dp=n): {"ema": n + tensor(2)} for n in range(2)}
    back = gather(program, shards, mesh=Mesh({"dp": 2}))
    assert (back["ema.1"] == 1 + tensor(2)).all()
    again = scatter(program, back, mesh=Mesh({"dp": 2}))
    assert (again[at(dp=1)]["ema"] == back["ema.1"]).all()


def test_layers_stacked_on_a_leading_dim() -> None:
    program = parse("format 1\nmesh tp\nsize f h l\nlayers.w [l, f/tp, h] <-> layers.{l}.w [h, f]\n")
    whole = {f"layers.{n}.w": 100 * n + tensor(3, 4) for n in range(3)}
    shards = scatter(program, whole, mesh=Mesh({"tp": 2}))
    assert (shards[at(tp=1)]["layers.w"][2] == whole["layers.2.w"].T[2:]).all()
    back = gather(program, shards, mesh=Mesh({"tp": 2}))
    assert all((back[name] == array).all() for name, array in whole.items())


def test_names_that_count_from_an_offset_and_computed_names() -> None:
    """Pipeline modules number embedding, layers and head in one sequence."""
    program = parse(
        "format 1\nsize h\nsize first = 2\n0.w [h] <-> embed.w\n{l+first}.w [h] <-> layers.{l}.w\n"
        "{=l+first+1}.norm [h] <-> norm\n",
        file="pipe.ucp",
    )
    held = {at(): {"0.w": tensor(2), "2.w": tensor(2), "3.w": 5 + tensor(2), "5.norm": tensor(2)}}
    back = gather(program, held, mesh=Mesh({}))
    assert back.keys() == {"embed.w", "layers.0.w", "layers.1.w", "norm"}
    again = scatter(program, back, mesh=Mesh({}))
    assert again[at()].keys() == held[at()].keys()
    held[at()]["6.norm"] = held[at()].pop("5.norm")
    with pytest.raises(FitError, match=r"6.norm"):
        gather(program, held, mesh=Mesh({}))


def test_an_axis_may_be_captured_from_a_name() -> None:
    """Chunks of an interleaved pipeline that a rank keeps under names of its own."""
    program = parse("format 1\nmesh pp vpp\nsize h\nmodel{vpp}.layers.{l/vpp/pp}.w [h] <-> layers.{l}.w\n")
    whole = {f"layers.{n}.w": n + tensor(2) for n in range(8)}
    mesh = Mesh({"pp": 2, "vpp": 2})
    shards = scatter(program, whole, mesh=mesh)
    assert (shards[at(pp=1, vpp=1)]["model1.layers.0.w"] == whole["layers.6.w"]).all()
    back = gather(program, shards, mesh=mesh)
    assert all((back[name] == array).all() for name, array in whole.items())


def test_ties_compare_both_copies() -> None:
    program = parse(
        "format 1\nmesh pp\nsize v h\nflag tied\nembed [v, h] <-> embed on pp 0\nhead [v, h] <-> head on pp -1\n"
        "tie head to embed when tied\n"
    )
    whole = tensor(3, 2)
    shards = {at(pp=0): {"embed": whole}, at(pp=1): {"head": whole.copy()}}
    back = gather(program, shards, mesh=Mesh({"pp": 2}), flags={"tied": True})
    assert back["head"] is back["embed"]
    shards[at(pp=1)]["head"] += 1
    with pytest.raises(ConflictError, match=r"embed: head at pp 1 differs"):
        gather(program, shards, mesh=Mesh({"pp": 2}), flags={"tied": True})


def test_a_tensor_with_its_own_geometry_needs_no_layout() -> None:
    program = parse("format 1\nold.{name}.weight <-> new.{name}\n")
    back = gather(program, {at(): {"old.a.weight": tensor(2, 3), "old.b.weight": tensor(4)}}, mesh=Mesh({}))
    assert back["new.a"].shape == (2, 3) and back["new.b"].shape == (4,)
    assert scatter(program, back, mesh=Mesh({}))[at()].keys() == {"old.a.weight", "old.b.weight"}


def test_padding_may_hold_anything_and_is_zero_when_written() -> None:
    program = parse("format 1\nmesh tp\nsize v h\nw [(v + _)/tp, h] <-> w [v, h]\n")
    whole = tensor(5, 2)
    shards = scatter(program, {"w": whole}, mesh=Mesh({"tp": 2}))
    assert (shards[at(tp=1)]["w"] == [[7, 8], [9, 10], [0, 0]]).all()
    shards[at(tp=1)]["w"][2] = np.nan
    assert (gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"v": 5})["w"] == whole).all()
    with pytest.raises(FitError, match="v cannot be told"):
        gather(program, shards, mesh=Mesh({"tp": 2}))
    with pytest.raises(FitError, match="6 elements were saved, but 7 are no padding"):
        gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"v": 7})


def test_padding_is_the_same_on_every_rank() -> None:
    program = parse("format 1\nmesh tp\nsize v h\nw [(v + _)/tp, h] <-> w [v, h]\n")
    shards = {at(tp=0): {"w": np.zeros((6, 2), np.float32)}, at(tp=1): {"w": np.zeros((5, 2), np.float32)}}
    with pytest.raises(FitError, match=r"w: w at tp 0 has 2 of padding over the whole tensor, but w at tp 1 has 0"):
        gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"v": 10})


def test_padding_inside_a_rank_is_its_own() -> None:
    program = parse("format 1\nmesh tp\nsize a b\nw [a/tp + _ + b/tp] <-> a, b\n")
    shards = {at(tp=0): {"w": tensor(5)}, at(tp=1): {"w": tensor(7)}}
    back = gather(program, shards, mesh=Mesh({"tp": 2}), sizes={"a": 4, "b": 4})
    assert back["a"].tolist() == [1, 2, 1, 2] and back["b"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("key", [("v", ("tp",)), ("(v+_)", ("tp",)), ("(v + _)", ("dp",)), ("h", ())])
def test_recorded_cuts_of_nothing_are_refused(key: tuple[str, tuple[str, ...]]) -> None:
    program = parse("format 1\nmesh tp dp\nsize v h\nw [(v + _)/tp, h/dp] <-> w [v, h]\n", file="pad.ucp")
    with pytest.raises(FitError, match=r"pad.ucp: a cut of .* is recorded, but the program has no such cut") as caught:
        scatter(program, {"w": tensor(4, 2)}, mesh=Mesh({"tp": 2}), cuts={key: (0, 2, 4)})
    assert "known: (v + _)/tp h/dp" in str(caught.value.hint)
    with pytest.raises(FitError, match="a placement of `h@dp` is recorded"):
        scatter(program, {"w": tensor(4, 2)}, mesh=Mesh({"tp": 2}), placements={("h", "dp"): {0: (0, 1)}})


def test_casts_are_said_on_both_sides() -> None:
    program = parse("format 1\nsize h\nw bf16[h] <-> w f32[h] lossy\n")
    bound = bind(program, [Held("w", (2,), "bfloat16")], mesh=Mesh({}))
    assert bound.tensors["w", "value"].dtype == "float32"
    with pytest.raises(FitError, match=r"w is float16, but .* says bf16"):
        bind(program, [Held("w", (2,), "float16")], mesh=Mesh({}))


def test_a_tensor_that_exists_says_how_far_it_is_padded() -> None:
    program = parse("format 1\nmesh tp\nsize v h\nw [(v + _)/tp, h] <-> w [v, h]\n")
    shapes = {"w": (5, 2)}
    here = {"tp": 1}
    for rows, held in ((3, 2), (4, 1), (8, 0)):
        exporter = export(program, shapes, mesh=Mesh({"tp": 2}), job=[Held("w", (rows, 2), "float32", here)])
        (shard,) = exporter.shards([here])
        assert shard.shape == (rows, 2)
        assert [block.block.box.shape for block in shard.blocks] == ([(held, 2)] if held else [])
    with pytest.raises(FitError, match=r"w at tp 1: .* 4 elements were saved, but 5 are no padding"):
        list(export(program, shapes, mesh=Mesh({"tp": 2}), job=[Held("w", (2, 2), "float32", here)]).shards([here]))
