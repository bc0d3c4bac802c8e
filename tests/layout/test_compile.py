"""Equations whose blocks are known by heart, and equations that are refused."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from ucp.errors import FitError, ProgramError
from ucp.layout import (
    Box,
    LayoutError,
    Mesh,
    Setting,
    branches,
    compile_layout,
    default_targets,
    globalize,
    local_shape,
    saved_pads,
    spell,
    without_dims,
)
from ucp.layout.expr import Concat, Cut, Dim, Expr, Layout, Name, Number, Operation, Pad, Product, concat, product


def d(name: str, *axes: str) -> Dim:
    return Dim(name, cuts(*axes))


def cuts(*axes: str) -> tuple[Cut, ...]:
    return tuple(Cut(axis.lstrip("@"), axis.startswith("@")) for axis in axes)


def many(*items: Expr | str, by: tuple[str, ...] = ()) -> Expr:
    return product(tuple(d(item) if isinstance(item, str) else item for item in items), cuts(*by))


def joined(*parts: Expr | str, by: tuple[str, ...] = ()) -> Expr:
    return concat(tuple(d(part) if isinstance(part, str) else part for part in parts), cuts(*by))


def layout(*dims: Expr | str) -> Layout:
    return Layout(tuple(d(dim) if isinstance(dim, str) else dim for dim in dims))


def setting(mesh: Mapping[str, int], sizes: Mapping[str, int], **recorded: object) -> Setting:
    return Setting(Mesh(mesh), sizes, **recorded)


QKV = layout(many(d("groups", "tp"), joined(many("r", "d"), "d", "d")), "hidden")
QKV_TARGETS = (layout(many("groups", "r", "d"), "hidden"), *[layout(many("groups", "d"), "hidden")] * 2)


def test_grouped_attention_is_one_block_for_each_target() -> None:
    at = setting({"tp": 8}, {"groups": 128, "r": 16, "d": 128, "hidden": 16384})
    found = compile_layout(QKV, QKV_TARGETS, setting=at, coordinate={"tp": 3})
    assert found.shape == (16 * 18 * 128, 16384)
    assert [len(blocks) for blocks in found.blocks] == [1, 1, 1]
    ((q,), (k,), (v,)) = found.blocks
    assert q.block.box == Box((48, 0, 0, 0), (16, 16, 128, 16384))
    assert q.block.steps == ((0, 18 * 128), (0, 128), (0, 1), (1, 1))
    assert [k.block.start, v.block.start] == [(16 * 128, 0), (17 * 128, 0)]


def test_an_unaligned_cut_of_a_composed_dim_is_few_blocks() -> None:
    at = setting({"tp": 8}, {"heads": 12, "half": 2, "d": 33})
    source = layout(many("heads", "half", "d", by=("tp",)))
    for rank in range(8):
        (blocks,) = compile_layout(source, default_targets(source), setting=at, coordinate={"tp": rank}).blocks
        assert len(blocks) <= 5
        assert sum(placed.block.size for placed in blocks) == 99


def test_gate_and_up_joined_before_or_after_the_cut() -> None:
    at = setting({"tp": 2}, {"ffn": 4})
    targets = (layout("ffn"), layout("ffn"))
    each = compile_layout(layout(joined(d("ffn", "tp"), d("ffn", "tp"))), targets, setting=at, coordinate={"tp": 1})
    assert [[p.block.box for p in of] for of in each.blocks] == [[Box((2,), (2,))], [Box((2,), (2,))]]
    whole = compile_layout(layout(joined("ffn", "ffn", by=("tp",))), targets, setting=at, coordinate={"tp": 1})
    assert [[p.block.box for p in of] for of in whole.blocks] == [[], [Box((0,), (4,))]]


def test_stacked_layers_have_their_number_in_the_name() -> None:
    at = setting({"pp": 2}, {"l": 4, "h": 3})
    found = compile_layout(
        layout(d("l", "pp"), "h"), [layout("h")], setting=at, coordinate={"pp": 1}, captured=[frozenset({"l"})]
    )
    assert [(p.names, p.block.start) for p in found.blocks[0]] == [((("l", 2),), (0, 0)), ((("l", 3),), (1, 0))]


def test_a_number_in_the_sources_name_becomes_a_dim() -> None:
    at = setting({"ep": 2}, {"e": 4, "h": 3, "l": 9})
    for number in range(4):
        found = compile_layout(
            layout("h"),
            [layout("e", "h")],
            setting=at,
            coordinate={},
            fixed={"e": number, "l": 7},
            captured=[frozenset({"l"})],
        )
        ((placed,),) = found.blocks
        assert placed.names == (("l", 7),)
        assert placed.block.box == Box((number, 0), (1, 3))
        assert placed.block.steps == ((-1, 0), (0, 1))


def test_an_axis_as_a_dim_of_the_logical_tensor() -> None:
    at = setting({"dp": 3}, {"h": 2})
    found = compile_layout(layout("h"), [layout("dp", "h")], setting=at, coordinate={}, fixed={"dp": 2})
    assert found.views[0].tensor == (3, 2)
    assert found.blocks[0][0].block.box == Box((2, 0), (1, 2))


def test_placements_in_any_order_and_number() -> None:
    where = {("e", "ep"): {0: (5, 0, 1), 1: (), 2: (2, 4, 3)}}
    at = setting({"ep": 3}, {"e": 6, "h": 2}, placements=where)
    source = layout(d("e", "@ep"), "h")
    found = [compile_layout(source, default_targets(source), setting=at, coordinate={"ep": k}) for k in range(3)]
    assert [shard.shape for shard in found] == [(3, 2), (0, 2), (3, 2)]
    boxes = [[(p.block.box.start[0], p.block.box.shape[0]) for p in shard.blocks[0]] for shard in found]
    assert boxes == [[(5, 1), (0, 2)], [], [(2, 1), (4, 1), (3, 1)]]
    assert [globalize("e", cuts("@ep"), k, at, {"ep": 0}) for k in range(3)] == [5, 0, 1]


def test_recorded_boundaries_of_a_dim_and_of_a_composed_one() -> None:
    recorded = {("l", ("vpp", "pp")): (0, 1, 3, 3, 7), ("(vocab + _)", ("tp",)): (0, 6, 8)}
    at = setting({"vpp": 2, "pp": 2, "tp": 2}, {"l": 7, "vocab": 7}, cuts=recorded)
    inside = [[globalize("l", cuts("vpp", "pp"), 0, at, {"vpp": v, "pp": p}) for p, v in [(0, 0), (1, 0), (1, 1)]]]
    assert inside == [[0, 1, 3]]
    with pytest.raises(FitError, match="`l` 0 is not among the 0 that vpp1 pp0 holds"):
        globalize("l", cuts("vpp", "pp"), 0, at, {"vpp": 1, "pp": 0})
    source = layout(joined("vocab", Pad(), by=("tp",)))
    assert [local_shape(source, at, {"tp": k}) for k in range(2)] == [(6,), (2,)]


def test_layers_over_virtual_stages_are_renumbered() -> None:
    at = setting({"vpp": 2, "pp": 4}, {"l": 16})
    found = [globalize("l", cuts("vpp", "pp"), k, at, {"vpp": v, "pp": 1}) for v in range(2) for k in range(2)]
    assert found == [2, 3, 10, 11]


@pytest.mark.parametrize(
    ("vocab", "align", "length"), [(50257, Number(128), 50304), (50304, Number(128), 50304), (10, None, 12)]
)
def test_padding_is_the_least_that_fits_on_export(vocab: int, align: Number | None, length: int) -> None:
    at = setting({"tp": 4}, {"vocab": vocab})
    source = layout(joined("vocab", Pad(align), by=("tp",)))
    assert local_shape(source, at, {"tp": 0}) == (length // 4,)


def test_align_may_count_ranks() -> None:
    at = setting({"tp": 2}, {"vocab": 1000, "divisible": 128})
    align = Operation("*", Name("divisible"), Name("tp"))
    assert local_shape(layout(joined("vocab", Pad(align), by=("tp",))), at, {"tp": 1}) == (512,)


def test_padding_is_what_was_saved_on_import() -> None:
    at = setting({"tp": 2}, {"vocab": 10, "h": 2})
    source = layout(joined("vocab", Pad(), by=("tp",)), "h")
    found = saved_pads(source, (8, 2), setting=at, coordinate={"tp": 1})
    assert found == {(0, 0): 6}
    shard = compile_layout(source, default_targets(source), setting=at, coordinate={"tp": 1}, pad=found)
    assert shard.shape == (8, 2)
    assert [p.block.box for p in shard.blocks[0]] == [Box((8, 0), (2, 2))]
    with pytest.raises(FitError, match="8 elements were saved, but 10 are no padding"):
        saved_pads(source, (4, 2), setting=at, coordinate={"tp": 1})
    with pytest.raises(FitError, match="has 2 dims"):
        saved_pads(source, (4,), setting=at, coordinate={"tp": 1})


def test_key_heads_fewer_than_ranks() -> None:
    at = setting({"kv": 2, "rep": 2}, {"groups": 2, "r": 4, "d": 8})
    source = layout(joined(many(d("groups", "kv"), d("r", "rep"), "d"), many(d("groups", "kv"), "d")))
    targets = [layout(many("groups", "r", "d")), layout(many("groups", "d"))]
    found = compile_layout(source, targets, setting=at, coordinate={"kv": 1, "rep": 0})
    assert found.shape == (24,)
    assert [of[0].block.box for of in found.blocks] == [Box((1, 0, 0), (1, 2, 8)), Box((1, 0), (1, 8))]
    assert [branch.axes for branch in branches(source)] == [("kv", "rep"), ("kv",)]


def test_a_factored_state_lacks_a_dim() -> None:
    at = setting({"tp": 2}, {"groups": 4, "r": 2, "d": 3, "hidden": 5})
    rows, targets, parts = without_dims(QKV, QKV_TARGETS, [-1])
    assert parts == (0, 1, 2)
    assert [[spell(dim) for dim in t.dims] for t in targets] == [["groups r d"], ["groups d"], ["groups d"]]
    found = compile_layout(rows, targets, setting=at, coordinate={"tp": 1}, parts=parts)
    assert found.shape == (24,)
    columns, targets, parts = without_dims(QKV, QKV_TARGETS, [0])
    assert (columns, parts) == (layout("hidden"), (0, 0, 0))
    assert targets == (layout("hidden"),) * 3
    found = compile_layout(columns, targets, setting=at, coordinate={}, parts=parts)
    assert [of[0].block.box for of in found.blocks] == [Box((0,), (5,))] * 3
    with pytest.raises(LayoutError, match="no dim 2"):
        without_dims(QKV, QKV_TARGETS, [2])


def test_lacking_one_of_two_joined_dims() -> None:
    source = layout(joined("a", "b"), joined("c", "d"))
    left, targets, parts = without_dims(source, default_targets(source), [0])
    assert parts == (0, 1, 0, 1)
    assert targets == (layout("c"), layout("d"), layout("c"), layout("d"))
    assert left == layout(joined("c", "d"))


def test_missing_targets_have_the_dims_of_the_source() -> None:
    source = Layout((joined(many(d("a", "tp"), "b"), Pad(), by=("dp",)), d("c", "@ep")), "bf16")
    assert default_targets(source) == (Layout((many("a", "b"), d("c")), "bf16"),)
    (branch,) = branches(source)
    assert branch.leaves == ("a", "b", "c")
    assert branch.axes == ("dp", "tp", "ep")
    assert branch.placed == {"c"}


def test_a_scalar_is_one_block() -> None:
    found = compile_layout(layout(), [layout()], setting=setting({}, {}), coordinate={})
    assert found.shape == ()
    assert found.blocks[0][0].block.box == Box((), ())


def test_an_empty_dim_has_no_blocks() -> None:
    at = setting({"tp": 2}, {"a": 0, "b": 4})
    source = layout(d("a", "tp"), "b")
    found = compile_layout(source, default_targets(source), setting=at, coordinate={"tp": 1})
    assert (found.shape, found.blocks) == ((0, 4), ((),))


SIZES = {"a": 4, "b": 6, "c": 5}
ILL_FORMED = {
    "`c` is only on the left": (layout("a", "c"), [layout("a")]),
    "`b` is only on the right": (layout("a"), [layout("a", "b")]),
    "`a` stands twice on the left": (layout("a", "a"), [layout("a")]),
    "`a` stands twice on the right": (layout("a"), [layout("a", "a")]),
    "2 parts on the left, 1 tensors on the right": (layout(joined("a", "b")), [layout("a")]),
    "axis `tp` cuts the same tensor twice": (layout(d("a", "tp"), d("b", "tp")), [layout("a", "b")]),
    "a cut cannot stand": (layout("a"), [layout(d("a", "tp"))]),
    "a concatenation cannot stand": (layout("a"), [layout(joined("a", "b"))]),
    "the size of `unknown` is not known": (layout("unknown"), [layout("unknown")]),
    "two paddings in one concatenation": (layout(joined("a", Pad(), Pad())), [layout("a")]),
    "`@tp` after another cut": (layout(d("a", "dp", "@tp")), [layout("a")]),
    "6/4 is not a whole number": (
        layout(joined("a", Pad(Operation("/", Name("b"), Name("a"))))),
        [layout("a")],
    ),
    "comes out as 0": (layout(joined("a", Pad(Number(0)))), [layout("a")]),
}


@pytest.mark.parametrize("message", ILL_FORMED)
def test_ill_formed_equations_are_programs_errors(message: str) -> None:
    source, targets = ILL_FORMED[message]
    at = setting({"tp": 2, "dp": 2}, SIZES)
    with pytest.raises(LayoutError, match=message) as caught:
        compile_layout(source, targets, setting=at, coordinate={"tp": 0, "dp": 0})
    assert isinstance(caught.value, ProgramError)
    assert caught.value.node is not None


def test_the_same_axis_cuts_different_parts() -> None:
    at = setting({"tp": 2}, SIZES)
    source = layout(joined(d("a", "tp"), d("b", "tp")))
    assert compile_layout(source, default_targets(source), setting=at, coordinate={"tp": 0}).shape == (5,)


MISFITS: dict[str, tuple[Expr, dict[str, object]]] = {
    "`c` has size 5, which `/tp` of 2 ranks cannot cut evenly": (d("c", "tp"), {}),
    "size 4, which `/tp/dp` of 2 x 4 ranks": (d("a", "tp", "dp"), {}),
    r"`\(a c\)` has size 20, which `/ep` of 3": (many("a", "c", by=("ep",)), {}),
    "3 pieces need 4 boundaries": (d("c", "ep"), {"cuts": {("c", ("ep",)): (0, 3, 5)}}),
    "must run from 0 to the size, 5": (d("c", "tp"), {"cuts": {("c", ("tp",)): (0, 3, 6)}}),
    r"must run from 0 to the size, 5$": (d("c", "tp"), {"cuts": {("c", ("tp",)): (1, 3, 5)}}),
    "must not fall": (d("c", "ep"), {"cuts": {("c", ("ep",)): (0, 4, 3, 5)}}),
    "does not say which of `c` each `tp` rank": (d("c", "@tp"), {}),
    "rank 1 holds an index twice": (
        d("c", "@tp"),
        {"placements": {("c", "tp"): {0: (0, 1, 2), 1: (3, 4, 3)}}},
    ),
    "no rank holds index 2": (d("c", "@tp"), {"placements": {("c", "tp"): {0: (0, 1), 1: (3, 4)}}}),
    "rank 1 holds index 5, but `c` has 5": (
        d("c", "@tp"),
        {"placements": {("c", "tp"): {0: (0, 1, 2), 1: (3, 4, 5)}}},
    ),
    r"tells of ranks \[0\], but `tp` has 2": (d("c", "@tp"), {"placements": {("c", "tp"): {0: (0, 1, 2, 3, 4)}}}),
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_refused(message: str) -> None:
    expr, recorded = MISFITS[message]
    at = setting({"tp": 2, "dp": 4, "ep": 3}, SIZES, **recorded)
    source = layout(expr)
    with pytest.raises(FitError, match=message):
        compile_layout(source, default_targets(source), setting=at, coordinate={"tp": 0, "dp": 0, "ep": 0})


def test_a_coordinate_has_to_be_known_where_it_matters() -> None:
    source = layout(d("a", "tp"))
    with pytest.raises(FitError, match="its index there is not known"):
        compile_layout(source, default_targets(source), setting=setting({"tp": 2}, SIZES), coordinate={})
    with pytest.raises(FitError, match="index 2 is not on axis `tp`"):
        compile_layout(source, default_targets(source), setting=setting({"tp": 2}, SIZES), coordinate={"tp": 2})
    assert compile_layout(source, default_targets(source), setting=setting({}, SIZES), coordinate={}).shape == (4,)
    with pytest.raises(FitError, match="`a` is 4, but its size is 4"):
        compile_layout(layout(), [layout("a")], setting=setting({}, SIZES), coordinate={}, fixed={"a": 4})


def test_expressions_are_spelled_as_they_are_written() -> None:
    expr = many(d("groups", "tp"), joined(many("r", "d"), "d", Pad(Operation("*", Number(2), Name("dp")))))
    assert spell(expr) == "groups/tp (r d + d + _ align 2*dp)"
    assert spell(many(joined("a", "b"), d("c", "@ep", "tp"), by=("dp",))) == "((a + b) c@ep/tp)/dp"
    assert spell(Concat((Product((d("a"), d("b")), cuts("tp")), d("c")))) == "(a b)/tp + c"


def test_ten_thousand_compiles_take_a_second() -> None:
    at = setting({"tp": 8, "pp": 16}, {"groups": 8, "r": 16, "d": 128, "hidden": 16384, "l": 126})
    captured = [frozenset({"l"})] * 3
    began = time.process_time()
    for number in range(10_000):
        compile_layout(
            QKV, QKV_TARGETS, setting=at, coordinate={"tp": number % 8}, fixed={"l": number % 126}, captured=captured
        )
    assert time.process_time() - began < 3
