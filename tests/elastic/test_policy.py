"""Policies: what they like best comes first, and nothing has more ranks than there are unless nothing is smaller."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.elastic import keep, prefer
from ucp.errors import UsageError
from ucp.layout import Mesh


def test_the_axis_that_grows_takes_what_ranks_there_are_then_less() -> None:
    assert [str(mesh) for mesh in keep(tp=2, pp=2).layouts(13)] == ["pp2 dp3 tp2", "pp2 dp2 tp2", "pp2 dp1 tp2"]


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 4), st.none() | st.integers(1, 20))
def test_no_rank_is_left_over_that_could_take_part(world: int, tp: int, pp: int, at_most: int | None) -> None:
    found = keep(tp=tp, pp=pp, at_most=at_most).layouts(world)
    assert all(mesh["tp"] == tp and mesh["pp"] == pp for mesh in found)
    assert [mesh["dp"] for mesh in found] == list(range(len(found), 0, -1))
    if world < tp * pp:
        assert found == (Mesh({"pp": pp, "dp": 1, "tp": tp}),), "the least it can do with, to be refused with a reason"
    else:
        assert found[0].size <= world
        assert found[0].size + tp * pp > world or found[0]["dp"] == at_most


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (keep(), ["dp"]),
        (keep(tp=1), ["dp", "tp"]),
        (keep(tp=2, cp=2, pp=2), ["pp", "dp", "cp", "tp"]),
        (keep(dp_shard=2, tp=2, grow="dp_replicate"), ["dp_replicate", "dp_shard", "tp"]),
        (keep(tp=2, pp=2, order=["dp", "tp", "pp"]), ["dp", "tp", "pp"]),
    ],
    ids=str,
)
def test_axes_are_in_the_usual_order_or_the_one_given(policy: Any, names: list[str]) -> None:
    assert all([name for name, _ in mesh.axes] == names for mesh in policy.layouts(24))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dp": 2}, "dp is both kept at 2 and to grow"),
        ({"tp": 0}, "tp=0"),
        ({"tp": True}, "tp=True"),
        ({"tp": 2.0}, r"tp=2\.0"),
        ({"at_most": 0}, "at_most=0"),
        ({"tp": 2, "order": ["dp"]}, "order="),
        ({"tp": 2, "order": ["dp", "tp", "tp"]}, "order="),
        ({"tp": 2, "order": ["dp", "pp"]}, "order="),
    ],
    ids=str,
)
def test_keep_refuses(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        keep(**options)


def test_the_largest_world_that_is_there_then_smaller_ones() -> None:
    policy = prefer({4: {"dp": 4}, 8: {"dp": 4, "tp": 2}, 2: {"dp": 1, "tp": 2}})
    tried = {world: [str(mesh) for mesh in policy.layouts(world)] for world in (9, 8, 7, 4, 3)}
    assert tried == {
        9: ["dp4 tp2", "dp4", "dp1 tp2"],
        8: ["dp4 tp2", "dp4", "dp1 tp2"],
        7: ["dp4", "dp1 tp2"],
        4: ["dp4", "dp1 tp2"],
        3: ["dp1 tp2"],
    }
    assert [str(mesh) for mesh in policy.layouts(1)] == ["dp1 tp2"], "the least, to be refused with a reason"


def test_a_layout_may_leave_ranks_over_on_purpose() -> None:
    policy = prefer({7: {"dp": 3, "tp": 2}, 4: {"dp": 4}})
    assert policy.layouts(7)[0].size == 6
    assert policy.layouts(6) == (Mesh({"dp": 4}),), "it is for 7, though 6 would do"


@pytest.mark.parametrize(
    ("layouts", "problem"),
    [
        ({}, "no layouts"),
        ({4: {"dp": 4, "tp": 2}}, "dp4 tp2 has a size of 8, and is for a world of 4"),
        ({4: {"dp": 0}}, "dp=0 for 4 ranks"),
        ({4: {"dp": 2.0, "tp": 1}}, r"dp=2\.0 for 4 ranks"),
        ({4: {"tp": True}}, "tp=True for 4 ranks"),
        ({8: {"dp": 8}, "4": {"dp": 4}}, "dp4 for '4' ranks"),
        ({0: {}}, "1 rank has a size of 1, and is for a world of 0"),
    ],
    ids=str,
)
def test_prefer_refuses(layouts: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        prefer(layouts)


def test_policies_say_what_they_are() -> None:
    assert str(keep(tp=2, at_most=8)) == "keep(tp=2, grow='dp', at_most=8)"
    assert str(prefer({8: {"dp": 4, "tp": 2}, 4: {"dp": 4}})) == "prefer(8: dp4 tp2, 4: dp4)"


def test_a_layout_is_chosen_without_torch() -> None:
    program = """
import sys, ucp
from ucp.elastic import Batch, Needs, choose, keep, prefer, seat
ucp.elastic.choose(keep(tp=2), 7, batch=Batch(8, 2), needs=Needs(divides={"tp": [8]}))
assert "Feed" in dir(ucp.elastic)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
