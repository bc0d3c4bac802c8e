"""Explanations: where every element of a shard goes, in words that can be checked against the shards themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ucp.errors import UsageError
from ucp.lang import load_program, parse
from ucp.lang.arrays import scatter
from ucp.lang.bind import bind
from ucp.lang.explain import Explanation, explain, explain_bound
from ucp.lang.held import Held
from ucp.layout import Mesh

FUSED = parse("""\
format 1
mesh pp tp dp
size hidden groups r d vocab half
in layers.{l/pp} {
  qkv.weight  [groups/tp (r d + d + d), hidden]
      <->  q.weight [groups r d, hidden], k.weight [groups d, hidden],
           v.weight [groups d, hidden]
  rope.weight [groups 2 half, hidden] <-> rope.weight [groups half 2, hidden]
  conv.weight [hidden, groups]        <-> conv.weight [groups, hidden]
}
embed.weight  [(vocab + _)/tp, hidden] <-> embed.weight [vocab, hidden]  on pp 0
""")
SIZES = {"hidden": 3, "groups": 4, "r": 2, "d": 2, "half": 3, "l": 4, "vocab": 5}
MESH = Mesh({"pp": 2, "tp": 2, "dp": 2})
RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?((?: every \d+ \(\d+ times\))*)")


def indices(text: str, length: int) -> list[int]:
    """The indices along one dim that a text speaks of, read as people would."""
    if text == ":":
        return list(range(length))
    found = RANGE.fullmatch(text)
    assert found is not None, text
    some = list(range(int(found[1]), int(found[2] or int(found[1]) + 1)))
    for stride, times in re.findall(r"every (\d+) \((\d+) times\)", found[3])[::-1]:
        some = [index + n * int(stride) for n in range(int(times)) for index in some]
    return sorted(some)


def part(array: np.ndarray, text: str) -> np.ndarray:
    """The elements of an array that a text such as ``[0..2 every 4 (2 times), :]`` speaks of."""
    dims = [indices(dim, n) for dim, n in zip(text[1:-1].split(", "), array.shape, strict=True)]
    return array[np.ix_(*dims)]


def only(found: list[Explanation]) -> Explanation:
    (one,) = found
    return one


@pytest.fixture
def whole() -> dict[str, np.ndarray]:
    shapes = {"q": (16, 3), "k": (8, 3), "v": (8, 3), "rope": (24, 3), "conv": (4, 3)}
    rng = np.random.default_rng(0)
    named = {f"layers.{n}.{name}.weight": shape for n in range(4) for name, shape in shapes.items()}
    return {name: rng.random(shape, np.float32) for name, shape in {**named, "embed.weight": (5, 3)}.items()}


@pytest.mark.parametrize("name", ["layers.1.qkv.weight", "embed.weight", "layers.1.conv.weight"])
def test_what_is_said_is_what_the_shards_hold(whole, name) -> None:
    sizes = {key: SIZES[key] for key in ("groups", "r", "d", "half", "hidden")}
    shards = scatter(FUSED, whole, mesh=MESH, sizes=sizes)
    seen = 0
    for found in explain(FUSED, name, mesh=MESH, sizes=SIZES):
        for holding in found.holdings:
            places = [place for place in shards if dict(place).items() >= dict(holding.coordinate).items()]
            for place in places:
                shard = shards[place][holding.name]
                assert shard.shape == holding.shape
                for region in holding.regions:
                    here, there = part(shard, region.here), part(whole[region.name], region.there)
                    np.testing.assert_array_equal(here.T if region.order == "transposed" else here, there)
                    seen += here.size
    assert seen > 0


def test_a_source_name_is_told_from_the_logical_one() -> None:
    source = only(explain(FUSED, "layers.0.qkv.weight", mesh=MESH, sizes=SIZES))
    assert (source.side, source.inverse, source.replicas) == ("source", "replica-checked", ("dp",))
    assert source.layout == "[groups/tp (r d + d + d), hidden]"
    assert source.filled == "[2 × (2 × 2 + 2 + 2), 3]"
    assert source.text.startswith("qkv.weight  [groups/tp (r d + d + d), hidden]\n")
    assert source.text.endswith("v.weight [groups d, hidden]")
    logical = only(explain(FUSED, "layers.3.v.weight", mesh=MESH, sizes=SIZES))
    assert logical.side == "logical"
    assert [(h.name, dict(h.coordinate)) for h in logical.holdings] == [
        ("layers.1.qkv.weight", {"pp": 1, "tp": 0}),
        ("layers.1.qkv.weight", {"pp": 1, "tp": 1}),
    ]
    assert [r.here for h in logical.holdings for r in h.regions] == ["[6..8 every 8 (2 times), :]"] * 2
    assert [r.there for h in logical.holdings for r in h.regions] == ["[0..4, :]", "[4..8, :]"]


def test_other_orders_are_named() -> None:
    def order(name: str) -> set[str]:
        return {r.order for e in explain(FUSED, name, mesh=MESH, sizes=SIZES) for h in e.holdings for r in h.regions}

    assert order("layers.3.rope.weight") == {"reordered"}
    assert order("layers.3.conv.weight") == {"transposed"}
    assert order("layers.3.q.weight") == {""}


def test_stacked_experts_come_from_many_shards() -> None:
    program = parse("format 1\nmesh ep\nsize n\nexperts.{e/ep}.w [n] <-> moe.w [e, n]\n")
    found = only(explain(program, "moe.w", mesh=Mesh({"ep": 2}), sizes={"e": 4, "n": 3}))
    told = [(h.name, h.coordinate["ep"], r.there) for h in found.holdings for r in h.regions]
    assert told == [
        ("experts.0.w", 0, "[0, :]"),
        ("experts.1.w", 0, "[1, :]"),
        ("experts.0.w", 1, "[2, :]"),
        ("experts.1.w", 1, "[3, :]"),
    ]


def test_sizes_that_are_missing_are_named() -> None:
    found = only(explain(FUSED, "layers.0.conv.weight", mesh=MESH, sizes={"hidden": 3}))
    assert (found.holdings, found.lacking) == ((), ("groups", "l"))


def test_flags_choose_among_rules() -> None:
    program, mesh = load_program("megatron_core_gpt"), Mesh({"tp": 2})
    both = explain(program, "layers.0.mlp.up.weight", mesh=mesh)
    assert len(both) == 2
    one = only(explain(program, "layers.0.mlp.up.weight", mesh=mesh, flags={"swiglu": True}))
    assert one.layout == "[ffn/tp + ffn/tp, hidden]"


def test_factored_axes_are_told_as_a_whole() -> None:
    program = parse("format 1\nmesh tp\naxis tp = kv * rep\nlet kv = min(tp, g)\nsize g d\nk [g/kv d] <-> k.w [g d]\n")
    found = only(explain(program, "k", mesh=Mesh({"tp": 4}), sizes={"g": 2, "d": 3}))
    assert [(dict(h.coordinate), h.regions[0].there) for h in found.holdings] == [
        ({"tp": 0}, "[0..3]"),
        ({"tp": 1}, "[0..3]"),
        ({"tp": 2}, "[3..6]"),
        ({"tp": 3}, "[3..6]"),
    ]
    assert found.replicas == ("rep",)


def test_a_bound_program_tells_copies_and_real_padding() -> None:
    mesh = Mesh({"tp": 2, "dp": 2})
    held = [Held("embed.weight", (4, 3), "float32", {"tp": t, "dp": d}) for d in range(2) for t in range(2)]
    rule = "embed.weight [(vocab + _)/tp, hidden] <-> embed.weight [vocab, hidden]"
    program = parse(f"format 1\nmesh tp dp\nsize vocab hidden\n{rule}\n")
    bound = bind(program, held, mesh=mesh, sizes={"vocab": 5})
    found = only(explain_bound(bound, held, "embed.weight"))
    told = [(h.held, r.here, r.there, r.replica) for h in found.holdings for r in h.regions]
    assert told == [
        (0, "[:, :]", "[0..4, :]", 0),
        (1, "[0, :]", "[4, :]", 0),
        (2, "[:, :]", "[0..4, :]", 1),
        (3, "[0, :]", "[4, :]", 1),
    ]


def test_a_name_without_a_rule_is_an_error() -> None:
    with pytest.raises(UsageError, match="no rule is for layers") as caught:
        explain(FUSED, "layers.0.qkw.weight", mesh=MESH)
    assert caught.value.hint == "nearest: layers.{l}.qkv.weight"
