"""Names, sizes and meshes that do not fit a program, in ways that once gave wrong numbers, or no end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from ucp.errors import ConflictError, FitError, UsageError
from ucp.lang import Program, parse
from ucp.lang.arrays import Array, at, gather, scatter
from ucp.lang.bind import bind
from ucp.lang.export import export
from ucp.lang.held import Held
from ucp.layout import Mesh


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    begin = time.perf_counter()
    yield
    assert time.perf_counter() - begin < 5


def program(*lines: str) -> Program:
    return parse("\n".join(("format 1", *lines)))


def array(*shape: int, first: int = 0) -> Array:
    return np.arange(first, first + int(np.prod(shape)), dtype=np.float32).reshape(shape)


MEAN = program("mesh tp dp", "size a", "w [a] mean tp <-> w [a] lossy")


def test_replicas_of_what_is_averaged_are_compared() -> None:
    mesh = Mesh({"tp": 2, "dp": 2})
    shards = {at(tp=tp, dp=dp): {"w": array(4, first=2 * tp)} for tp in range(2) for dp in range(2)}
    assert gather(MEAN, shards, mesh=mesh)["w"].tolist() == [1, 2, 3, 4]
    shards[at(tp=1, dp=1)] = {"w": array(4, first=7)}
    with pytest.raises(ConflictError, match="w at dp 1 tp 1 differs"):
        gather(MEAN, shards, mesh=mesh)


def test_averaged_replicas_are_in_the_pieces_of_their_term() -> None:
    held = [Held("w", (4,), "float32", {"tp": tp, "dp": dp}) for dp in range(3) for tp in range(2)]
    bound = bind(MEAN, held, mesh=Mesh({"tp": 2, "dp": 3}))
    numbered = {(held[piece.held].coordinate["tp"], piece.term) for piece in bound.pieces["w", "value"]}
    assert numbered == {(0, 0), (1, 1)}
    assert sorted(piece.replica for piece in bound.pieces["w", "value"]) == [0, 0, 1, 1, 2, 2]


FACTORED = ("mesh tp", "axis tp = kv * rep", "size a g", "let kv = min(tp, g)", "g [g] <-> g [g]")


@pytest.mark.parametrize(("what", "first"), [("any", 0), ("mean", 5)])
def test_reductions_over_a_factor_of_an_axis(what: str, first: int) -> None:
    shards = {at(tp=k): {"w": array(2, first=k // 2 * 2 + k % 2 * 10), "g": array(2)} for k in range(4)}
    found = gather(program(*FACTORED, f"w [a/kv] {what} rep <-> w [a] lossy"), shards, mesh=Mesh({"tp": 4}))
    assert found["w"].tolist() == [first, first + 1, first + 2, first + 3]


def test_factors_that_cannot_be() -> None:
    fourth = {at(tp=k): {"w": array(2), "g": array(0)} for k in range(4)}
    with pytest.raises(FitError, match="factor of no ranks: kv"):
        gather(program(*FACTORED, "w [a/kv] <-> w [a]"), fourth, mesh=Mesh({"tp": 4}))
    open_factors = program("mesh tp", "axis tp = kv * rep", "size a", "w [a/kv] <-> w [a]")
    with pytest.raises(FitError, match="kv and rep cannot be told"):
        gather(open_factors, {at(tp=k): {"w": array(2)} for k in range(4)}, mesh=Mesh({"tp": 4}))


PADDED = program("mesh tp", "size v h", "size divisor = 4", "w [(v + _ align divisor*tp)/tp, h] <-> w [v, h]")


@pytest.mark.parametrize("name", ["divisro", "tp"])
def test_a_size_that_the_program_does_not_have(name: str) -> None:
    with pytest.raises(UsageError, match=f"no size '{name}'"):
        scatter(PADDED, {"w": array(5, 2)}, mesh=Mesh({"tp": 2}), sizes={name: 8})
    with pytest.raises(UsageError, match=f"no size '{name}'"):
        gather(PADDED, {at(tp=k): {"w": array(4, 2)} for k in range(2)}, mesh=Mesh({"tp": 2}), sizes={name: 8})


def test_an_element_type_on_the_right_alone_is_no_cast() -> None:
    with pytest.raises(FitError, match=r"w is float32, but .* says bf16"):
        bind(program("size a", "w [a] <-> w bf16[a]"), [Held("w", (4,), "float32")], mesh=Mesh({}))


def test_one_name_written_twice() -> None:
    twice = program("size a first", "x.{l+first} [a] <-> x.{l} [a]", "x.0 [a] <-> z [a]")
    with pytest.raises(FitError, match=r"x\.0 is written twice"):
        scatter(twice, {"x.0": array(4), "z": array(4)}, mesh=Mesh({}), sizes={"first": 0})


def test_names_below_zero() -> None:
    with pytest.raises(FitError, match="comes out as -3"):
        scatter(program("size a", "w.{l+2-5} [a] <-> w.{l} [a]"), {"w.0": array(2)}, mesh=Mesh({}))


def test_sizes_that_contradict_a_logical_tensor() -> None:
    with pytest.raises(FitError, match=r"q has shape \[24\], but .* makes it \[20\]"):
        scatter(program("size h d", "q [h d] <-> q [h d]"), {"q": array(24)}, mesh=Mesh({}), sizes={"h": 4, "d": 5})


def test_many_open_flags() -> None:
    names = [f"w{k}x" for k in range(40)]
    rules = (f"{name} [a] <-> {name} [a] when f{k}" for k, name in enumerate(names))
    with pytest.raises(FitError, match="too many flags"):
        scatter(
            program("size a", "flag " + " ".join(f"f{k}" for k in range(40)), *rules),
            {name: array(2) for name in names},
            mesh=Mesh({}),
        )


def test_numbers_that_are_far_too_large() -> None:
    layers = program("size a", "l.{l}x [a] <-> l.{l} [a]")
    with pytest.raises(FitError, match=r"l is 100000000000, but there is none of l\.0"):
        gather(layers, {(): {"l.99999999999x": array(2)}}, mesh=Mesh({}))
    cut = program("mesh pp", "size a", "l.{l/pp} [a] <-> l.{l} [a]")
    with pytest.raises(FitError, match=r"none of l\.1"):
        gather(cut, {at(pp=0): {"l.0": array(2)}}, mesh=Mesh({"pp": 2}), sizes={"l": 10**12})
    with pytest.raises(FitError, match="tensors, more than"):
        scatter(cut, {"l.99999999999": array(2)}, mesh=Mesh({"pp": 2}))
    stacked = program("size a", "w.{l} [a] <-> w [l, a]")
    with pytest.raises(FitError, match="tensors, more than"):
        export(stacked, {"w": (10**12, 0)}, mesh=Mesh({}))


@pytest.mark.parametrize("index", [2, 9, -3])
def test_a_place_that_the_mesh_does_not_have(index: int) -> None:
    placed = program("mesh pp", "size a", f"w [a] <-> w [a] on pp {index}")
    with pytest.raises(FitError, match="`pp` has 2 ranks"):
        scatter(placed, {"w": array(2)}, mesh=Mesh({"pp": 2}))
    with pytest.raises(FitError, match="`pp` has 2 ranks"):
        gather(placed, {at(pp=1): {"w": array(2)}}, mesh=Mesh({"pp": 2}))


def test_integers_are_added_exactly_or_not_at_all() -> None:
    def added(kind: str, number: int, dtype: type) -> list[int]:
        shards = {at(tp=k): {"w": np.full(2, number, dtype)} for k in range(2)}
        made = gather(program("mesh tp", "size a", f"w [a] {kind} tp -> w [a]"), shards, mesh=Mesh({"tp": 2}))
        return list(map(int, made["w"]))

    assert added("sum", 2**53 + 1, np.int64) == [2**54 + 2] * 2
    with pytest.raises(FitError, match="does not fit in uint8"):
        added("sum", 200, np.uint8)
    with pytest.raises(FitError, match="no mean in int64"):
        added("mean", 3, np.int64)


def test_a_step_of_experts_that_are_one_tensor() -> None:
    lines = ("mesh ep", "size a", "experts.{e/ep}.w [a] <-> w [e, a]", "state step : i64[]")
    held = [
        Held(f"experts.{k}.w", shape, dtype, {"ep": ep}, state)
        for ep in range(2)
        for k in range(2)
        for shape, dtype, state in (((4,), "float32", "value"), ((), "int64", "step"))
    ]
    bound = bind(program(*lines), held, mesh=Mesh({"ep": 2}))
    assert bound.tensors["w", "step"].shape == ()
    assert sorted(piece.replica for piece in bound.pieces["w", "step"]) == [0, 1, 2, 3]
    with pytest.raises(FitError, match=r"experts\.0\.w.step. at ep 0 is int64, but .* says i32"):
        bind(program(*lines[:-1], "state step : i32[]"), held, mesh=Mesh({"ep": 2}))


def test_states_of_their_own_for_each_coordinate_need_dims() -> None:
    held = [Held("w", (3,), "float32", {"dp": k}, state) for k in range(2) for state in ("value", "momentum")]
    with pytest.raises(FitError, match="of its own needs dims"):
        bind(program("mesh dp", "w <-> w", "state momentum : like param each dp"), held, mesh=Mesh({"dp": 2}))


def test_a_step_of_layers_that_are_stacked() -> None:
    held = [Held("w", (3, 4), "float32"), Held("w", (), "float32", {}, "step")]
    with pytest.raises(FitError, match="of a tensor that is stacked"):
        bind(program("size l a", "w [l, a] <-> layers.{l}.w [a]", "state step : []"), held, mesh=Mesh({}))
