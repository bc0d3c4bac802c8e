"""What ``universal_checkpoint_info`` says, as programs: shards that NumPy cut here are put together again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.converters.deepspeed.cut_arrays import (
    SUBS,
    Array,
    affine,
    affine_info,
    check,
    cut,
    cut_parts,
    joined,
    sub,
    taken,
    text,
    translation,
    whole,
)
from ucp.converters._deepspeed.affine import from_affine
from ucp.converters._deepspeed.cuts import Along, Whole, fused
from ucp.errors import ConflictError, ContentError, CorruptError, FitError, UcpError
from ucp.lang import format_program, parse

MEGATRON = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 5,
    "padded_vocab_size": 8,
    "vocabulary_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight"],
    "pipeline_replicated_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight"],
    "tp_replicated_parameter_patterns": [r"\d+.input_layernorm.weight", r"\d+.weight"],
    "parameter_to_average_patterns": [r"alibi"],
    "parameter_with_row_parallelism_patterns": [r"\d+.mlp.dense_4h_to_h.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+.mlp.dense_h_to_4h.weight"],
}


def megatron() -> tuple[dict[str, list[Array]], dict[str, Array]]:
    """Shards and what they are parts of."""
    words, down, up, qkv, norm = whole(5, 4), whole(4, 6), whole(12, 4), whole(6, 4), whole(4)
    padded = np.concatenate([words, np.full((3, 4), -1, np.float32)])
    shards = {
        "tied_modules.embed.word_embeddings.weight": cut(padded, 0),
        "alibi": [np.full(3, 1.0, np.float32), np.full(3, 4.0, np.float32)],
        "9.weight": [norm, norm],
    }
    expected = {
        "tied_modules.embed.word_embeddings.weight": words,
        "alibi": np.full(3, 2.5, np.float32),
        "9.weight": norm,
    }
    for layer in (1, 2, 10):
        shards |= {
            f"{layer}.input_layernorm.weight": [norm, norm],
            f"{layer}.mlp.dense_4h_to_h.weight": cut(down, 1),
            f"{layer}.mlp.dense_h_to_4h.weight": cut_parts(up, 0, [[3, 3], [3, 3]]),
            f"{layer}.qkv.weight": cut(qkv, 0),
        }
        names = ["input_layernorm.weight", "mlp.dense_4h_to_h.weight", "mlp.dense_h_to_4h.weight", "qkv.weight"]
        expected |= {f"{layer}.{name}": value for name, value in zip(names, (norm, down, up, qkv), strict=True)}
    return shards, expected


@pytest.mark.parametrize("version", [0.1, 0.2, 0.3, 0.4])
def test_every_list_of_every_version(version: float) -> None:
    shards, expected = megatron()
    check({**MEGATRON, "universal_checkpoint_version": version}, shards, expected)


def test_names_that_differ_in_numbers_are_one_rule() -> None:
    shards, _ = megatron()
    program = text(MEGATRON, shards)
    names = [line.split()[0] for line in program.splitlines() if line and not line.startswith(" ")]
    rules = [name for name in names if "." in name or name == "alibi"]
    assert rules == [
        "tied_modules.embed.word_embeddings.weight",
        "alibi",
        "9.weight",
        "{l}.input_layernorm.weight",
        "{l}.mlp.dense_4h_to_h.weight",
        "{l}.mlp.dense_h_to_4h.weight",
        "{l}.qkv.weight",
    ]
    assert "[2 rows6/tp, cols4]" in program
    assert "[(rows5 + _)/tp, cols4]" in program
    assert "mean tp" in program
    assert format_program(parse(program)) == program


def test_layers_that_are_cut_otherwise_keep_their_numbers() -> None:
    shards = {f"{layer}.w": cut(whole(4 + 2 * (layer == 2), 3), 0) for layer in (1, 2, 3)}
    check({}, shards, {name: np.concatenate(parts) for name, parts in shards.items()})
    assert "{" not in text({}, shards)


def test_a_pattern_of_numbers_matches_no_other_name() -> None:
    shards = {"a.1.w": cut(whole(4, 2), 0), "a.2.w": cut(whole(4, 2), 0), "a.last.w": cut(whole(4, 2), 1)}
    info = {"parameter_with_row_parallelism_patterns": ["a.last"]}
    check(info, shards, {name: whole(4, 2) for name in shards})
    assert "{" not in text(info, shards)


@pytest.mark.parametrize("version", [0.2, 0.3, 0.4])
@pytest.mark.parametrize("rank_dims", [2, 3])
def test_experts_fused_in_one_tensor_and_cut_inside(version: float, rank_dims: int) -> None:
    """The paper's fused experts: (experts, hidden_out, hidden_in) with hidden_out cut; stock 0.4 refuses it."""
    full = whole(3, 4, 5)
    parts = cut(full, 1)
    if rank_dims == 2:
        full, parts = full.reshape(12, 5), [part.reshape(6, 5) for part in parts]
    check({"universal_checkpoint_version": version, SUBS: [sub((3, 4, 5), 1)]}, {"w": parts}, {"w": full})


