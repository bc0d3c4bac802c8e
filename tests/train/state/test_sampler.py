"""The place in the data, over any sequence of numbers of ranks: no sample lost, none twice."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tests.support.gloo import spawn
from ucp.errors import FitError, UsageError
from ucp.train.items import Item, ReshardableLoader, ReshardableSampler, World, item_of
from ucp.train.state.sampler import Tail


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def item(value: Any) -> Item:
    found = item_of("loader", value)
    assert found is not None
    return found


def job(
    length: int, ranks: int, batch: int, *, tail: Tail = "roll", drop_last: bool = False, **options: Any
) -> list[ReshardableLoader]:
    """One loader for each rank of a job."""
    data = Numbers(length)
    samplers = [ReshardableSampler(data, seed=5, tail=tail, rank=rank, ranks=ranks) for rank in range(ranks)]
    return [
        ReshardableLoader(DataLoader(data, batch_size=batch, sampler=one, drop_last=drop_last, **options))
        for one in samplers
    ]


def save(loaders: list[ReshardableLoader]) -> Any:
    first, *others = (item(loader).saved() for loader in loaders)
    assert all(other == first for other in others)
    return first


def restore(loaders: list[ReshardableLoader], state: Any) -> None:
    for rank, loader in enumerate(loaders):
        item(loader).restore(state, world=World(rank, len(loaders), 99, same_layout=False))


def run(loaders: list[ReshardableLoader], steps: int) -> list[int]:
    """What a job trains on in a number of steps of all its ranks, over as many epochs as that takes, in order."""
    seen: list[int] = []
    while steps:
        before = steps
        for batches in zip(*loaders, strict=True):
            seen += [int(sample) for samples in zip(*batches, strict=True) for sample in samples]
            steps -= 1
            if not steps:
                break
        assert steps < before or any(len(loader) for loader in loaders), "an epoch without a batch"
    return seen


# Kept small so that many sequences are tried: partial batches, epochs that end in the middle, fewer samples than ranks.
worlds = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(20, 53), worlds=worlds, drop_last=st.booleans())
def test_rolling_loses_and_repeats_nothing(length: int, worlds: list[tuple[int, int, int]], drop_last: bool) -> None:
    seen: list[int] = []
    state = None
    for ranks, batch, steps in worlds:
        loaders = job(length, ranks, batch, drop_last=drop_last)
        if state is not None:
            restore(loaders, state)
        seen += run(loaders, steps)
        state = save(loaders)
    assert state["position"] == len(seen)
    for start in range(0, len(seen), length):
        epoch = Counter(seen[start : start + length])
        assert max(epoch.values()) == 1
        assert len(epoch) == length or start + length > len(seen)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), ranks=st.integers(1, 5), batch=st.integers(1, 4), after=st.integers(1, 5))
def test_dropping_drops_fewer_than_a_turn_of_all_ranks(length: int, ranks: int, batch: int, after: int) -> None:
    first = job(length, ranks, batch, tail="drop")
    seen = [int(s) for batches in zip(*first, strict=True) for one in batches for s in one]
    assert max(Counter(seen).values(), default=0) <= 1
    assert length - len(seen) == length % ranks
    second = job(length, after, batch, tail="drop")
    restore(second, save(first))
    assert second[0].sampler.position == length
    later = [int(s) for batches in zip(*second, strict=True) for one in batches for s in one]
    assert len(set(later)) == len(later) == length - length % after


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), ranks=st.integers(1, 5), batch=st.integers(1, 4))
def test_uneven_ranks_see_every_sample_once(length: int, ranks: int, batch: int) -> None:
    loaders = job(length, ranks, batch, tail="uneven")
    seen = [int(sample) for loader in loaders for one in loader for sample in one]
    assert sorted(seen) == list(range(length))
    assert save(loaders)["position"] == length


def test_the_order_is_that_of_one_rank_for_any_number_of_them() -> None:
    alone = run(job(40, 1, 4), 10)
    four = run(job(40, 4, 1), 10)
    assert alone == four
    assert alone != list(range(40))
    assert run(job(40, 1, 40), 2)[40:] != alone


def test_a_break_is_gone_on_from() -> None:
    (loader,) = job(12, 1, 4)
    first = next(iter(loader))
    rest = list(loader)
    assert len(loader) == 3
    assert sorted(int(s) for b in [first, *rest] for s in b) == list(range(12))


def test_an_iteration_ends_when_another_begins_or_a_load_moves_the_sampler() -> None:
    (loader,) = job(12, 1, 4)
    old = iter(loader)
    next(old)
    state = save([loader])
    next(iter(loader))
    with pytest.raises(UsageError, match="went on elsewhere"):
        next(old)
    new = iter(loader)
    next(new)
    restore([loader], state)
    with pytest.raises(UsageError, match="went on elsewhere"):
        next(new)


def test_without_the_loader_what_is_consumed_must_be_told() -> None:
    data = Numbers(10)
    sampler = ReshardableSampler(data, rank=1, ranks=2)
    position = item(sampler)
    batches = iter(DataLoader(data, batch_size=2, sampler=sampler))
    next(batches)
    with pytest.raises(FitError, match="nobody told"):
        position.saved()
    sampler.advance(4)
    assert position.saved()["position"] == 4
    with pytest.raises(UsageError, match="leaves the epoch"):
        sampler.advance(7)


def test_another_dataset_is_refused() -> None:
    loaders = job(12, 1, 4)
    with pytest.raises(FitError, match="12 samples, this one has 13"):
        restore(job(13, 1, 4), save(loaders))
    with pytest.raises(FitError, match="no position"):
        restore(loaders, {"position": 3})


def test_the_order_comes_from_the_source_and_the_report_says_so() -> None:
    (first,) = job(12, 1, 4)
    run([first], 1)
    other = ReshardableSampler(12, seed=6)
    note = item(other).restore(save([first]), world=World(0, 1, 1, same_layout=True))
    assert note == "loader: order of seed 5, shuffle=True, as in the source".replace("loader", "sampler")
    assert list(other) == [int(s) for b in first for s in b]


def test_a_count_of_samples_from_another_framework_is_gone_on_from() -> None:
    sampler = ReshardableSampler(10)
    note = item(sampler).restore(25, world=World(0, 1, 1, same_layout=True))
    assert note is not None
    assert (sampler.position, sampler.epoch) == (25, 2)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader,
        lambda data: DataLoader(data, batch_sampler=[[0], [1]]),
        lambda data: DataLoader(data, sampler=ReshardableSampler(data), num_workers=1, in_order=False),
    ],
)
def test_loaders_that_draw_in_another_way_are_refused(loader: Any) -> None:
    with pytest.raises(UsageError, match="ReshardableLoader"):
        ReshardableLoader(loader(Numbers(4)))


def test_batch_samplers_and_loaders_without_batches() -> None:
    data = Numbers(10)
    sampler = ReshardableSampler(data, rank=0, ranks=2)
    by_batch = ReshardableLoader(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=True)))
    assert [len(batch) for batch in by_batch] == [2, 2]
    assert sampler.position == 8
    singly = ReshardableLoader(DataLoader(data, batch_size=None, sampler=sampler))
    assert (len(singly), len(list(singly)), sampler.position) == (6, 6, 20)


def test_iterating_leaves_the_global_stream_alone() -> None:
    (loader,) = job(12, 1, 4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [{"rank": 1}, {"rank": 2, "ranks": 2}, {"tail": "pad"}])
def test_what_makes_no_sampler(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ReshardableSampler(4, **bad)
    with pytest.raises(UsageError):
        ReshardableSampler(0)


def consume(rank: int, world: int, state: Any, steps: int, workers: int) -> tuple[list[int], Any]:
    # Ranks of the tests are daemons, which may not start workers; those end with the rank that started them.
    multiprocessing.current_process()._config["daemon"] = False
    data = Numbers(67)
    sampler = ReshardableSampler(data, seed=1)
    loader = ReshardableLoader(
        DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers, prefetch_factor=4 if workers else None)
    )
    if state is not None:
        item(loader).restore(state, world=World(rank, world, 99, same_layout=False))
    seen: list[int] = []
    while True:
        for batch in loader:
            seen += batch.tolist()
            steps -= 1
            if not steps:
                return seen, item(loader).saved()


@pytest.mark.parametrize(
    "jobs",
    [
        ((2, 4, 1), (1, 18, 2)),
        pytest.param(((3, 2, 2), (2, 4, 1), (1, 3, 2), (2, 6, 0)), marks=pytest.mark.slow),
    ],
    ids=["two jobs", "four jobs"],
)
def test_workers_that_fetch_ahead_on_changing_ranks(jobs: tuple[tuple[int, int, int], ...]) -> None:
    seen: list[int] = []
    state = None
    for world, steps, workers in jobs:
        results = spawn(consume, world, state, steps, workers)
        seen += [sample for samples in zip(*(own for own, _ in results), strict=True) for sample in samples]
        states = [one for _, one in results]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert state["position"] == len(seen)
    assert sorted(seen[:67]) == list(range(67))
    assert max(Counter(seen[67:]).values(), default=1) == 1


# torchdata 0.11 calls what torch 2.13 gave up.
torchdata = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")


def by_torchdata(ranks: int, batch: int, workers: int = 0) -> list[ReshardableLoader]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = Numbers(41)
    samplers = [ReshardableSampler(data, seed=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    return [
        ReshardableLoader(StatefulDataLoader(data, batch_size=batch, sampler=one, num_workers=workers))
        for one in samplers
    ]


@torchdata
def test_the_loader_of_torchdata() -> None:
    seen: list[int] = []
    state = None
    for ranks, batch, steps, workers in ((2, 3, 4, 1), (3, 2, 5, 0), (1, 4, 6, 0)):
        loaders = by_torchdata(ranks, batch, workers)
        if state is not None:
            restore(loaders, state)
        seen += run(loaders, steps)
        state = save(loaders)
    assert sorted(seen[:41]) == list(range(41))
    assert len(set(seen[41:])) == len(seen) - 41


@torchdata
def test_the_loader_of_torchdata_by_itself_keeps_the_place_of_each_rank() -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        return StatefulDataLoader(Numbers(12), batch_size=2)

    one, two = loader(), loader()
    batches = iter(one)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    stored = {0: item(one).saved(), 1: item(two).saved()}
    assert item(one).per_rank
    other = loader()
    item(other).restore(stored, world=World(0, 2, 2, same_layout=True))
    assert next(iter(other)).tolist() == [4, 5]
    with pytest.raises(FitError, match="2 ranks, which are not the ranks that load") as raised:
        item(other).restore(stored, world=World(0, 1, 2, same_layout=False))
    assert raised.value.hint is not None and "ReshardableLoader" in raised.value.hint


def drawn_on_mesh(rank: int, world: int) -> tuple[list[int], int]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    sampler = ReshardableSampler(10, seed=4, mesh=mesh["dp"])
    both = ReshardableSampler(10, seed=4, mesh=mesh)
    assert (both.rank, both.ranks) == (rank, world)
    return list(sampler), sampler.ranks


@pytest.mark.slow
def test_ranks_that_share_their_data_draw_alike() -> None:
    drawn = [samples for samples, ranks in spawn(drawn_on_mesh, 4) if ranks == 2]
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert sorted(drawn[0] + drawn[2]) == list(range(10))
