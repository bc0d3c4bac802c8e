"""Drafts: a program for shards whose layout is known, compared with what they were cut by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from ucp.errors import ConflictError, UsageError
from ucp.lang import format_program, parse
from ucp.lang.arrays import At, at, gather, scatter
from ucp.lang.bind import bind
from ucp.lang.check import check
from ucp.lang.draft import Draft, draft
from ucp.lang.held import Held
from ucp.layout import Mesh

Shards = Mapping[At, Mapping[str, np.ndarray]]
LAYERS, HIDDEN, FFN, VOCAB = 4, 6, 20, 14


def held_of(shards: Shards) -> tuple[list[Held], Callable[[int, int], bool | None]]:
    """The shards as the language sees them, and a comparison of their values."""
    held, arrays = [], []
    for coordinate, tensors in shards.items():
        for name, array in tensors.items():
            held.append(Held(name, array.shape, array.dtype.name, dict(coordinate)))
            arrays.append(array)

    def same(a: int, b: int) -> bool | None:
        equal = arrays[a].shape == arrays[b].shape and bool((arrays[a] == arrays[b]).all())
        return None if equal and np.ptp(arrays[a]) == 0 else equal

    return held, same


def drafted(shards: Shards, mesh: Mesh, *, compare: bool = True, sizes: Mapping[str, int] | None = None) -> Draft:
    """A draft that is what every draft must be: text that means it, sound, and bound to what it came from."""
    held, same = held_of(shards)
    found = draft(held, mesh, same=same if compare else None, sizes=sizes, programs=())
    assert parse(found.text) == found.program
    assert format_program(parse(found.text)) == found.text
    check(found.program)
    assert found.problem is None
    bind(found.program, held, mesh=mesh)
    return found


def rule(found: Draft, start: str) -> str:
    """The line of the rule whose source begins so, blanks squeezed."""
    (line,) = [line for line in found.text.splitlines() if line.strip().startswith(start)]
    return " ".join(line.split())


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def logical() -> dict[str, np.ndarray]:
    tensors = {"embed.weight": values(VOCAB, HIDDEN), "lm_head.weight": values(VOCAB, HIDDEN, seed=1)}
    tensors["norm.weight"] = values(HIDDEN)
    for n in range(LAYERS):
        tensors[f"layers.{n}.norm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"layers.{n}.mlp.up.weight"] = values(FFN, HIDDEN, seed=10 + n)
        tensors[f"layers.{n}.mlp.up.bias"] = np.zeros(FFN, np.float32)
        tensors[f"layers.{n}.mlp.down.weight"] = values(HIDDEN, FFN, seed=20 + n)
        tensors[f"layers.{n}.mlp.down.bias"] = values(HIDDEN, seed=30 + n)
    return tensors


GPT = parse("""\
format 1
mesh pp tp
size vocab hidden ffn
embed.weight    [vocab/tp, hidden] <-> embed.weight   on pp 0
lm_head.weight  [vocab/tp, hidden] <-> lm_head.weight on pp -1
norm.weight     [hidden]           <-> norm.weight    on pp -1
in layers.{l/pp} <-> layers.{l} {
  norm.weight     [hidden]         <-> norm.weight
  mlp.up.weight   [ffn/tp, hidden] <-> mlp.up.weight
  mlp.up.bias     [ffn/tp]         <-> mlp.up.bias
  mlp.down.weight [hidden, ffn/tp] <-> mlp.down.weight
  mlp.down.bias   [hidden]         <-> mlp.down.bias
}
""")
MESH = Mesh({"pp": 2, "tp": 2})


@pytest.fixture
def shards() -> Shards:
    return scatter(GPT, logical(), mesh=MESH)


def test_a_grid_of_tensor_and_pipeline_ranks_is_understood(shards) -> None:
    found = drafted(shards, MESH)
    assert found.notes == (
        "embed.weight: undecided: padding? A vocabulary that was rounded up is `(vocab + _)`",
        "lm_head.weight: undecided: padding? A vocabulary that was rounded up is `(vocab + _)`",
    )
    assert rule(found, "embed.weight") == "embed.weight [vocab/tp, hidden] <-> embed.weight on pp 0"
    assert rule(found, "lm_head.weight") == "lm_head.weight [vocab/tp, hidden] <-> lm_head.weight on pp -1"
    assert "in layers.{l/pp} {" in found.text
    assert rule(found, "mlp.up.weight") == "mlp.up.weight [ffn/tp, hidden] <-> mlp.up.weight"
    assert rule(found, "mlp.up.bias") == "mlp.up.bias [ffn/tp] <-> mlp.up.bias"  # zeros: as its weight
    assert rule(found, "mlp.down.weight") == "mlp.down.weight [hidden, ffn/tp] <-> mlp.down.weight"
    assert rule(found, "mlp.down.bias") == "mlp.down.bias [hidden] <-> mlp.down.bias"
    whole = gather(found.program, shards, mesh=MESH)
    assert whole.keys() == logical().keys()
    for name, array in logical().items():
        np.testing.assert_array_equal(whole[name], array)


def test_without_bytes_nothing_is_joined_by_guess(shards) -> None:
    found = drafted(shards, MESH, compare=False)
    assert "/tp" not in found.text
    open_for = {note.partition(":")[0] for note in found.notes if "replicas along `tp`, or cut?" in note}
    assert open_for >= {"embed.weight", "layers.{l}.mlp.up.weight", "layers.{l}.mlp.up.bias"}
    with pytest.raises(ConflictError):
        gather(found.program, shards, mesh=MESH)


def test_sizes_that_are_given_decide_without_bytes(shards) -> None:
    found = drafted(shards, MESH, compare=False, sizes={"hidden": HIDDEN, "ffn": FFN, "vocab": VOCAB})
    assert rule(found, "mlp.up.weight") == "mlp.up.weight [ffn/tp, hidden] <-> mlp.up.weight"
    assert rule(found, "mlp.down.weight") == "mlp.down.weight [hidden, ffn/tp] <-> mlp.down.weight"
    np.testing.assert_array_equal(
        gather(found.program, shards, mesh=MESH)["layers.3.mlp.up.weight"], logical()["layers.3.mlp.up.weight"]
    )


def test_uneven_pieces_need_no_bytes() -> None:
    shards = {
        at(tp=0): {"mlp.up.weight": values(3, 4), "mlp.down.weight": values(4, 3)},
        at(tp=1): {"mlp.up.weight": values(2, 4), "mlp.down.weight": values(4, 2)},
    }
    found = drafted(shards, Mesh({"tp": 2}), compare=False)
    assert found.notes == ()
    whole = gather(found.program, shards, mesh=Mesh({"tp": 2}))
    assert {name: array.shape for name, array in whole.items()} == {"mlp.up.weight": (5, 4), "mlp.down.weight": (4, 5)}


def test_experts_that_count_anew_are_renumbered() -> None:
    mesh = Mesh({"ep": 2})
    shards = {
        at(ep=rank): {
            **{f"experts.{e}.w1.weight": values(5, 3, seed=2 * rank + e) for e in range(2)},
            "router.weight": values(4, 3),
        }
        for rank in range(2)
    }
    found = drafted(shards, mesh)
    assert rule(found, "experts").startswith("experts.{e/ep}.w1.weight")
    whole = gather(found.program, shards, mesh=mesh)
    np.testing.assert_array_equal(whole["experts.3.w1.weight"], shards[at(ep=1)]["experts.1.w1.weight"])


def test_experts_that_count_on_stay_as_they_are() -> None:
    mesh = Mesh({"ep": 2})
    name = "experts.{}.w1.weight".format
    shards = {at(ep=r): {name(2 * r + e): values(5, 3, seed=2 * r + e) for e in range(2)} for r in range(2)}
    found = drafted(shards, mesh)
    assert "/ep" not in found.text
    assert "which `ep` rank holds which of these" in found.text
    assert gather(found.program, shards, mesh=mesh).keys() == {f"experts.{e}.w1.weight" for e in range(4)}


@pytest.mark.parametrize(
    ("name", "words"),
    [("attn.qkv.weight", "query, key and value in one?"), ("mlp.gate_up_proj.weight", "gate and up in one?")],
)
def test_several_tensors_in_one_are_not_joined(name, words) -> None:
    mesh = Mesh({"tp": 2})
    shards = {at(tp=r): {name: values(6, 4, seed=r), "norm.weight": np.ones(4, np.float32)} for r in range(2)}
    found = drafted(shards, mesh)
    assert words in found.text
    assert "cuts all of it or part by part?" in found.text
    with pytest.raises(ConflictError):
        gather(found.program, shards, mesh=mesh)


def test_pieces_of_squares_are_left_open() -> None:
    mesh = Mesh({"tp": 2})
    shards = {at(tp=r): {"proj.weight": values(4, 4, seed=r), "norm.weight": np.ones(4, np.float32)} for r in range(2)}
    found = drafted(shards, mesh)
    assert "shards differ along `tp`; write `/tp` at the dim that is cut" in found.text
    with pytest.raises(ConflictError):
        gather(found.program, shards, mesh=mesh)


def test_numbers_are_captured_where_they_count() -> None:
    names = ["layers.0.w", "layers.1.w", "net.2.w", "head.7.b", "mix.w1.x", "mix.w2.x"]
    names += ["5.weight", "5.bias", "a.01.x", "a.02.x"]
    found = drafted({(): {name: values(3) for name in names}}, Mesh({}))
    sources = {line.split()[0] for line in found.text.splitlines() if "<->" in line}
    assert sources == {
        "layers.{l}.w", "net.2.w", "head.7.b", "mix.w1.x", "mix.w2.x", "5.weight", "5.bias", "a.01.x", "a.02.x",
    }  # fmt: skip


def test_names_that_a_capture_would_swallow_stay_apart() -> None:
    names = ["0.weight", "1.weight", "norm.weight", "0.norm", "0.bias", "1.bias", "final.bias"]
    found = drafted({(): {name: values(3) for name in names}}, Mesh({}))
    assert "{l}.bias" not in found.text
    assert gather(found.program, {(): {name: values(3) for name in names}}, mesh=Mesh({})).keys() == set(names)


def test_members_of_different_shapes_are_taken_as_they_are() -> None:
    tensors = {"net.0.weight": values(3, 2), "net.1.weight": values(4, 3), "odd name.weight": values(2, 2)}
    found = drafted({(): tensors}, Mesh({}))
    assert "net.{i}.weight" in found.text
    assert "members have different shapes" in found.text
    assert '"odd name.weight"' in found.text
    assert gather(found.program, {(): tensors}, mesh=Mesh({})).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("states", "statements"),
    [
        ({"exp_avg": (4, 3), "exp_avg_sq": (4, 3)}, ["state * : like param"]),
        ({"exp_avg": (4, 3), "step": ()}, ["state step : []", "state * : like param"]),
        ({"row": (4,), "col": (3,)}, ["state row : like param lacking -1", "state col : like param lacking -2"]),
        ({"row": (4, 1)}, ["state * : like param"]),
    ],
)
def test_states_are_described(states, statements) -> None:
    held = [Held("w.weight", (4, 3), "float32")]
    held += [Held("w.weight", shape, "float32", state=state) for state, shape in states.items()]
    found = draft(held, Mesh({}), programs=())
    assert found.problem is None
    lines = [" ".join(line.split()) for line in found.text.splitlines() if line.startswith("state")]
    assert lines == statements
    assert ("has a shape of its own" in found.text) == (states == {"row": (4, 1)})


def test_logical_names_come_from_programs_that_know_them() -> None:
    llama = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"]
    held = [Held(f"model.{name}", (8, 4), "float32") for name in llama]
    found = draft(held, Mesh({}))
    assert rule(found, "model.embed_tokens").endswith("<-> embed.weight")
    assert rule(found, "model.layers").endswith("<-> layers.{l}.attn.q.weight")
    plain = draft(held, Mesh({}), programs=())
    assert rule(plain, "model.embed_tokens").endswith("<-> model.embed_tokens.weight")


def test_transposed_tensors_are_marked_and_left() -> None:
    held = [Held(f"transformer.h.{n}.mlp.c_fc.weight", (4, 16), "float32") for n in range(2)]
    found = draft(held, Mesh({}))
    assert "transposed? hf_gpt2" in found.text
    assert found.problem is None


def test_experts_are_stacked_where_programs_say_so() -> None:
    held = [
        Held(f"model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight", (6, 4), "float32")
        for n in range(2)
        for e in range(3)
    ]
    found = draft(held, Mesh({}))
    bound = bind(found.program, held, mesh=Mesh({}))
    assert {key: tensor.shape for key, tensor in bound.tensors.items()} == {
        ("layers.0.moe.gate", "value"): (3, 6, 4),
        ("layers.1.moe.gate", "value"): (3, 6, 4),
    }


def test_there_is_nothing_to_draft_from_nothing() -> None:
    with pytest.raises(UsageError):
        draft([], Mesh({}))


def test_programs_that_fit_are_named() -> None:
    fitting = parse("format 1\nsize a b\nx [a, b] <-> y\n", file="mine.ucp")
    asking = parse("format 1\nsize a b c\nx [a b, c] <-> y\n", file="asking.ucp")
    other = parse("format 1\nsize a\nz [a] <-> y\n", file="none.ucp")
    found = draft([Held("x", (2, 3), "float32")], Mesh({}), programs=[fitting, asking, other])
    assert found.fits == ("mine", "asking --size a=N --size b=N")
    assert found.problem is None


def test_what_some_layers_lack_is_optional() -> None:
    names = ["layers.0.a", "layers.1.a", "layers.1.b", "layers.1.experts.0.c", "layers.1.experts.1.c"]
    found = drafted({(): {name: values(3) for name in names}}, Mesh({}))
    optional = {line.split()[0] for line in found.text.splitlines() if line.endswith(" optional")}
    assert optional == {"b", "experts.{e}.c"}


def test_programs_that_do_not_fit_cost_little() -> None:
    """Near names are looked for in an error that is raised, not in every one that might be."""
    held = [Held(f"stack.{n}.odd_{part}.weight", (4, 4), "float32") for n in range(80) for part in "abcdefgh"]
    start = time.process_time()
    found = draft(held, Mesh({}))
    assert found.problem is None
    assert found.fits == ()
    assert time.process_time() - start < 15


def test_flags_are_tried_before_a_program_is_said_to_fit() -> None:
    either = parse("format 1\nsize a b\nflag x\nw [a] <-> w when x\nw [b] <-> w unless x\n", file="either.ucp")
    one = parse("format 1\nsize a b c\nflag x\nw [a, c] <-> w when x\nw [b] <-> w unless x\n", file="one.ucp")
    found = draft([Held("w", (4,), "float32")], Mesh({}), programs=[either, one])
    assert found.fits == ("either --flag x=no", "either --flag x=yes", "one")


def test_stacks_of_different_depth_count_by_themselves() -> None:
    shards = {
        at(pp=rank): {f"{stack}.layers.{n}.w": values(3, seed=9 * rank + n) for stack, n in stacks}
        for rank, stacks in enumerate(
            [[("encoder", 0), ("decoder", 0), ("decoder", 1)], [("encoder", 0), ("decoder", 0), ("decoder", 1)]]
        )
    }
    found = drafted(shards, Mesh({"pp": 2}))
    assert "encoder.layers.{l/pp}.w" in found.text
    assert "decoder.layers.{l2/pp}.w" in found.text
    assert len(gather(found.program, shards, mesh=Mesh({"pp": 2}))) == 6