@pytest.mark.parametrize("version", [0.2, 0.3, 0.4])
def test_grouped_query_attention_in_one_tensor(version: float) -> None:
    """The paper's fused attention: ((q, k, v), hidden) with q larger than k and v; stock 0.4 refuses it."""
    full = whole(16, 3)
    parts = cut_parts(full, 0, [[4, 4], [2, 2], [2, 2]])
    info = {"universal_checkpoint_version": version, SUBS: [sub(((8, 4, 4), 3), 0)]}
    check(info, {"w": parts}, {"w": full})
    assert "[blocks8@tp unit2, cols3]" in text(info, {"w": parts})


def test_counted_parts_of_older_metadata() -> None:
    full = whole(12, 3)
    parts = cut_parts(full, 0, [[2, 2], [2, 2], [2, 2]])
    check({"universal_checkpoint_version": 0.3, SUBS: [sub((3, -1), 0)]}, {"w": parts}, {"w": full})
    check({"universal_checkpoint_version": 0.2, SUBS: [sub((3, 3), 0)]}, {"w": parts}, {"w": full})


@pytest.mark.parametrize("shape", [((5, 3, 3), -1), ((5, 3, 3), 4)])
def test_recorded_widths(shape: Sequence[Any]) -> None:
    full = whole(11, 4)
    widths = [[3, 2], [2, 1], [2, 1]]
    info = {"universal_checkpoint_version": 0.4, SUBS: [sub(shape, 0)], "sub_param_shard_widths": {"w": widths}}
    check(info, {"w": cut_parts(full, 0, widths)}, {"w": full})


def test_uneven_contiguous_cuts_are_recorded_boundaries() -> None:
    shards = {
        "k": [whole(4, 3)[:3], whole(4, 3)[3:]],
        "q": [whole(4, 3)[:1], whole(4, 3)[1:]],
        "v": cut(whole(4, 3), 0),
    }
    check({}, shards, {name: whole(4, 3) for name in shards})
    made = translation({}, shards)
    assert sorted(made.cuts.values()) == [(0, 1, 4), (0, 3, 4)]


def test_a_vocabulary_padded_unevenly() -> None:
    full = whole(7, 2)
    padded = np.concatenate([full, np.zeros((2, 2), np.float32)])
    info = {"vocabulary_parameter_patterns": ["e"], "original_vocab_size": 7}
    check(info, {"e": [padded[:5], padded[5:]]}, {"e": full})
    check({**info, "tp_replicated_parameter_patterns": ["e"]}, {"e": [padded, padded]}, {"e": full})
    check({**info, "parameter_with_row_parallelism_patterns": ["e"]}, {"e": cut(padded, 1)}, {"e": full})


def test_buffers_and_scalars_that_nothing_names_are_replicas() -> None:
    shards = {"freq": [whole(3), whole(3)], "n": [np.float32(2).reshape(()), np.float32(2).reshape(())]}
    found = joined({}, shards, {"freq": "buffer"})
    assert found["freq"].shape == (3,)
    assert found["n"].shape == ()


def test_replicas_that_differ_are_a_conflict() -> None:
    with pytest.raises(ConflictError):
        joined({"tp_replicated_parameter_patterns": ["n"]}, {"n": [whole(3), whole(3) + 1]})


