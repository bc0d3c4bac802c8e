"""What a program makes of shards, against arrays put together by hand, whole shards and ZeRO's flat ranges alike."""

from __future__ import annotations

import numpy as np
import pytest

from tests.mapping.made import numbers, put_together, read, whole, zero
from ucp.errors import FitError
from ucp.layout import Mesh

TP = [(("tp", 0),), (("tp", 1),)]
CUTS = pytest.mark.parametrize("cut", [whole, zero(3)], ids=["whole", "zero"])


def with_states(shards):
    """`shards` with an optimizer state that differs from the value everywhere."""
    return {at: {name: {"value": a, "exp_avg": a + 100} for name, a in held.items()} for at, held in shards.items()}


def check(folder, program, shards, expected, *, cut=whole, tp=2, **options):
    text = f"format 1\nmesh tp\nstate exp_avg : like param\n{program}"
    catalog, store = put_together(folder, text, with_states(shards), mesh=Mesh({"tp": tp}), cut=cut, **options)
    assert set(catalog.tensors) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(read(catalog, store, name), array, err_msg=name)
        np.testing.assert_array_equal(read(catalog, store, name, "exp_avg"), array + 100, err_msg=name)
    return catalog


@CUTS
def test_fused_query_key_value_with_grouped_heads(tmp_path, cut):
    """Megatron interleaves them by group; each rank holds whole groups."""
    groups, r, d, hidden = 4, 3, 2, 6
    fused = numbers(groups, r + 2, d, hidden)
    shards = {at: {"qkv": half.reshape(-1, hidden)} for at, half in zip(TP, np.split(fused, 2), strict=True)}
    catalog = check(
        tmp_path,
        "size groups hidden d r\n"
        "qkv [groups/tp (r d + d + d), hidden] <-> q [groups r d, hidden], k [groups d, hidden], v [groups d, hidden]",
        shards,
        {
            "q": fused[:, :r].reshape(-1, hidden),
            "k": fused[:, r].reshape(-1, hidden),
            "v": fused[:, r + 1].reshape(-1, hidden),
        },
        cut=cut,
        sizes={"d": d, "r": r},
    )
    assert catalog.tensors["q"].dims == ("groups r d", "hidden")
    assert catalog.param_groups[0].params == ("q", "k", "v")


@CUTS
def test_gate_and_up_are_joined_on_each_rank(tmp_path, cut):
    gate, up = numbers(8, 3), numbers(8, 3, seed=1)
    halves = zip(TP, np.split(gate, 2), np.split(up, 2), strict=True)
    check(
        tmp_path,
        "size ffn hidden\nfc1 [ffn/tp + ffn/tp, hidden] <-> gate [ffn, hidden], up [ffn, hidden]",
        {at: {"fc1": np.concatenate([g, u])} for at, g, u in halves},
        {"gate": gate, "up": up},
        cut=cut,
    )


@CUTS
def test_gate_and_up_joined_before_they_are_cut(tmp_path, cut):
    gate, up = numbers(8, 3), numbers(8, 3, seed=1)
    shards = zip(TP, np.split(np.concatenate([gate, up]), 2), strict=True)
    check(
        tmp_path,
        "size ffn hidden\nfc1 [(ffn + ffn)/tp, hidden] <-> gate [ffn, hidden], up [ffn, hidden]",
        {at: {"fc1": half} for at, half in shards},
        {"gate": gate, "up": up},
        cut=cut,
    )


@CUTS
def test_rotary_halves_are_put_in_another_order(tmp_path, cut):
    heads, half, hidden = 4, 3, 5
    split = numbers(heads, 2, half, hidden)
    shards = {at: {"q": part.reshape(-1, hidden)} for at, part in zip(TP, np.split(split, 2), strict=True)}
    check(
        tmp_path,
        "size heads half hidden\nq [heads/tp 2 half, hidden] <-> q [heads half 2, hidden]",
        shards,
        {"q": split.transpose(0, 2, 1, 3).reshape(-1, hidden)},
        cut=cut,
        sizes={"heads": heads},
    )


