"""The feed: over any sequence of numbers of ranks and restarts, each sample is consumed exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import ucp
from tests.support.gloo import spawn
from ucp.elastic import Batch, Feed
from ucp.errors import FitError, UsageError
from ucp.train.items import ReshardableSampler, World, item_of


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def job(length: int, batch: Batch, ranks: int, state: Any = None, **options: Any) -> list[Feed]:
    """One feed for each data-parallel rank of a job that goes on from `state`."""
    feeds = [Feed(Numbers(length), batch, **{"seed": 5, **options}) for _ in range(ranks)]
    for rank, feed in enumerate(feeds):
        if state is not None:
            feed.restore(state, world=World(rank, ranks, 99, same_layout=False))
        feed.place(rank, ranks)
    return feeds


def take(feeds: list[Feed], steps: int = 1) -> list[int]:
    """Samples of a number of steps of all ranks, in order of their positions; what is told of them is checked."""
    seen: list[tuple[int, int]] = []
    for _ in range(steps):
        for feed in feeds:
            given = list(feed.step())
            assert len(given) == feed.count
            samples = [int(sample) for batch, _ in given for sample in batch]
            assert feed.samples == tuple(samples)
            assert [weight for _, weight in given] == [feed.batch.weight(len(b), len(feeds)) for b, _ in given]
            seen += zip(feed.positions, samples, strict=True)
    seen.sort()
    return [sample for _, sample in seen]


def same(feeds: list[Feed]) -> Any:
    first, *others = (feed.saved() for feed in feeds)
    assert all(other == first for other in others)
    return first


# ranks, whole steps that are saved, and steps after the save that a failure takes back
starts = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 60),
    batch=st.builds(Batch, st.integers(1, 30), st.integers(1, 5)),
    starts=starts,
    shuffle=st.booleans(),
)
def test_every_sample_is_consumed_exactly_once(
    length: int, batch: Batch, starts: list[tuple[int, int, int]], shuffle: bool
) -> None:
    """Whatever worlds come and whatever is rolled back: each epoch of the history has each sample once."""
    starts = [start for start in starts if batch.problem(start[0]) is None]
    assume(starts)
    state, seen = None, list[int]()
    for ranks, steps, lost in starts:
        feeds = job(length, batch, ranks, state, shuffle=shuffle)
        seen += take(feeds, steps)
        state = same(feeds)
        take(feeds, lost)
    assert state["position"] == len(seen) == sum(steps for _, steps, _ in starts) * batch.samples
    for start in range(0, len(seen), length):
        epoch = seen[start : start + length]
        if start + length <= len(seen):
            assert set(epoch) == set(range(length))
        assert len(set(epoch)) == len(epoch)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), batch=st.builds(Batch, st.integers(1, 30), st.integers(1, 5)), starts=starts)
def test_each_step_has_the_samples_of_the_job_that_nothing_happened_to(
    length: int, batch: Batch, starts: list[tuple[int, int, int]]
) -> None:
    undisturbed, state = job(length, batch, 1), None
    for ranks, steps, lost in starts:
        if batch.problem(ranks) is None:
            feeds = job(length, batch, ranks, state)
            for _ in range(steps):
                assert take(feeds) == take(undisturbed)
            state = same(feeds)
            take(feeds, lost)


def test_positions_never_come_again() -> None:
    """While numbers in the dataset do, with every epoch."""
    feeds = job(10, Batch(4, 1), 2)
    found: list[tuple[int, int]] = []
    for _ in range(5):
        take(feeds)
        found += [pair for feed in feeds for pair in zip(feed.positions, feed.samples, strict=True)]
    assert sorted(position for position, _ in found) == list(range(20))
    assert Counter(sample for _, sample in found) == dict.fromkeys(range(10), 2)
    assert {feed.epoch for feed in feeds} == {2}


def test_the_order_is_that_of_a_sampler() -> None:
    drawn = list(ReshardableSampler(20, seed=5, rank=0, ranks=1))
    assert take(job(20, Batch(5, 2), 3), 4) == drawn
    assert take(job(20, Batch(5, 2), 1, shuffle=False), 4) == list(range(20))
    assert take(job(20, Batch(5, 2), 1, seed=6), 4) != drawn


def test_a_feed_goes_on_where_a_sampler_was_and_back() -> None:
    sampler = ReshardableSampler(20, seed=5, rank=0, ranks=1)
    drawn = list(sampler)
    sampler.advance(8)
    item = item_of("sampler", sampler)
    assert item is not None
    feeds = job(20, Batch(4, 2), 2, item.saved(), seed=0)
    assert take(feeds, 2) == drawn[8:16], "in the order of the source, whatever the own seed"
    item.restore(same(feeds), world=World(0, 1, 2, same_layout=False))
    assert list(sampler) == drawn[16:]


def test_a_feed_that_was_under_way_goes_on_in_the_order_of_the_source() -> None:
    (other,), (feed,) = job(20, Batch(4, 2), 1, seed=1), job(20, Batch(4, 2), 1, seed=2)
    take([other])
    take([feed], 3)
    feed.restore(other.saved(), world=World(0, 1, 1, same_layout=True))
    assert take([feed], 4) == take([other], 4)


def test_orders_of_epochs_gone_by_are_let_go() -> None:
    (feed,) = job(20, Batch(8, 2), 1)
    take([feed], 20)
    assert feed.epoch == 8
    assert len(feed._orders) <= 2


def test_a_count_of_samples_is_gone_on_from() -> None:
    """As Megatron and DeepSpeed leave it."""
    feeds = job(20, Batch(4, 2), 2, 8)
    assert {feed.position for feed in feeds} == {8}
    assert take(feeds, 3) == list(ReshardableSampler(20, seed=5, rank=0, ranks=1))[8:]


def test_a_step_may_be_larger_than_the_data() -> None:
    seen = take(job(3, Batch(8, 4), 2), 3)
    assert Counter(seen) == dict.fromkeys(range(3), 8)


def test_a_step_that_is_left_holds_up_the_next() -> None:
    (feed,) = job(20, Batch(6, 2), 1)
    for _ in zip(range(3), feed.step(), strict=False):
        pass  # three micro-batches are all, and yet nobody asked for the end
    with pytest.raises(UsageError, match="left in micro-batch 3 of 3"):
        next(feed.step())
    with pytest.raises(FitError, match="in micro-batch 3 of 3"):
        feed.saved()
    assert feed.position == 0


def test_a_step_that_failed_is_begun_anew_when_asked() -> None:
    (feed,) = job(20, Batch(6, 2), 1)
    take([feed])
    first = next(feed.step())
    feed.again()
    assert feed.position == 6
    assert next(feed.step())[0].tolist() == first[0].tolist()


@pytest.mark.parametrize("disturb", ["again", "place", "restore"])
def test_a_step_ends_when_the_feed_goes_elsewhere(disturb: str) -> None:
    (feed,) = job(20, Batch(6, 2), 1)
    state, step = feed.saved(), feed.step()
    next(step)
    if disturb == "restore":
        feed.restore(state, world=World(0, 1, 1, same_layout=True))
    else:
        feed.again() if disturb == "again" else feed.place(0, 2)
    with pytest.raises(UsageError, match="while this step was under way"):
        next(step)
    assert (feed.position, feed.saved()) == (0, state)
    assert len(list(feed.step())) == feed.count


def test_two_steps_at_a_time_are_refused() -> None:
    (feed,) = job(20, Batch(6, 2), 1)
    first, second = feed.step(), feed.step()
    next(first)
    with pytest.raises(UsageError, match="left in micro-batch 1"):
        next(second)


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        raise ValueError("no such file")


def test_a_sample_that_cannot_be_fetched_is_not_counted() -> None:
    feed = Feed(Broken(20), Batch(6, 2))
    with pytest.raises(ValueError, match="no such file"):
        list(feed.step())
    assert feed.position == 0
    with pytest.raises(FitError):
        feed.saved()


@pytest.mark.parametrize(("rank", "ranks", "problem"), [(2, 2, "rank 2 of 2"), (0, 7, "1 would be empty")])
def test_a_place_is_checked(rank: int, ranks: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Feed(Numbers(20), Batch(6, 2)).place(rank, ranks)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


@pytest.mark.parametrize(
    ("data", "options", "problem"),
    [
        (Stream(), {}, "Stream is no dataset"),
        (iter([1]), {}, "is no dataset"),
        ([], {}, "at least one sample"),
        ([1], {"batch_size": 2}, "batch_size is not free"),
        ([1], {"drop_last": True, "sampler": None}, "sampler, drop_last is not free"),
        ([1], {"collate_fn": list}, "collate_fn is not free"),
        ([1], {"generator": None}, "generator is not free"),
        ([1], {"in_order": False}, "in_order=False"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Stream | Iterator) else str(given),
)
def test_a_feed_refuses(data: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Feed(data, Batch(4, 2), **options)


def test_a_dataset_of_another_length_is_refused() -> None:
    with pytest.raises(FitError, match="a dataset of 20 samples, this one has 21"):
        job(21, Batch(4, 2), 1, same(job(20, Batch(4, 2), 1)))


def test_samples_are_collated_as_asked() -> None:
    (feed,) = job(20, Batch(4, 2), 1, collate=tuple)
    assert [batch for batch, _ in feed.step()] == [feed.samples[:2], feed.samples[2:]]


def test_nothing_is_taken_from_the_global_stream() -> None:
    before = torch.get_rng_state()
    take(job(20, Batch(4, 2), 2), 3)
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(Numbers):
    """Tells who fetched a sample, and what its worker draws for it."""

    def __getitem__(self, index: int) -> int:
        assert get_worker_info() is not None
        return 1000 * random.randrange(1000) + index


def test_workers_fetch_ahead_and_what_they_fetched_is_fetched_again() -> None:
    def start(ranks: int, state: Any) -> list[Feed]:
        options = {"seed": 5, "num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": "fork"}
        feeds = [Feed(Noisy(12), Batch(4, 2), **options) for _ in range(ranks)]
        for rank, feed in enumerate(feeds):
            if state is not None:
                feed.restore(state, world=World(rank, ranks, 99, same_layout=False))
            feed.place(rank, ranks)
        return feeds

    def drawn(feeds: list[Feed]) -> list[int]:
        return [int(one) for feed in feeds for batch, _ in feed.step() for one in batch]

    state, seen = None, list[int]()
    for ranks, steps in ((2, 2), (1, 3), (2, 1)):
        feeds = start(ranks, state)
        noise = [number for _ in range(steps) for number in drawn(feeds)]
        state = same(feeds)
        seen += [number % 1000 for number in noise]
        if steps == 3:
            again = start(1, {**state, "position": 8})
            assert [number for _ in range(3) for number in drawn(again)] == noise, "from one place, one noise"
    expected = [number for step in range(6) for number in take(job(12, Batch(4, 2), 1, 4 * step))]
    assert seen == expected


def on_real_ranks(rank: int, world: int, url: str) -> tuple[list[int], list[int]]:
    """A job that trains two steps and saves."""
    feed = Feed(Numbers(21), Batch(6, 2), seed=3)
    with pytest.raises(UsageError, match="nobody told which samples"):
        next(feed.step())
    feed.place(rank, world)
    found = two_steps(feed)
    ucp.save({"model": torch.nn.Linear(1, 1), "feed": feed}, url)
    return found


def two_steps(feed: Feed) -> tuple[list[int], list[int]]:
    found: tuple[list[int], list[int]] = ([], [])
    for _ in range(2):
        found[0].extend(int(one) for batch, _ in feed.step() for one in batch)
        found[1].extend(feed.positions)
    return found


def test_a_job_goes_on_from_what_more_ranks_saved(tmp_path: Path) -> None:
    given = spawn(on_real_ranks, 3, str(tmp_path / "saved"))
    assert ucp.open(str(tmp_path / "saved")).catalog.state["sampler"]["position"] == 12
    feed = Feed(Numbers(21), Batch(6, 2), seed=3)
    ucp.load({"model": torch.nn.Linear(1, 1), "feed": feed}, str(tmp_path / "saved"))
    given.append(two_steps(feed))
    seen = [pair for samples, positions in given for pair in zip(positions, samples, strict=True)]
    assert sorted(position for position, _ in seen) == list(range(24))
    assert {sample for position, sample in seen if position < 21} == set(range(21))