@pytest.mark.parametrize(
    "runs",
    [
        [[(0, 3)], [(3, 3)]],
        [[(0, 4)], [(4, 2)]],
        [[(0, 6)], []],
        [[(0, 1), (2, 2)], [(1, 1), (4, 2)]],
        [[(0, 1), (2, 1), (4, 1)], [(1, 1), (3, 1), (5, 1)]],
        [[(4, 2), (0, 2)], [(2, 2)]],
    ],
    ids=["even", "uneven", "one has all", "fused", "equal parts", "gathered out of order"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_affine_maps(runs: list[list[tuple[int, int]]], dim: int) -> None:
    shape = (6, 4) if dim == 0 else (4, 6)
    full = whole(*shape)
    check(affine_info(affine(shape, dim, runs)), {"w": taken(full, dim, runs)}, {"w": full})


def test_an_affine_map_of_replicas() -> None:
    entry = affine((4, 3), 0, [[(0, 4)], [(0, 4)]])
    assert from_affine(entry, [(4, 3), (4, 3)], "w") == Whole()
    check(affine_info(entry), {"w": [whole(4, 3), whole(4, 3)]}, {"w": whole(4, 3)})


def test_blocks_that_several_ranks_hold_inside_a_fused_tensor_are_replicas() -> None:
    """GPT-BigCode: queries are cut, the one key and value head is whole on every rank."""
    runs = [[(0, 2), (4, 1)], [(2, 2), (4, 1)]]
    info, parts = affine_info(affine((5, 3), 0, runs)), taken(whole(5, 3), 0, runs)
    check(info, {"w": parts}, {"w": whole(5, 3)})
    parts[1][2] += 1
    with pytest.raises(ConflictError):
        joined(info, {"w": parts})


def test_a_map_goes_before_the_lists() -> None:
    info = {**affine_info(affine((4, 6), 1, [[(0, 3)], [(3, 3)]])), "tp_replicated_parameter_patterns": ["w"]}
    check(info, {"w": cut(whole(4, 6), 1)}, {"w": whole(4, 6)})


@st.composite
def fused_cuts(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    tp = draw(st.integers(2, 4))
    return draw(st.integers(0, 2)), draw(
        st.lists(st.lists(st.integers(0, 4), min_size=tp, max_size=tp), min_size=1, max_size=4)
    )


@given(fused_cuts(), st.integers(1, 3))
def test_any_parts_of_any_widths(case: tuple[int, list[list[int]]], other: int) -> None:
    dim, parts = case
    cut_so = fused(dim, parts)
    if not cut_so.size:
        return
    shape = [other] * 3
    shape[dim] = cut_so.size
    full = whole(*shape)
    check(affine_info(affine(shape, dim, cut_so.runs)), {"w": cut_parts(full, dim, parts)}, {"w": full})


# What is refused, each with what to do.


VERSION = "universal_checkpoint_version"


@pytest.mark.parametrize(
    ("info", "shapes", "error", "match"),
    [
        ({VERSION: 0.5}, [(2,), (2,)], FitError, "newer than 0.4"),
        ({VERSION: "x"}, [(2,), (2,)], CorruptError, "is a str"),
        ({"affine_map": {"version": 2}}, [(2,), (2,)], FitError, "affine_map of version 2"),
        ({"expert_parameter_patterns": ["w"]}, [(2,), (2,)], FitError, "experts"),
        ({"autotp_unsupported_parameter_patterns": {"^w$": "shared QK"}}, [(2,), (2,)], FitError, "shared QK"),
        ({"tp_replicated_parameter_patterns": ["w", "^w$"]}, [(2,), (2,)], FitError, "2 patterns"),
        ({"tp_replicated_parameter_patterns": [3]}, [(2,), (2,)], CorruptError, "something else than patterns"),
        ({"tp_replicated_parameter_patterns": ["("]}, [(2,), (2,)], FitError, "no regular expression"),
        ({"tp_replicated_parameter_patterns": ["w"]}, [(2,), (3,)], CorruptError, "replicated"),
        ({"parameter_with_row_parallelism_patterns": ["w"]}, [(2,), (2,)], CorruptError, "along dim 1"),
        ({"parameter_with_2_sub_params_cat_dim_0": ["w"]}, [(3, 2), (3, 2)], FitError, "two halves"),
        ({"vocabulary_parameter_patterns": ["w"]}, [(3, 2), (3, 2)], FitError, "no original_vocab_size"),
        (
            {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 7},
            [(3, 2), (3, 2)],
            CorruptError,
            "6 rows for a vocabulary of 7",
        ),
        ({}, [(2, 3), (2, 4)], CorruptError, "do not join along dim 0"),
        ({SUBS: [sub(((4, 3, 3), 2), 0)]}, [(5, 2), (5, 2)], FitError, "unevenly over 2 ranks"),
        ({SUBS: [sub(((4, 4), 2), 0)]}, [(5, 2), (5, 2)], CorruptError, "20 elements in a view"),
        ({SUBS: [sub((3, -1), 0)]}, [(5, 2), (5, 2)], CorruptError, "3 equal sub-parameters"),
        ({SUBS: [sub((-1, -1), 0)]}, [(5, 2), (5, 2)], FitError, "more than one size open"),
        ({SUBS: [sub((4, 4), 2)]}, [(5, 2), (5, 2)], CorruptError, "partition_dim 2"),
        (
            {SUBS: [sub(((4, 6), 2), 0)], "sub_param_shard_widths": {"w": [[2, 2], [2, 4]]}},
            [(5, 2), (5, 2)],
            CorruptError,
            "do not hold shards",
        ),
        (
            {SUBS: [sub(((4, 6), 2), 0)], "sub_param_shard_widths": {"w": [[2, 2, 2]]}},
            [(5, 2), (5, 2)],
            CorruptError,
            "not the widths",
        ),
        (affine_info(affine((4, 2), 0, [[(0, 2)], [(2, 2)]], scale=0.5)), [(2, 2), (2, 2)], FitError, "scaled"),
        (affine_info(affine((4, 2), 0, [[(0, 2)], [(1, 2)]])), [(2, 2), (2, 2)], CorruptError, "do not hold all"),
        (affine_info(affine((4, 2), 0, [[(0, 2)], [(3, 2)]])), [(2, 2), (2, 2)], CorruptError, "outside"),
        (affine_info(affine((4, 2), 0, [[(0, 2)], [(2, 2)]])), [(2, 2), (1, 2)], CorruptError, "holds? 2 indices"),
        (affine_info(affine((4, 2), 0, [[(0, 2)], [(2, 2)]])), [(2, 1), (2, 1)], FitError, "not cut along one dim"),
        (affine_info({"logical_shape": [4], "ranks": {0: {}}}), [(2,), (2,)], CorruptError, "describes ranks"),
        (affine_info({"logical_shape": [4], "ranks": {0: {}, 1: {}}}), [(2,), (2,)], CorruptError, "where a list"),
    ],
)
def test_what_cannot_be_is_refused(
    info: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], error: type[UcpError], match: str
) -> None:
    with pytest.raises(error, match=match):
        translation(info, {"w": [np.zeros(shape, np.float32) for shape in shapes]})


def random_tree(draw: Callable[..., Any]) -> Any:
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(["w", "^w$", "(", r"\d+"])
    )
    keys = st.sampled_from(
        [*MEGATRON, SUBS, "affine_map", "params", "version", "ranks", "shape", "patterns", "w", 0, 1]
    )
    return draw(
        st.recursive(
            leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=9
        )
    )


@given(st.data())
def test_whatever_the_metadata_holds_the_error_is_typed(data: st.DataObject) -> None:
    keys = [*MEGATRON, SUBS, "affine_map", "sub_param_shard_widths", "autotp_unsupported_parameter_patterns", VERSION]
    info = {key: random_tree(data.draw) for key in data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True))}
    with contextlib.suppress(ContentError, FitError):
        joined(info, {"w": cut(whole(4, 2), 0)})


