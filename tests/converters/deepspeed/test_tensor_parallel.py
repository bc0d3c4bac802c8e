"""What ``universal_checkpoint_info`` says, as programs: shards that NumPy cut here are put together again."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.deepspeed_job import job_environment
from ucp.converters._deepspeed.affine import from_affine
from ucp.converters._deepspeed.cuts import Along, Whole, fused
from ucp.converters._deepspeed.info import Parameter, read_info
from ucp.converters._deepspeed.tensor_parallel import translated
from ucp.converters._deepspeed.translate import Translation
from ucp.errors import ConflictError, ContentError, CorruptError, FitError, UcpError
from ucp.lang import format_program, parse
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


SUBS = "parameter_with_sub_params"


def sub(shape: Sequence[Any], dim: int, name: str = "w") -> dict[str, Any]:
    return {"patterns": [name], "shape": shape, "partition_dim": dim}


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


MERGE = """
import sys, torch
from pathlib import Path
from deepspeed.checkpoint.ds_to_universal import merge_tp_slices
root, merged = Path(sys.argv[1]), []
for number, (info, shapes) in enumerate(torch.load(root / "asked.pt", weights_only=False)):
    folder = root / str(number)
    merge_tp_slices(info, str(folder / "out"), str(folder / "slices"), len(shapes), ("w", shapes))
    merged.append(torch.load(folder / "out" / "w" / "exp_avg.pt", weights_only=False)["param"])
torch.save(merged, root / "merged.pt")
"""

MERGED: list[tuple[Mapping[str, Any], list[Array]]] = [
    ({}, cut(whole(4, 3), 0)),
    ({"tp_replicated_parameter_patterns": ["w"]}, [whole(4, 3), whole(4, 3)]),
    ({"parameter_to_average_patterns": ["w"]}, [whole(4, 3), 3 * whole(4, 3)]),
    ({"parameter_with_row_parallelism_patterns": ["w"]}, cut(whole(4, 6), 1)),
    ({"parameter_with_2_sub_params_cat_dim_0": ["w"]}, cut_parts(whole(12, 2), 0, [[3, 3], [3, 3]])),
    ({"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 5}, cut(whole(8, 3), 0)),
    (
        {
            "vocabulary_parameter_patterns": ["w"],
            "original_vocab_size": 5,
            "parameter_with_row_parallelism_patterns": ["w"],
        },
        cut(whole(8, 4), 1),
    ),
    (
        {"universal_checkpoint_version": 0.2, SUBS: [sub(((8, 4, 4), 3), 0)]},
        cut_parts(whole(16, 3), 0, [[4, 4], [2, 2], [2, 2]]),
    ),
    ({"universal_checkpoint_version": 0.3, SUBS: [sub((3, -1), 0)]}, cut_parts(whole(12, 3), 0, [[2, 2]] * 3)),
    (
        {
            "universal_checkpoint_version": 0.4,
            SUBS: [sub(((5, 3, 3), -1), 0)],
            "sub_param_shard_widths": {"w": [[3, 2], [2, 1], [2, 1]]},
        },
        cut_parts(whole(11, 4), 0, [[3, 2], [2, 1], [2, 1]]),
    ),
    (
        affine_info(affine((4, 6), 1, [[(0, 1), (3, 2)], [(1, 2), (5, 1)]])),
        taken(whole(4, 6), 1, [[(0, 1), (3, 2)], [(1, 2), (5, 1)]]),
    ),
    (
        affine_info(affine((5, 3), 0, [[(0, 2), (4, 1)], [(2, 2), (4, 1)]])),
        taken(whole(5, 3), 0, [[(0, 2), (4, 1)], [(2, 2), (4, 1)]]),
    ),
]


@pytest.mark.slow
def test_it_is_what_deepspeeds_own_merge_makes(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; the merge is its own (pip install deepspeed)")
    for number, (_, parts) in enumerate(MERGED):
        for rank, part in enumerate(parts):
            folder = tmp_path / str(number) / "slices" / "w" / str(rank)
            folder.mkdir(parents=True)
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save(torch.from_numpy(part.reshape(-1).copy()), folder / f"{state}.00")
    torch.save([(dict(info), [part.shape for part in parts]) for info, parts in MERGED], tmp_path / "asked.pt")
    command = [sys.executable, "-c", MERGE, str(tmp_path)]
    subprocess.run(command, env=job_environment(), check=True, capture_output=True, timeout=120)
    for (info, parts), merged in zip(MERGED, torch.load(tmp_path / "merged.pt"), strict=True):
        np.testing.assert_array_equal(joined(info, {"w": parts})["w"], merged.numpy(), str(info))
