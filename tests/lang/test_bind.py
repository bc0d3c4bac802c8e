"""Binding a Megatron-like program to shards: what comes out, and that every seeded defect is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp.errors import ConflictError, FitError, UcpError
from ucp.lang import parse
from ucp.lang.arrays import Array, At, at, gather, scatter
from ucp.lang.bind import bind
from ucp.lang.held import Held
from ucp.layout import Mesh

PROGRAM = parse(Path(__file__).with_name("megatron.ucp").read_text(), file="megatron.ucp")
CONFIG = {"vocab": 50, "heads": 8, "groups": 4, "d": 3}
LAYERS, HIDDEN, FFN, EXPERTS = 4, 5, 8, 4
SHAPES = {
    "embed.weight": (50, HIDDEN),
    "lm_head.weight": (50, HIDDEN),
    "norm.weight": (HIDDEN,),
    **{
        f"layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "attn.norm.weight": (HIDDEN,),
            "attn.q.weight": (24, HIDDEN),
            "attn.k.weight": (12, HIDDEN),
            "attn.v.weight": (12, HIDDEN),
            "attn.o.weight": (HIDDEN, 24),
            "moe.gate": (EXPERTS, FFN, HIDDEN),
            "moe.up": (EXPERTS, FFN, HIDDEN),
            "moe.down": (EXPERTS, HIDDEN, FFN),
        }.items()
    },
}
Shards = dict[At, dict[str, Array]]


def logical(*, tied: bool = False) -> dict[str, Array]:
    """Tensors in which every element is another number."""
    found, first = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        found[name] = np.arange(first, first + size, dtype=np.float32).reshape(shape)
        first += size
    if tied:
        found["lm_head.weight"] = found["embed.weight"]
    return found


def shards(mesh: Mesh, *, tied: bool = False) -> Shards:
    return scatter(PROGRAM, logical(tied=tied), mesh=mesh, config=CONFIG)


def held(found: Shards) -> list[Held]:
    return [
        Held(name, array.shape, "float32", dict(place))
        for place, tensors in found.items()
        for name, array in tensors.items()
    ]


MESHES = [
    {},
    {"tp": 2},
    {"tp": 4, "etp": 4},
    {"pp": 2, "tp": 2, "ep": 2},
    {"pp": 4},
    {"pp": 2, "vpp": 2, "etp": 2},
    {"ep": 4, "dp": 2},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_gather_undoes_scatter_at_any_mesh(axes: dict[str, int], tied: bool) -> None:
    whole = logical(tied=tied)
    back = gather(PROGRAM, shards(Mesh(axes), tied=tied), mesh=Mesh(axes), config=CONFIG)
    assert back.keys() == whole.keys()
    assert all((back[name] == array).all() for name, array in whole.items())


def test_a_shard_is_what_megatron_holds() -> None:
    """Interleaved chunks, per-group q k v, per-rank gate and up: against slices written by hand."""
    whole = logical()
    found = shards(Mesh({"pp": 2, "vpp": 2, "tp": 2, "ep": 2, "etp": 2}))
    here = found[at(pp=1, vpp=0, tp=1, ep=1, etp=0)]
    assert sorted({name.split(".")[2] for name in here if name.startswith("decoder.layers")}) == ["0"]
    q, k, v = (whole[f"layers.1.attn.{name}.weight"].reshape(4, -1, HIDDEN) for name in "qkv")
    qkv = np.concatenate([np.concatenate([q[g], k[g], v[g]]) for g in (2, 3)])
    assert (here["decoder.layers.0.self_attention.linear_qkv.weight"] == qkv).all()
    gate, up = whole["layers.1.moe.gate"], whole["layers.1.moe.up"]
    fc1 = np.concatenate([gate[3, :4], up[3, :4]])
    assert (here["decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"] == fc1).all()
    assert not [name for name in here if name.startswith(("embedding", "output"))]
    last = found[at(pp=1, vpp=1, tp=1, ep=0, etp=0)]["output_layer.weight"]
    assert last.shape == (28, HIDDEN)
    assert (last[:22] == whole["lm_head.weight"][28:]).all() and not last[22:].any()


def test_states_lie_like_their_parameter() -> None:
    mesh = Mesh({"tp": 2})
    found = scatter(PROGRAM, logical(), mesh=mesh, config=CONFIG, state="exp_avg")
    back = gather(PROGRAM, found, mesh=mesh, config=CONFIG, state="exp_avg")
    assert all((back[name] == array).all() for name, array in logical().items())


def test_sizes_are_found_from_shapes() -> None:
    mesh = Mesh({"pp": 2, "tp": 2, "ep": 2})
    bound = bind(PROGRAM, held(shards(mesh)), mesh=mesh, config={"vocab": 50, "heads": 8, "groups": 4})
    assert bound.flags == {"tied": False}
    wanted = {"hidden": HIDDEN, "ffn": FFN, "d": 3, "r": 2, "experts": 4, "e": 4, "l": 4, "vocab": 50}
    assert wanted.items() <= bound.sizes.items()
    tensor = bound.tensors["layers.3.attn.q.weight", "value"]
    assert (tensor.shape, tensor.dims, tensor.view.factors) == (
        (24, HIDDEN),
        ("groups r d", "hidden"),
        ((4, 2, 3), (HIDDEN,)),
    )


def test_what_cannot_be_told_is_asked_for() -> None:
    mesh = Mesh({"tp": 2})
    with pytest.raises(FitError, match=r"cannot be told") as caught:
        bind(PROGRAM, held(shards(mesh)), mesh=mesh, config={"vocab": 50})
    assert "--size" in str(caught.value.hint)


def test_a_flag_that_names_do_not_tell_is_asked_for() -> None:
    program = parse("format 1\nflag a\nw <-> w\nv <-> v when a optional\n")
    with pytest.raises(FitError, match="names and shapes do not tell whether a") as caught:
        bind(program, [Held("w", (2,), "float32")], mesh=Mesh({}))
    assert caught.value.hint == "give --flag a=yes|no"
    bind(program, [Held("w", (2,), "float32")], mesh=Mesh({}), flags={"a": True})


GATED = parse(
    "format 1\nmesh tp\nsize f h g d\nflag gated split\n"
    "fc1 [f/tp + f/tp, h] <-> gate [f, h], up [f, h] when gated\nfc1 [f/tp, h] <-> up [f, h] unless gated\n"
    "fc2 [h, f/tp] <-> down [h, f]\n"
    "qk [g/tp (d + d)] <-> q [g d], k [g d] unless split\nqk [g/tp d + g/tp d] <-> q [g d], k [g d] when split\n",
    file="gated.ucp",
)


@pytest.mark.parametrize("rows", [6, 12])
def test_a_flag_that_shapes_tell_is_found(rows: int) -> None:
    held = [Held("fc1", (rows, 4), "float32"), Held("fc2", (4, 6), "float32"), Held("qk", (8,), "float32")]
    bound = bind(GATED, held, mesh=Mesh({}), flags={"split": True}, sizes={"d": 2})
    assert bound.flags["gated"] == (rows == 12)
    with pytest.raises(FitError, match=r"gated.ucp: names and shapes do not tell whether split"):
        bind(GATED, held, mesh=Mesh({}), sizes={"d": 2})
    with pytest.raises(FitError, match=r"fc1.*; and names do not tell whether gated"):
        bind(GATED, [Held("fc1", (7, 4), "float32"), *held[1:]], mesh=Mesh({}), flags={"split": True}, sizes={"d": 2})


def test_a_choice_does_not_win_by_needing_fewer_sizes() -> None:
    program = parse(
        "format 1\nsize g d n\nflag fused\n"
        "qk [g (d + d)] <-> q [g d], k [g d] when fused\nqk [n] <-> q [n] unless fused\n"
    )
    with pytest.raises(FitError, match="do not tell whether fused"):
        bind(program, [Held("qk", (8,), "float32")], mesh=Mesh({}))


# Seeded defects: each takes sound shards and spoils them.


def _pick(found: Shards, number: int, part: str) -> tuple[At, str]:
    named = [(place, name) for place, tensors in found.items() for name in tensors if part in name]
    return named[number % len(named)]


def lost(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "linear_fc")
    del found[place][name]


def lost_rank(found: Shards, n: int) -> None:
    del found[list(found)[n % len(found)]]


def misspelt(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "decoder")
    found[place][name.replace("decoder", "decodr")] = found[place].pop(name)


def extra(found: Shards, n: int) -> None:
    place, _ = _pick(found, n, "")
    found[place]["rotary.inv_freq"] = np.zeros(3, np.float32)


def narrow(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "linear_proj")
    found[place][name] = np.ascontiguousarray(found[place][name][:, 1:])


def flat(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "weight")
    found[place][name] = found[place][name].reshape(-1, 1, 1)


def half(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "linear_qkv")
    found[place][name] = found[place][name].astype(np.float16)


def transposed(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "linear_qkv")
    found[place][name] = np.ascontiguousarray(found[place][name].T)


def misplaced(found: Shards, n: int) -> None:
    places = [place for place in found if dict(place)["pp"] == 1]
    found[places[n % len(places)]]["embedding.word_embeddings.weight"] = np.zeros((28, HIDDEN), np.float32)


def another_norm(found: Shards, n: int) -> None:
    place, name = _pick(found, n, "layernorm")
    found[place][name] = found[place][name] + 1


DEFECTS: list[Callable[[Shards, int], None]] = [
    lost,
    lost_rank,
    misspelt,
    extra,
    narrow,
    flat,
    half,
    transposed,
    misplaced,
    another_norm,
]


@pytest.mark.parametrize("spoil", DEFECTS, ids=lambda spoil: spoil.__name__)
@given(number=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_seeded_defect_is_refused(spoil: Callable[[Shards, int], None], number: int) -> None:
    mesh = Mesh({"pp": 2, "tp": 2, "ep": 2, "etp": 1})
    found = {place: dict(tensors) for place, tensors in shards(mesh).items()}
    if spoil is lost_rank:
        # Every rank has a copy of the attention of its pp and tp, so only its experts are lost: still a hole.
        assert all(dict(place).keys() >= {"pp", "tp", "ep"} for place in found)
        for place in [p for p in found if dict(p)["ep"] == number % 2 and dict(p)["pp"] == number // 2 % 2]:
            del found[place]
    else:
        spoil(found, number)
    if spoil is lost:
        _, name = _pick(shards(mesh), number, "linear_fc")
        place, _ = _pick(shards(mesh), number, "linear_fc")
        for other, tensors in found.items():
            if dict(other)["pp"] == dict(place)["pp"] and dict(other)["ep"] == dict(place)["ep"]:
                tensors.pop(name, None)
    with pytest.raises(UcpError) as caught:
        gather(PROGRAM, found, mesh=mesh, config=CONFIG)
    assert isinstance(caught.value, ConflictError if spoil is another_norm else FitError)


def test_messages_name_tensor_rule_and_remedy() -> None:
    mesh = Mesh({"pp": 2, "tp": 2, "ep": 2})

    def message(spoil: Callable[[Shards, int], None]) -> str:
        found = {place: dict(tensors) for place, tensors in shards(mesh).items()}
        spoil(found, 0)
        with pytest.raises(UcpError) as caught:
            gather(PROGRAM, found, mesh=mesh, config=CONFIG)
        return f"{caught.value} | {caught.value.hint}"

    assert "decodr.layers.0" in message(misspelt) and "nearest: decoder.layers.{l}" in message(misspelt)
    assert "rotary.inv_freq: no rule of megatron.ucp matches it" in message(extra)
    assert "linear_qkv.weight" in message(half) and "float16" in message(half)
    assert "puts it on pp 0 alone" in message(misplaced)
    assert "differs from its other copies" in message(another_norm)


def test_sizes_that_two_tensors_put_differently_name_both() -> None:
    mesh = Mesh({})
    found = held(shards(mesh))
    spoiled = [replace(h, shape=(HIDDEN + 1,)) if "final" in h.name else h for h in found]
    with pytest.raises(
        FitError, match=r"is 5.*but dim 0 of decoder.final_layernorm.weight is 6.*`hidden` cannot be both"
    ):
        bind(PROGRAM, spoiled, mesh=mesh, config=CONFIG)


def test_a_cut_that_does_not_come_out_is_refused() -> None:
    with pytest.raises(FitError, match="cannot cut evenly"):
        shards(Mesh({"tp": 3}))


def test_a_size_that_the_configuration_contradicts_is_refused() -> None:
    mesh = Mesh({"tp": 2})
    with pytest.raises(FitError, match="hidden is 5"):
        bind(PROGRAM, held(shards(mesh)), mesh=mesh, config={**CONFIG, "hidden": 6})


def test_a_rule_that_matches_nothing_is_refused() -> None:
    program = parse("format 1\nsize a\nw [a] <-> w\nv [a] <-> v\n", file="two.ucp")
    with pytest.raises(FitError, match=r"two.ucp:4: no tensor is named v"):
        bind(program, [Held("w", (2,), "float32")], mesh=Mesh({}))
    with pytest.raises(FitError, match=r"two.ucp:4 needs v, and there is no such tensor"):
        scatter(program, {"w": np.zeros(2)}, mesh=Mesh({}))


def test_a_logical_tensor_that_nothing_writes_is_refused() -> None:
    program = parse("format 1\nsize a\nw [a] <-> w\n", file="one.ucp")
    with pytest.raises(FitError, match=r"q: no rule of one.ucp writes it"):
        scatter(program, {"w": np.zeros(2), "q": np.zeros(2)}, mesh=Mesh({}))
