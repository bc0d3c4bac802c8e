from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.errors import UsageError
from ucp.lifecycle.shelf import Saved
from ucp.train.manager.keep import Best, Keep


def saved(step: int, loss: float | None = None, *, aside: bool = False) -> Saved:
    return Saved(step, f"run/{step}", {} if loss is None else {"loss": loss}, aside)


def test_nothing_goes_unless_asked() -> None:
    assert Keep().expendable([saved(step) for step in range(9)], newest=8) == []


def test_latest_every_and_best_stay() -> None:
    run = [saved(step, loss) for step, loss in ((100, 3.0), (200, 0.5), (300, 2.0), (400, 1.0), (500, 4.0), (600, 5.0))]
    keep = Keep(latest=2, every=300, best=Best("loss", "min"))
    assert keep.expendable(run, newest=600) == [100, 400]
    assert Keep(latest=1, best=Best("loss", "max", 2)).expendable(run, newest=600) == [100, 200, 300, 400]


def test_what_is_newer_than_the_commit_never_goes() -> None:
    assert Keep(latest=1).expendable([saved(1), saved(2), saved(3)], newest=2) == [1]


def test_what_was_put_aside_counts_for_nothing_and_goes_when_passed() -> None:
    run = [saved(1), saved(2), saved(3, aside=True), saved(9, aside=True), saved(4)]
    assert Keep(latest=3).expendable(run, newest=4) == [3]


def test_best_is_no_nan_and_the_newest_of_equals() -> None:
    run = [saved(1, 1.0), saved(2, 1.0), saved(3, math.nan), saved(4), saved(5, 2.0)]
    assert [one.step for one in Best("loss", "min").ranked(run)] == [2, 1, 5]
    assert [one.step for one in Best("loss", "max").ranked(run)] == [5, 2, 1]


@pytest.mark.parametrize(("wrong", "said"), [({"latest": 0}, "at least 1"), ({"every": 5}, "keep_latest")])
def test_policies_that_make_no_sense(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Keep(**wrong)
    assert said in f"{caught.value} {caught.value.hint}"


runs = st.lists(
    st.tuples(st.integers(0, 60), st.floats() | st.none(), st.booleans()), unique_by=lambda row: row[0], min_size=1
)


@given(runs, st.integers(1, 5), st.none() | st.integers(1, 9), st.none() | st.sampled_from(["min", "max"]))
def test_the_newest_whole_and_the_best_are_never_expendable(
    rows: list[tuple[int, float | None, bool]], latest: int, every: int | None, mode: str | None
) -> None:
    run = [saved(step, loss, aside=aside) for step, loss, aside in rows]
    best = None if mode is None else Best("loss", mode)  # type: ignore[arg-type]
    live = sorted(one.step for one in run if not one.aside)
    if not live:
        return
    gone = Keep(latest, every, best).expendable(run, newest=live[-1])
    assert not set(gone) & set(live[-latest:])
    assert all(step < live[-1] for step in gone)
    assert not [step for step in gone if every and step % every == 0 and step in live]
    if best and (ranked := best.ranked([one for one in run if not one.aside])):
        assert ranked[0].step not in gone
    kept = [step for step in live if step not in gone]
    allowed = latest + (1 if best else 0) + len([step for step in live if every and step % every == 0])
    assert len(kept) <= allowed