@CUTS
def test_a_convolution_of_one_position_is_transposed(tmp_path, cut):
    weight = numbers(6, 8)
    shards = {at: {"fc": part} for at, part in zip(TP, np.split(weight, 2, axis=1), strict=True)}
    program = "size hidden ffn\nfc [hidden, ffn/tp] <-> fc [ffn, hidden]"
    check(tmp_path, program, shards, {"fc": weight.T}, cut=cut)


@CUTS
def test_experts_by_number_are_stacked(tmp_path, cut):
    experts = numbers(6, 4, 5)
    shards = {(("ep", rank),): {f"experts.{i}.w": experts[3 * rank + i] for i in range(3)} for rank in range(2)}
    text = "format 1\nmesh ep\nsize e ffn hidden\nexperts.{e/ep}.w [ffn, hidden] <-> moe.w [e, ffn, hidden]"
    catalog, store = put_together(tmp_path, text, shards, mesh=Mesh({"ep": 2}), cut=cut)
    np.testing.assert_array_equal(read(catalog, store, "moe.w"), experts)
    assert catalog.param_groups[0].params == ("moe.w",)


@CUTS
def test_padding_is_in_no_tensor(tmp_path, cut):
    vocabulary = numbers(7, 4)
    padded = np.concatenate([vocabulary, np.full((3, 4), np.nan, "<f4")])
    program = "size vocab hidden\nembed [(vocab + _)/tp, hidden] <-> embed [vocab, hidden]"
    shards = {at: {"embed": part} for at, part in zip(TP, np.split(padded, 2), strict=True)}
    check(tmp_path, program, shards, {"embed": vocabulary}, cut=cut, sizes={"vocab": 7})


def test_layers_of_pipeline_stages_are_numbered_anew(tmp_path):
    layers = [numbers(3, seed=i) for i in range(4)]
    shards = {(("pp", stage),): {f"layers.{i}.b": layers[2 * stage + i] for i in range(2)} for stage in range(2)}
    text = "format 1\nmesh pp\nsize l n\nlayers.{l/pp}.b [n] <-> blocks.{l}.bias [n]"
    catalog, store = put_together(tmp_path, text, shards, mesh=Mesh({"pp": 2}))
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(read(catalog, store, f"blocks.{i}.bias"), layer)


def test_what_ranks_hold_is_averaged_and_so_are_its_states(tmp_path):
    shards = {at: {"norm": numbers(5, seed=i)} for i, at in enumerate(TP)}
    mean = (numbers(5).astype("f8") + numbers(5, seed=1)) / 2
    text = "format 1\nmesh tp\nsize n\nstate exp_avg : like param\nnorm [n] mean tp -> norm [n]"
    catalog, store = put_together(tmp_path, text, with_states(shards), mesh=Mesh({"tp": 2}))
    np.testing.assert_array_equal(read(catalog, store, "norm"), mean.astype("<f4"))
    assert "the mean of what ranks hold: 1 tensor, norm" in catalog.notes
    low, high = ((shards[at]["norm"] + np.float32(100)).astype("f8") for at in TP)
    np.testing.assert_array_equal(read(catalog, store, "norm", "exp_avg"), ((low + high) / 2).astype("<f4"))


def test_a_wrong_shape_does_not_fit(tmp_path):
    shards = {TP[0]: {"w": numbers(4, 3)}, TP[1]: {"w": numbers(4, 2)}}
    text = "format 1\nmesh tp\nsize a b\nw [a/tp, b] <-> w [a, b]"
    with pytest.raises(FitError, match="w"):
        put_together(tmp_path, text, shards, mesh=Mesh({"tp": 2}))


def test_a_missing_rank_is_a_hole(tmp_path):
    text = "format 1\nmesh tp\nsize a\nw [a/tp] <-> w [a]"
    with pytest.raises(FitError, match="w"):
        put_together(tmp_path, text, {TP[0]: {"w": numbers(4)}}, mesh=Mesh({"tp": 2}))
