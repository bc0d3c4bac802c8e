"""Items: what each kind saves and how it is set again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from ucp.errors import ConflictError, FitError, UsageError
from ucp.train.items import Item, PerRank, Prepared, World, by_rank, combined, item_of
from ucp.train.state.live import tree_of
from ucp.tree import Opaque, TensorLeaf

SAME = World(0, 1, 1, same_layout=True)


class Seen:
    """Something that each rank has of its own."""

    def __init__(self, *samples: int) -> None:
        self.samples = list(samples)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


def item(name: str, value: Any, **place: Any) -> Item:
    found = item_of(name, value, **place)
    assert found is not None
    return found


def test_a_saved_tree_is_out_of_reach_of_later_changes() -> None:
    value = {"list": [1, 2], "tensor": torch.zeros(3), "array": np.zeros(2), "set": {1}, "text": np.str_("a")}
    tree = tree_of(value, "state")
    value["list"].append(3)
    value["tensor"].fill_(1)
    value["array"][:] = 1
    assert tree["list"] == [1, 2]
    assert isinstance(tree["tensor"], TensorLeaf) and tree["tensor"].inline == bytes(12)
    assert isinstance(tree["array"], TensorLeaf) and tree["array"].inline == bytes(16)
    assert type(tree["text"]) is str


def test_what_is_no_tree_is_named() -> None:
    with pytest.raises(FitError, match=r"state\.a\.0: a object cannot be saved"):
        tree_of({"a": [object()]}, "state")
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(FitError, match="nested too deeply"):
        tree_of(endless, "state")
    with pytest.raises(FitError, match="cannot be stored"):
        tree_of(np.array(["text"]), "state")


def test_a_plain_value_is_set_where_it_lies() -> None:
    state = {"step": 3, "best": None, "log": [1.0]}
    log = state["log"]
    for key, stored in (("step", 7), ("best", 0.5), ("log", [2.0, 3.0])):
        assert item(key, state[key], holder=state, key=key).restore(stored, world=SAME) is None
    assert state == {"step": 7, "best": 0.5, "log": [2.0, 3.0]}
    assert state["log"] is log


def test_a_value_is_saved_as_it_is_then() -> None:
    state = {"step": 3}
    step = item("step", 3, holder=state, key="step")
    state["step"] = 4
    assert step.saved() == 4


def test_a_number_that_nothing_holds_cannot_be_loaded() -> None:
    with pytest.raises(UsageError, match="put it into a dict"):
        item("step", 3).restore(4, world=SAME)
    held = [1]
    item("held", held).restore([2], world=SAME)
    assert held == [2]


@pytest.mark.parametrize("value", [torch.zeros(1), torch.nn.Linear(1, 1), object(), {"a": torch.zeros(1)}])
def test_what_is_no_item(value: Any) -> None:
    assert item_of("x", value) is None


def test_an_object_with_a_state_dict() -> None:
    seen = Seen(1)
    tree = item("seen", seen).saved()
    seen.samples.append(2)
    assert item("seen", seen).restore(tree, world=SAME) is None
    assert seen.samples == [1]
    with pytest.raises(FitError, match=r"never built: seen \(os.system\)"):
        item("seen", seen).restore(Opaque("os", "system"), world=SAME)


def test_ranks_that_differ_in_what_they_share() -> None:
    assert combined("seen", {0: [1], 2: [1]}, per_rank=False) == [1]
    with pytest.raises(ConflictError, match="seen: ranks 0 and 2 have different states") as raised:
        combined("seen", {0: [1], 2: [3]}, per_rank=False)
    assert raised.value.hint is not None and "PerRank" in raised.value.hint


def test_ranks_that_share_what_is_not_a_number_or_large() -> None:
    def tree() -> Any:
        return tree_of({"loss": float("nan"), "large": torch.arange(1000)}, "state")

    assert combined("state", {0: tree(), 1: tree()}, per_rank=False)["large"].numpy is False
    with pytest.raises(ConflictError):
        combined("state", {0: tree(), 1: {**tree(), "large": tree_of(torch.ones(1000), "state")}}, per_rank=False)
    with pytest.raises(ConflictError):
        combined("state", {0: 1, 1: True}, per_rank=False)


def test_what_ranks_have_of_their_own() -> None:
    kept = combined("seen", {1: [2], 0: [1]}, per_rank=True)
    assert kept == {"rank": {"0": [1], "1": [2]}}
    assert by_rank(kept) == {0: [1], 1: [2]}
    assert by_rank({"rank": 3}) == {0: {"rank": 3}}
    assert by_rank([1]) == {0: [1]}


def test_per_rank_on_the_same_layout() -> None:
    seen = Seen()
    stored = {0: {"samples": [1]}, 1: {"samples": [2]}}
    assert item("seen", PerRank(seen)).restore(stored, world=World(1, 2, 2, same_layout=True)) is None
    assert seen.samples == [2]
    with pytest.raises(FitError, match="none of rank 2"):
        item("seen", PerRank(seen)).restore(stored, world=World(2, 3, 3, same_layout=True))


def test_per_rank_of_a_source_that_does_not_know_its_mesh() -> None:
    seen = Seen()
    stored = {0: {"samples": [1]}, 1: {"samples": [2]}}
    item("seen", PerRank(seen)).restore(stored, world=World(1, 2, 1, same_layout=False))
    assert seen.samples == [2]


def merge(states: Any) -> dict[str, Any]:
    return {"samples": [sample for state in states for sample in state["samples"]]}


def split(state: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    return {"samples": state["samples"][rank::size]}


def test_per_rank_on_another_layout() -> None:
    stored = {rank: {"samples": [rank, rank + 10]} for rank in range(3)}
    everybody = []
    for rank in range(2):
        seen = Seen()
        note = item("seen", PerRank(seen, merge, split)).restore(stored, world=World(rank, 2, 3, same_layout=False))
        assert note == "seen: merged from 3 ranks and split over 2"
        everybody += seen.samples
    assert sorted(everybody) == [0, 1, 2, 10, 11, 12]
    one = Seen()
    item("seen", PerRank(one, merge)).restore(stored, world=World(1, 2, 3, same_layout=False))
    assert len(one.samples) == 6
    with pytest.raises(FitError, match="a state on each of 3 ranks"):
        item("seen", PerRank(one)).restore(stored, world=World(1, 2, 3, same_layout=False))


def test_what_per_rank_needs() -> None:
    with pytest.raises(UsageError, match="no state_dict"):
        PerRank([1])
    with pytest.raises(UsageError, match="split without merge"):
        PerRank(Seen(), split=split)


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


def test_a_gradient_scaler() -> None:
    first, second = scaler(init_scale=8.0, growth_interval=5), scaler()
    assert item("scaler", first).name == "loss_scale"
    assert item("scaler", second).restore(item("scaler", first).saved(), world=SAME) is None
    assert second.state_dict() == first.state_dict()


def test_the_loss_scale_of_another_framework() -> None:
    own = scaler()
    note = item("scaler", own).restore({"scale": 512.0, "dynamic": True}, world=SAME)
    assert own.get_scale() == 512.0
    assert note is not None and "growth_interval" in note


def test_scalers_that_are_not_enabled() -> None:
    off = scaler(enabled=False)
    assert (
        item("scaler", off).restore({"scale": 2.0}, world=SAME)
        == "loss_scale: the scaler is not enabled, and stays as it is"
    )
    with pytest.raises(FitError, match="no scale"):
        item("scaler", scaler()).restore({}, world=SAME)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("scheduler", "lr_scheduler"), ("", "lr_scheduler"), ("lr_scheduler", "lr_scheduler"), ("warmup", "warmup")],
)
def test_schedulers_are_stored_under_the_usual_name(name: str, stored: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert item(name, torch.optim.lr_scheduler.StepLR(optimizer, 3)).name == stored


def test_an_item_of_ones_own() -> None:
    class Mine(Item):
        name = "mine"

        def saved(self) -> Any:
            return 1

        def prepare(self, stored: Any, *, world: World) -> Prepared:
            return Prepared(stored, "as it was")

        def install(self, state: Any) -> None:
            self.state = state

    mine = Mine()
    assert item_of("other", mine) is mine
    assert mine.restore(mine.saved(), world=SAME) == "as it was"
    assert mine.state == 1


def test_one_thing_may_go_by_two_names() -> None:
    from ucp.train.items import ReshardableLoader, ReshardableSampler
    from ucp.train.targets import take_apart

    sampler = ReshardableSampler(4)
    loader = ReshardableLoader(torch.utils.data.DataLoader([1, 2, 3, 4], sampler=sampler))
    assert list(take_apart({"sampler": sampler, "loader": loader}).items) == ["sampler"]
    with pytest.raises(UsageError, match="two things are called sampler"):
        take_apart({"sampler": sampler, "loader": ReshardableSampler(4)})


def test_schedulers_of_several_optimizers(tmp_path: Path) -> None:
    def job(rate: float) -> dict[str, Any]:
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
        one, two = (torch.optim.SGD(part.parameters(), lr=rate, momentum=0.9) for part in model.values())
        schedules = {
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(one, 2),
            "second": torch.optim.lr_scheduler.ExponentialLR(two, 0.5),
        }
        return {"model": model, "optimizer": [one, two], **schedules}

    first, other = job(0.1), job(0.7)
    first["second"].optimizer.step()
    first["second"].step()
    ucp.save(first, str(tmp_path / "two"))
    ucp.load(other, str(tmp_path / "two"))
    for name in ("lr_scheduler", "second"):
        assert other[name].state_dict() == first[name].state_dict()
    assert other["second"].get_last_lr() == [0.05]