def test_ranks_of_different_types_are_no_ranks() -> None:
    with pytest.raises(CorruptError, match="describes ranks"):
        from_affine({"logical_shape": [8, 4], "ranks": {"0": {}, 1: {}}}, [(4, 4), (4, 4)], "map")


def test_more_blocks_than_can_be_listed() -> None:
    shards = {"w": [np.broadcast_to(np.float32(0), (10**8 + 1, 4)), np.broadcast_to(np.float32(0), (3, 4))]}
    subs = [{"patterns": ["w"], "shape": [[3, 10**8 + 1], 4], "partition_dim": 0}]
    info = {"parameter_with_sub_params": subs, "sub_param_shard_widths": {"w": [[1, 2], [10**8, 1]]}}
    with pytest.raises(FitError, match="blocks, more than"):
        translation(info, shards)


def test_cuts_know_their_shape() -> None:
    assert fused(0, [[2, 2], [2, 2]]).parts == 2
    assert fused(0, [[2, 1], [2, 1]]).parts == 2
    assert fused(0, [[2, 2], [1, 1]]).parts is None
    assert fused(0, [[2, 2], [1, 1]]).unit == 1
    assert fused(0, [[4, 4], [2, 2]]).unit == 2
    assert Along(0, 4, (((0, 2),), ((2, 2),))).boundaries == (0, 2, 4)
    assert Along(0, 4, (((2, 2),), ((0, 2),))).boundaries is None
