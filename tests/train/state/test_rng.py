"""Random streams: each rank's own on the same layout, and on another what can be said of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ucp.errors import FitError, UsageError
from ucp.layout import Mesh
from ucp.train.items import Item, Rng, World, by_rank, combined, item_of


@pytest.fixture(autouse=True)
def own_streams() -> Iterator[None]:
    """Whatever a test does to the streams of the process is undone."""
    before = Rng().states()
    yield
    Rng().set_states(before)


def item(rng: Rng | None = None) -> Item:
    found = item_of("rng", rng or Rng())
    assert found is not None
    return found


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def saved_by(seeds: list[int]) -> Any:
    """What a job keeps whose ranks were seeded so."""
    held = {}
    for rank, number in enumerate(seeds):
        seed(number)
        draw()
        held[rank] = item().saved()
    return by_rank(lazy(combined("rng", held, per_rank=True)))


def lazy(tree: Any) -> Any:
    """As a checkpoint hands it on."""
    from ucp.catalog import Catalog, Source
    from ucp.lazy import lazy_tree
    from ucp.store import open_store

    store: Any = open_store("memory://nothing")
    return lazy_tree(Catalog("memory://", Source("native", "1.0", Mesh({})), {}, {}), store, tree, "rng")


def gone_on(seeds: list[int]) -> list[tuple[float, float, float]]:
    """What each rank of such a job draws next."""
    found = []
    for number in seeds:
        seed(number)
        draw()
        found.append(draw())
    return found


def restored(stored: Any, world: World) -> tuple[tuple[float, float, float], str | None]:
    seed(999)
    note = item().restore(stored, world=world)
    return draw(), note


def world_of(rank: int, mesh: dict[str, int], saved: dict[str, int]) -> World:
    now, then = Mesh(mesh), Mesh(saved)
    return World(rank, now.size, then.size, mesh == saved, now, then)


def test_the_same_layout_goes_on_with_its_own() -> None:
    stored = saved_by([1, 2, 3])
    for rank, expected in enumerate(gone_on([1, 2, 3])):
        assert restored(stored, world_of(rank, {"dp": 3}, {"dp": 3})) == (expected, None)


def test_a_stream_that_all_ranks_shared_goes_on_on_all() -> None:
    stored = saved_by([4, 4])
    for rank in range(3):
        drawn, note = restored(stored, world_of(rank, {"dp": 3}, {"dp": 2}))
        assert drawn == gone_on([4])[0]
        assert note is not None and "one stream for all ranks" in note


def test_streams_of_each_rank_start_anew_and_do_so_again() -> None:
    stored = saved_by([1, 2])
    first = [restored(stored, world_of(rank, {"dp": 4}, {"dp": 2})) for rank in range(4)]
    again = [restored(stored, world_of(rank, {"dp": 4}, {"dp": 2})) for rank in range(4)]
    assert first == again
    assert len({drawn for drawn, _ in first}) == 4
    assert not {drawn for drawn, _ in first} & set(gone_on([1, 2]))
    assert all(note is not None and "starts anew" in note for _, note in first)
    other = saved_by([1, 3])
    assert restored(other, world_of(0, {"dp": 4}, {"dp": 2}))[0] != first[0][0]


def test_streams_that_differ_along_one_axis_follow_it() -> None:
    """dp 2 x tp 2, a stream for each dp rank: tp ranks draw alike, before and after."""
    saved = {"dp": 2, "tp": 2}
    stored = saved_by([1, 1, 2, 2])
    expected = gone_on([1, 2])
    kept = [restored(stored, world_of(rank, {"dp": 2, "tp": 4}, saved)) for rank in range(8)]
    assert [drawn for drawn, _ in kept] == [expected[0]] * 4 + [expected[1]] * 4
    assert all(note is not None and "kept by the coordinate on dp" in note for _, note in kept)
    more = [restored(stored, world_of(rank, {"dp": 3, "tp": 2}, saved))[0] for rank in range(6)]
    assert more[0::2] == more[1::2]
    assert len(set(more)) == 3


def test_a_source_that_does_not_know_its_mesh() -> None:
    stored = saved_by([1, 2])
    unknown = World(1, 2, 1, same_layout=False, mesh=Mesh({"dp": 2}), saved_mesh=Mesh({}))
    assert restored(stored, unknown) == (gone_on([1, 2])[1], None)
    more = World(1, 3, 1, same_layout=False, mesh=Mesh({"dp": 3}), saved_mesh=Mesh({}))
    note = restored(stored, more)[1]
    assert note is not None and "starts anew" in note


def test_meshes_that_do_not_compare_give_each_rank_its_own() -> None:
    stored = saved_by([1, 2])
    drawn = [restored(stored, world_of(rank, {"shard": 4}, {"dp": 2}))[0] for rank in range(4)]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("tensor", ["tp", "tp_ep2_etp1"])
def test_tensor_parallel_ranks_draw_alike_though_meshes_do_not_compare(tensor: str) -> None:
    stored = saved_by([1, 2, 3, 4])
    drawn = [restored(stored, world_of(rank, {"dp": 2, tensor: 2}, {"fsdp": 4}))[0] for rank in range(4)]
    assert drawn[0::2] == drawn[1::2]
    assert len(set(drawn)) == 2


def test_generators_of_ones_own() -> None:
    def generators() -> dict[str, Any]:
        return {
            "torch_one": torch.Generator().manual_seed(1),
            "numpy_one": np.random.default_rng(2),
            "one": random.Random(3),
        }

    def numbers(own: dict[str, Any]) -> tuple[float, float, float]:
        return float(torch.rand((), generator=own["torch_one"])), own["numpy_one"].random(), own["one"].random()

    own = generators()
    numbers(own)
    stored = by_rank(
        lazy(combined("rng", {0: item(Rng(**own)).saved(), 1: item(Rng(**generators())).saved()}, per_rank=True))
    )
    expected = numbers(own)
    other = generators()
    assert item(Rng(**other)).restore(stored, world=World(0, 2, 2, same_layout=True)) is None
    assert numbers(other) == expected
    fresh = [generators() for _ in range(3)]
    for rank, one in enumerate(fresh):
        item(Rng(**one)).restore(stored, world=World(rank, 3, 2, same_layout=False))
    assert len({numbers(one) for one in fresh}) == 3


def test_what_the_source_lacks_is_told() -> None:
    stored = {0: {"cpu": torch.Generator().manual_seed(5).get_state()}}
    random.seed(8)
    expected = random.Random(8).random()
    note = item().restore(stored, world=World(0, 1, 1, same_layout=True))
    assert note == "rng: python, numpy: not in the source, goes on as it is"
    assert random.random() == expected
    assert torch.equal(torch.get_rng_state(), stored[0]["cpu"])
    with pytest.raises(FitError, match="none of the streams"):
        item().restore({0: {"something": 1}}, world=World(0, 1, 1, same_layout=True))


@pytest.mark.parametrize("stream", ["python", "numpy", "cpu"])
def test_states_that_are_none_change_nothing(stream: str) -> None:
    before = Rng().states()
    stored = {0: {**Rng(c=random.Random(1)).states(), stream: torch.zeros(3)}}
    with pytest.raises(FitError, match=f"no state of the stream {stream}"):
        item().restore(stored, world=World(0, 1, 1, same_layout=True))
    assert torch.equal(Rng().states()["cpu"], before["cpu"])


def test_streams_that_only_the_source_has_are_told() -> None:
    stored = {0: Rng(augment=random.Random(1)).states()}
    note = item().restore(stored, world=World(0, 1, 1, same_layout=True))
    assert note == "rng: augment: in the source alone"


def test_streams_by_the_names_of_other_frameworks() -> None:
    seed(6)
    stored = {
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    expected = draw()
    assert restored({0: stored}, World(0, 1, 1, same_layout=True))[0] == expected


def test_no_generator_takes_the_name_of_a_stream_of_the_process() -> None:
    with pytest.raises(UsageError, match="numpy"):
        Rng(numpy=random.Random())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_stream_of_the_current_device() -> None:
    torch.cuda.init()
    torch.cuda.manual_seed(5)
    stored = by_rank(lazy(combined("rng", {0: item().saved()}, per_rank=True)))
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(6)
    assert item().restore(stored, world=World(0, 1, 1, same_layout=True)) is None
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    apart = {0: stored[0], 1: {**stored[0], "cuda": Rng().seeded("cuda", 3)}}
    drawn = []
    for rank in range(2):
        item().restore(apart, world=World(rank, 4, 2, same_layout=False))
        drawn.append(torch.rand(3, device="cuda"))
    assert not torch.equal(*drawn)
