from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ucp
from ucp.checkpoint import Checkpoint
from ucp.errors import UcpError
from ucp.integrations.dcp import Reader, Writer
from ucp.testing.watched import Around

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def job(seed: int = 0, *, steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    matrices, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "lr": 0.01}, {"params": others, "lr": 0.03}])
    for step in range(steps):
        model(torch.arange(9) % (step + 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def nested(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optim": states}


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A native checkpoint of a job, with training state."""
    model, optimizer = job(steps=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    extra = {"epoch": 4, "rng": torch.get_rng_state(), "seen": [1, 2], "name": "run"}
    state = {**nested(model, optimizer), "scheduler": schedule.state_dict(), "extra": extra}
    dcp.save(state, storage_writer=Writer(str(tmp_path / "native")))
    return str(tmp_path / "native")


def check_equal(one: Any, other: Any, where: str = "") -> None:
    assert isinstance(one, Mapping) or type(one) is type(other), where
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            check_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def wrong(state: Any) -> Any:
    """The same state dict with other values."""
    if isinstance(state, Mapping):
        return {key: value if key == "params" else wrong(value) for key, value in state.items()}
    if isinstance(state, list):
        return [wrong(value) for value in state]
    if isinstance(state, torch.Tensor):
        return torch.full_like(state, 3)
    return state


@pytest.mark.parametrize("form", ["universal", "dcp", "torch"])
def test_other_forms_load_the_same(saved: str, tmp_path: Path, form: str) -> None:
    truth = nested(*job(steps=2))
    other = str(tmp_path / "other")
    if form == "torch":
        model, optimizer = job(steps=2)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, other)
    else:
        ucp.convert(saved, other, to=form)
    state = wrong(nested(*job(5, steps=1)))
    dcp.load(state, storage_reader=Reader(other))
    check_equal(state, truth)


def test_stock_torch_loads_what_was_converted(saved: str, tmp_path: Path) -> None:
    ucp.convert(saved, str(tmp_path / "dcp"), to="dcp")
    state = wrong(nested(*job(5, steps=1)))
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"))
    check_equal(state, nested(*job(steps=2)))


@pytest.mark.parametrize(
    "shape",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {"app": {"model": weights}},
        lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}},
    ],
    ids=["flat", "nested", "app", "wrapped"],
)
def test_weights_are_found_wherever_a_job_has_them(tmp_path: Path, shape: Any) -> None:
    weights, _ = get_state_dict(*job(steps=1))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    dcp.load(shape(other), storage_reader=Reader(str(tmp_path / "model.safetensors")))
    check_equal(other, dict(weights))


def test_a_prefix_that_nobody_knows_is_said(saved: str) -> None:
    weights, _ = get_state_dict(*job())
    state = {"student": dict(weights)}
    with pytest.raises(CheckpointException, match="student"):
        dcp.load(state, storage_reader=Reader(saved))
    dcp.load(state, storage_reader=Reader(saved, model="student."))
    check_equal(state["student"], dict(get_state_dict(*job(steps=2))[0]))


def test_two_readings_of_a_key_are_refused(tmp_path: Path) -> None:
    save_file({"model.w": torch.ones(2), "w": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    state = {"model.w": torch.empty(2)}
    with pytest.raises(CheckpointException, match=r"may mean model\.w\[value\] or w\[value\]"):
        dcp.load(state, storage_reader=Reader(str(tmp_path / "x.safetensors")))
    dcp.load(state, storage_reader=Reader(str(tmp_path / "x.safetensors"), model=""))
    assert state["model.w"].tolist() == [1, 1]


def test_training_state_and_numbers(saved: str) -> None:
    state: dict[str, Any] = {
        "scheduler": {"last_epoch": -9, "base_lrs": None},
        "extra": {"epoch": 0, "rng": torch.zeros_like(torch.get_rng_state()), "seen": None, "name": None},
        "optim": {"state": {"1.weight": {"step": 0}}, "param_groups": [{"lr": torch.tensor(0.5)}]},
    }
    rng = state["extra"]["rng"]
    dcp.load(state, storage_reader=Reader(saved))
    assert (state["scheduler"]["last_epoch"], state["scheduler"]["base_lrs"]) == (0, [0.01, 0.03])
    assert (state["extra"]["epoch"], state["extra"]["seen"], state["extra"]["name"]) == (4, [1, 2], "run")
    assert state["extra"]["rng"] is rng
    assert rng.any()
    assert state["optim"]["state"]["1.weight"]["step"] == 2
    assert state["optim"]["param_groups"][0]["lr"] == torch.tensor(0.01)
    assert ucp.open(saved).catalog.state["lr_scheduler"]["step_size"] == 3


def test_all_keys_may_be_asked_for(saved: str) -> None:
    state = _load_state_dict_from_keys(storage_reader=Reader(saved))
    truth = nested(*job(steps=2))
    check_equal(dict(state["model"]), dict(truth["model"]))
    assert state["optim"]["param_groups"][1]["lr"] == 0.03
    assert torch.equal(state["optim"]["state"]["0.weight"]["exp_avg"], truth["optim"]["state"]["0.weight"]["exp_avg"])


def test_missing_keys_are_errors_unless_a_part_is_asked_for(saved: str) -> None:
    state = {"model": {"1.weight": torch.zeros(5, 6), "9.weight": torch.zeros(3)}}
    with pytest.raises(CheckpointException, match=r"model\.9\.weight"):
        dcp.load(state, storage_reader=Reader(saved))
    assert not state["model"]["1.weight"].any()
    dcp.load(state, storage_reader=Reader(saved), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert state["model"]["1.weight"].any()


def test_dtypes_change_only_when_asked(saved: str) -> None:
    state = {"model": {"1.weight": torch.zeros(5, 6, dtype=torch.bfloat16), "1.bias": torch.zeros(5)}}
    with pytest.raises(CheckpointException, match=r"1\.weight \(float32 in the source, bfloat16"):
        dcp.load(state, storage_reader=Reader(saved))
    assert not state["model"]["1.bias"].any()
    dcp.load(state, storage_reader=Reader(saved, cast=True))
    truth = job(steps=2)[0].state_dict()["1.weight"]
    assert torch.equal(state["model"]["1.weight"], truth.bfloat16())


def test_shapes_must_be_equal(saved: str) -> None:
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"model": {"1.weight": torch.zeros(4, 6)}}, storage_reader=Reader(saved))


class Counting(Around):
    read_bytes = 0

    def read_into(self, path: str, offset: int, buffer: Any) -> None:
        type(self).read_bytes += len(memoryview(buffer).cast("B"))
        super().read_into(path, offset, buffer)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        type(self).read_bytes += sum(len(buffer) for _, buffer in ranges)
        super().read_ranges(path, ranges)


def test_only_what_is_asked_for_is_read(saved: str) -> None:
    opened = ucp.open(saved)
    Counting.read_bytes = 0
    state = {"model": {"1.weight": torch.zeros(5, 6)}}
    dcp.load(state, storage_reader=Reader(Checkpoint(opened.catalog, Counting(opened.store))))
    assert state["model"]["1.weight"].any()
    assert Counting.read_bytes == 5 * 6 * 4


def test_tied_weights_load_into_both_names(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ckpt = ucp.open(str(tmp_path / "x.safetensors"))
    object.__setattr__(ckpt.catalog, "ties", {"b": "a"})
    state = {"a": torch.zeros(3), "b": torch.zeros(3)}
    dcp.load(state, storage_reader=Reader(ckpt))
    assert state["a"].tolist() == state["b"].tolist() == [1, 1, 1]


class Custom:
    """Pickled by torch, and never built by ucp."""


def test_objects_of_classes_are_not_built(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "odd": Custom()}, checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(CheckpointException, match=r"odd holds an object of class \S*Custom"):
        dcp.load({"model": {"w": torch.ones(2)}, "odd": None}, storage_reader=Reader(str(tmp_path / "dcp")))


def test_numbered_optimizers_are_refused(saved: str, tmp_path: Path) -> None:
    model, optimizer = job(steps=1)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    with pytest.raises(CheckpointException, match="number instead of a name"):
        dcp.save(state, storage_writer=Writer(str(tmp_path / "numbered")))
    with pytest.raises(CheckpointException, match="number instead of a name"):
        dcp.load(state, storage_reader=Reader(saved))


def test_which_of_two_models_is_trained_is_asked(tmp_path: Path) -> None:
    model, optimizer = job(steps=1)
    weights, states = get_state_dict(model, optimizer)
    state = {"teacher": dict(weights), "student": dict(weights), "optim": states}
    with pytest.raises(CheckpointException, match=r"below each of student\. teacher\."):
        dcp.save(state, storage_writer=Writer(str(tmp_path / "x")))
    dcp.save(state, storage_writer=Writer(str(tmp_path / "x"), model="student", step=7))
    ckpt = ucp.open(str(tmp_path / "x"))
    assert ckpt.step == 7
    assert torch.equal(ckpt["0.weight"]["value"][...], weights["0.weight"])
    assert {group.options["lr"] for group in ckpt.param_groups} == {0.01, 0.03}


def test_ucp_loads_what_the_writer_wrote(saved: str) -> None:
    model, optimizer = job(5)
    report = ucp.load((model, optimizer), saved)
    truth, trained = job(steps=2)
    check_equal(dict(model.state_dict()), dict(truth.state_dict()))
    check_equal(optimizer.state_dict()["state"], trained.state_dict()["state"])
    assert report.step == 2


def test_a_loaded_job_goes_on(saved: str) -> None:
    model, optimizer = job(5)
    state = nested(model, optimizer)
    dcp.load(state, storage_reader=Reader(saved))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    truth, trained = job(steps=2)
    for one, its in ((model, optimizer), (truth, trained)):
        one(torch.arange(9)).square().sum().backward()
        its.step()
    check_equal(dict(model.state_dict()), dict(truth.state_dict()))


def test_where_to_may_be_said_by_the_call(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}}
    dcp.save(state, checkpoint_id=str(tmp_path / "x"), storage_writer=Writer())
    state["model"]["w"].zero_()
    dcp.load(state, checkpoint_id=str(tmp_path / "x"), storage_reader=Reader())
    assert state["model"]["w"].tolist() == [1, 1]
    with pytest.raises((CheckpointException, UcpError), match="nothing to load"):
        dcp.load(state, storage_reader=Reader())


def test_a_plan_may_be_reused(tmp_path: Path) -> None:
    for step in (1, 2):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        state = nested(*job(steps=step))
        dcp.save(state, storage_writer=Writer(str(tmp_path / str(step))), planner=planner)
    check_equal(wrong(state), wrong(nested(*job(steps=2))))
    dcp.load(other := wrong(state), storage_reader=Reader(str(tmp_path / "2")))
    check_equal(other, nested(*job(steps=2)))


def test_numbers_change_their_type_only_without_loss(saved: str) -> None:
    for own, expected in ((0, 2), (0.0, 2.0), (torch.zeros(()), torch.tensor(2.0))):
        state: dict[str, Any] = {"optim": {"state": {"1.weight": {"step": own}}}}
        dcp.load(state, storage_reader=Reader(saved))
        check_equal(state["optim"]["state"]["1.weight"]["step"], expected)
    with pytest.raises(CheckpointException, match=r"2\.0 in the source would change as bool"):
        dcp.load({"optim": {"state": {"1.weight": {"step": False}}}}, storage_reader=Reader(saved))
