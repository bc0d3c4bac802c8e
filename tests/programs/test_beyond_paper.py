"""Layouts that the paper's table has no word for: recorded placements, stages of other depths, local updates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ucp.errors import ConflictError, FitError
from ucp.lang import parse
from ucp.lang.arrays import at, gather, scatter
from ucp.layout import Mesh


def numbers(*shape, start=0):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


EXPERTS = parse(
    "format 1\nmesh ep tp\nsize ffn hidden\n"
    "experts.{e@ep}.up [ffn/tp, hidden] <-> moe.up [e, ffn, hidden]\nrouter [e, hidden] <-> moe.router\n"
)
SPREAD = {0: (5, 2), 1: (0, 1, 2, 4), 2: (), 3: (3,)}
"""Fully sharded sparse data parallelism: another set and number of experts on each rank, expert 2 on two of them."""
EVEN = {0: (0, 1, 2), 1: (3, 4, 5)}


def _cut(up, router, placement, tp):
    return {
        at(ep=ep, tp=t): {
            "router": router,
            **{f"experts.{k}.up": np.split(up[e], tp)[t].copy() for k, e in enumerate(placement[ep])},
        }
        for ep in placement
        for t in range(tp)
    }


def _asked(placement, tp):
    mesh = Mesh({"ep": len(placement), "tp": tp})
    return {"mesh": mesh, "sizes": {"e": 6}, "placements": {("e", "ep"): placement}}


def test_experts_of_any_set_and_number_per_rank_move_to_other_ranks():
    up, router = numbers(6, 4, 3), numbers(6, 3, start=500)
    whole = gather(EXPERTS, _cut(up, router, SPREAD, 2), **_asked(SPREAD, 2))
    np.testing.assert_array_equal(whole["moe.up"], up, strict=True)
    np.testing.assert_array_equal(whole["moe.router"], router, strict=True)
    made = scatter(EXPERTS, whole, **_asked(EVEN, 4))
    for place, state in _cut(up, router, EVEN, 4).items():
        assert sorted(made[place]) == sorted(state)
        for name, array in state.items():
            np.testing.assert_array_equal(made[place][name], array, strict=True)


def test_an_expert_on_two_ranks_is_compared_and_one_on_none_is_a_hole():
    up, router = numbers(6, 4, 3), numbers(6, 3)
    shards = _cut(up, router, SPREAD, 1)
    shards[at(ep=1, tp=0)]["experts.2.up"][0, 0] += 1
    with pytest.raises(ConflictError):
        gather(EXPERTS, shards, **_asked(SPREAD, 1))
    lost = {**SPREAD, 3: ()}
    with pytest.raises(FitError):
        gather(EXPERTS, _cut(up, router, lost, 1), **_asked(lost, 1))


LOCAL = parse(
    "format 1\nmesh dp tp\nsize a b\nw [a/tp, b] <-> w\n"
    "state exp_avg : like param each dp\nstate momentum : like param\n"
)


def test_local_updates_keep_what_each_group_has_beside_what_all_share():
    """Workers train alone between outer steps: moments differ by group, weights and outer momentum are everyone's."""
    mesh = Mesh({"dp": 3, "tp": 2})
    shared, own = numbers(4, 5), numbers(3, 4, 5, start=100)
    everyone = {at(dp=d, tp=t): {"w": half.copy()} for d in range(3) for t, half in enumerate(np.split(shared, 2))}
    each = {at(dp=d, tp=t): {"w": half.copy()} for d in range(3) for t, half in enumerate(np.split(own[d], 2))}
    for state, shards, expected in (
        ("value", everyone, shared),
        ("momentum", everyone, shared),
        ("exp_avg", each, own),
    ):
        found = gather(LOCAL, shards, mesh=mesh, state=state)
        np.testing.assert_array_equal(found["w"], expected, strict=True)
    with pytest.raises(ConflictError):
        gather(LOCAL, each, mesh=mesh, state="momentum")


def test_stages_of_other_depths():
    program = parse("format 1\nmesh pp\nsize a\nlayers.{l/pp}.w [a] <-> layers.{l}.w\n")
    weights = [numbers(2, start=10 * layer) for layer in range(6)]

    def cut(bounds):
        stages = itertools.pairwise(bounds)
        return {
            at(pp=stage): {f"layers.{k}.w": weights[layer] for k, layer in enumerate(range(start, stop))}
            for stage, (start, stop) in enumerate(stages)
        }

    whole = gather(program, cut((0, 1, 4, 6)), mesh=Mesh({"pp": 3}))
    assert [list(whole[f"layers.{layer}.w"]) for layer in range(6)] == [list(weight) for weight in weights]
    deep = (0, 4, 5, 5, 6)
    made = scatter(program, whole, mesh=Mesh({"pp": 4}), cuts={("l", ("pp",)): deep})
    for place, state in cut(deep).items():
        assert {name: list(array) for name, array in made[place].items()} == {n: list(a) for n, a in state.items()}
    even = scatter(program, whole, mesh=Mesh({"pp": 2}))
    assert [len(state) for state in even.values()] == [3, 3]
