"""Single files: spellings of entries, wrappers in names, options, what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import ucp
from tests.converters.torch.against import same
from ucp.converter import converter, find_converter
from ucp.errors import CorruptError, FitError, NotFoundError, UcpError, UnsafeError, UsageError
from ucp.layout import Mesh
from ucp.store import open_store


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def save(path: Path, tree: Any, **options: Any) -> str:
    torch.save(tree, path, **options)
    return str(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_plain_state_dict(tmp_path: Path, legacy: bool) -> None:
    model = net()
    url = save(tmp_path / "model.pt", model.state_dict(), _use_new_zipfile_serialization=not legacy)
    ckpt = ucp.open(url)
    assert (ckpt.family, ckpt.url, list(ckpt)) == ("torch", url, list(model.state_dict()))
    assert all(same(ckpt[name]["value"][...], value) for name, value in model.state_dict().items())
    assert any("no optimizer" in note for note in ckpt.notes)


SPELLINGS = [
    ("model", "optimizer", "lr_scheduler", "step"),
    ("state_dict", "optimizer", "scheduler", "iteration"),
    ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "global_step"),
    ("net", "opt", "lr_sched", "iter"),
    ("weights_of_mine", "adam", "schedulers", "steps"),
]


@pytest.mark.parametrize(("model_key", "optimizer_key", "scheduler_key", "step_key"), SPELLINGS)
def test_spellings(tmp_path: Path, model_key: str, optimizer_key: str, scheduler_key: str, step_key: str) -> None:
    model = net()
    optimizer = stepped(model, torch.optim.Adam(model.parameters(), lr=0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    tree = {
        model_key: model.state_dict(),
        optimizer_key: optimizer.state_dict(),
        scheduler_key: scheduler.state_dict(),
        step_key: 1,
        "best": 0.25,
    }
    ckpt = ucp.open(save(tmp_path / "c.pt", tree))
    assert ckpt.step == 1
    assert ckpt.state == {"lr_scheduler": scheduler.state_dict(), "best": 0.25}
    for name, parameter in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            assert same(ckpt[name][state][...], optimizer.state[parameter][state]), name


def test_a_lone_file_in_a_folder_and_one_of_several(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", {"w": torch.ones(2)})
    assert ucp.open(str(tmp_path)).family == "torch"
    save(tmp_path / "b.pt", {"w": torch.zeros(2)})
    with pytest.raises(NotFoundError, match="several files"):
        ucp.open(str(tmp_path))
    assert ucp.open(str(tmp_path), file="b.pt")["w"]["value"][...].tolist() == [0, 0]


def test_any_name_will_do_for_a_file(tmp_path: Path) -> None:
    assert ucp.open(save(tmp_path / "checkpoint", {"w": torch.ones(2)})).family == "torch"


def test_several_models_have_to_be_named(tmp_path: Path) -> None:
    one, two = net(), net()
    first = stepped(one, torch.optim.Adam([*one.named_parameters(prefix="g")], lr=0.5))
    second = stepped(two, torch.optim.Adam([*two.named_parameters(prefix="d")], lr=0.25))
    tree = {"g": one.state_dict(), "d": two.state_dict(), "og": first.state_dict(), "od": second.state_dict()}
    url = save(tmp_path / "gan.pt", tree)
    with pytest.raises(FitError, match="which of g d"):
        ucp.open(url)
    ckpt = ucp.open(url, model="g d")
    assert same(ckpt["g.0.weight"]["exp_avg"][...], first.state[one[0].weight]["exp_avg"])
    assert same(ckpt["d.1.bias"]["exp_avg"][...], second.state[two[1].bias]["exp_avg"])
    assert [group.options["lr"] for group in ckpt.param_groups] == [0.5, 0.25]
    assert ckpt.state["optimizer"]["optimizers"] == {"og": 1, "od": 1}


@pytest.mark.parametrize("wrapper", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"])
def test_wrappers_are_left_out_of_names(tmp_path: Path, wrapper: str) -> None:
    model = net()
    tree = {wrapper.format(name): value for name, value in model.state_dict().items()}
    ckpt = ucp.open(save(tmp_path / "c.pt", tree))
    assert list(ckpt) == list(model.state_dict())
    assert any("wrappers" in note for note in ckpt.notes)


def test_a_model_with_a_part_called_module_keeps_its_names(tmp_path: Path) -> None:
    tree = {"module.a": torch.ones(1), "head.b": torch.ones(1)}
    assert list(ucp.open(save(tmp_path / "c.pt", tree))) == ["module.a", "head.b"]


def test_states_by_name(tmp_path: Path) -> None:
    """FSDP and torch.distributed.checkpoint.state_dict save names in place of numbers."""
    model = net()
    numbered = stepped(model, torch.optim.Adam(model.parameters(), lr=0.5)).state_dict()
    names = [name for name, _ in model.named_parameters()]
    named = {
        "state": {names[number]: state for number, state in numbered["state"].items()},
        "param_groups": [{**numbered["param_groups"][0], "params": names}],
    }
    ckpt = ucp.open(save(tmp_path / "c.pt", {"model": model.state_dict(), "optimizer": named}))
    assert all(same(ckpt[names[n]]["exp_avg"][...], state["exp_avg"]) for n, state in numbered["state"].items())
    assert not ckpt.notes


def test_a_parameter_without_dims_has_states_without_dims(tmp_path: Path) -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([("scale", scale)], lr=0.5)
    (scale * 3).backward()
    optimizer.step()
    tree = {"model": {"scale": scale.detach()}, "optimizer": optimizer.state_dict()}
    ckpt = ucp.open(save(tmp_path / "c.pt", tree))
    assert same(ckpt["scale"]["exp_avg"][...], optimizer.state[scale]["exp_avg"])
    assert ckpt["scale"].scalars == {"step": 1.0}


def test_frozen_is_told(tmp_path: Path) -> None:
    """Without being told, any of three layers of the same shape may be the one that was not trained."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[2].parameters()], lr=0.5)
    stepped(model, optimizer)
    url = save(tmp_path / "c.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    with pytest.raises(FitError, match="cannot be told"):
        ucp.open(url)["1.weight"]["exp_avg"]
    ckpt = ucp.open(url, frozen="1.*")
    assert same(ckpt["2.weight"]["exp_avg"][...], optimizer.state[model[2].weight]["exp_avg"])
    assert ckpt["1.weight"].kind == "frozen"
    with pytest.raises(FitError, match="no parameter matches"):
        ucp.open(url, frozen="adapter.*")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "bare", "accelerate"])
def test_hostile_pickles_are_refused(tmp_path: Path, form: str) -> None:
    made, where = tmp_path / "made", tmp_path / "bad"
    where.mkdir()
    if form == "zip":
        save(where / "m.pt", {"w": torch.ones(2), "x": Attack(made)})
    elif form == "bare":
        (where / "m.pt").write_bytes(pickle.dumps(Attack(made)))
    else:
        save(where / "pytorch_model.bin", {"w": torch.ones(2)})
        save(where / "optimizer.bin", {"state": {}, "param_groups": [], "x": Attack(made)})
    with pytest.raises((UnsafeError, CorruptError, FitError)):
        ucp.open(str(where), family="torch")
    assert not made.exists()


@pytest.mark.parametrize(
    ("tree", "error", "match"),
    [
        ({"a": 1, "b": "x"}, FitError, "no model"),
        ([torch.ones(1)], CorruptError, "dict is expected"),
        (nn.Linear(2, 2), FitError, "pickled torch.nn.modules.linear.Linear"),
        ({"model": nn.Linear(2, 2)}, FitError, "pickled torch.nn"),
        (
            {"model": {"w": torch.ones(2)}, "o": {"state": {}, "param_groups": [{"params": [0, 0]}]}},
            CorruptError,
            "two",
        ),
        (
            {"model": {"w": torch.ones(2)}, "o": {"state": {}, "param_groups": [{"params": [[0]]}]}},
            CorruptError,
            "neither",
        ),
        ({"model": {"w": torch.ones(2)}, "o": {"state": [], "param_groups": []}}, CorruptError, "dict is expected"),
    ],
)
def test_what_is_none(tmp_path: Path, tree: Any, error: type[UcpError], match: str) -> None:
    with pytest.raises(error, match=match):
        ucp.open(save(tmp_path / "c.pt", tree))


def test_unknown_options_and_names(tmp_path: Path) -> None:
    url = save(tmp_path / "c.pt", {"model": {"w": torch.ones(2)}})
    with pytest.raises(UsageError, match="unknown option"):
        ucp.open(url, tag="x")
    with pytest.raises(UsageError, match="unknown option"):
        ucp.prepare(url, str(tmp_path / "out"), to="torch", shard_bytes=1)
    with pytest.raises(NotFoundError, match="no entry 'modle'"):
        ucp.open(url, model="modle")
    with pytest.raises(NotFoundError, match="cannot be read"):
        ucp.open(url, order=str(tmp_path / "no.txt"))


@pytest.mark.parametrize(
    "names", [["config.json", "pytorch_model.bin"], ["mp_rank_00_model_states.pt"], ["common.pt", ".metadata"]]
)
def test_folders_of_others_are_left_to_them(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save(tmp_path / "saved", {"w": torch.ones(1)})
        (tmp_path / "saved").rename(tmp_path / name)
    assert not converter("torch").detect(open_store(str(tmp_path)))


def test_archives_of_other_kinds_are_none(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "a.pt.npz", x=np.ones(3))
    (tmp_path / "a.pt.npz").rename(tmp_path / "a.pt")
    with pytest.raises(NotFoundError):
        find_converter(str(tmp_path / "a.pt"))


def test_the_full_state_dict_of_fsdp(tmp_path: Path) -> None:
    """Accelerate's names for it, with optimizer states by name, and a scheduler beside."""
    model = net()
    numbered = stepped(model, torch.optim.Adam(model.parameters(), lr=0.5)).state_dict()
    names = [name for name, _ in model.named_parameters()]
    save(tmp_path / "pytorch_model_fsdp.bin", model.state_dict())
    group = {**numbered["param_groups"][0], "params": names}
    state = {names[number]: state for number, state in numbered["state"].items()}
    save(tmp_path / "optimizer.bin", {"state": state, "param_groups": [group]})
    save(tmp_path / "scheduler.bin", {"last_epoch": 1})
    ckpt = ucp.open(str(tmp_path))
    assert (ckpt.family, ckpt.state) == ("torch", {"lr_scheduler": {"last_epoch": 1}})
    assert all(same(ckpt[name]["exp_avg"][...], held["exp_avg"]) for name, held in state.items())
    assert not ckpt.notes


def test_several_models_of_accelerate_are_not_read_as_one(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model_1.bin"):
        save(tmp_path / name, net().state_dict())
    save(tmp_path / "scheduler.bin", {"last_epoch": 1})
    with pytest.raises(FitError, match="several models"):
        ucp.open(str(tmp_path))


def test_random_states_of_several_ranks(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", net().state_dict())
    for rank in range(11):
        save(tmp_path / f"random_states_{rank}.pkl", {"torch_manual_seed": torch.full((4,), rank)})
    ckpt = ucp.open(str(tmp_path))
    ranks = ckpt.read_state("rng")["rank"]
    assert ckpt.mesh == Mesh({"dp": 11})
    assert {rank: held["torch_manual_seed"][0].item() for rank, held in ranks.items()} == {n: n for n in range(11)}


def test_a_checkpoint_json_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text("{}")
    save(tmp_path / "model.pt", {"w": torch.ones(2)})
    assert ucp.open(str(tmp_path))["w"]["value"][...].tolist() == [1, 1]


@pytest.mark.parametrize("step", [float("inf"), torch.tensor(float("nan"))])
def test_steps_that_are_no_numbers(tmp_path: Path, step: Any) -> None:
    model = net()
    optimizer = stepped(model, torch.optim.Adam(model.parameters())).state_dict()
    for held in optimizer["state"].values():
        held["step"] = step
    path = save(tmp_path / "c.pt", {"model": model.state_dict(), "optimizer": optimizer})
    found, store = find_converter(path)
    assert found.read(store).step is None


def test_what_one_rank_has_of_the_weights(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        path = save(tmp_path / "rank0.pt", {"model": {"a.weight": sharded, "a.bias": torch.zeros(4)}})
    finally:
        dist.destroy_process_group()
    found, store = find_converter(path)
    with pytest.raises(FitError, match=r"a\.weight is a torch\.distributed\.tensor\.DTensor"):
        found.read(store)


def test_a_job_that_counted_other_steps_than_the_optimizer(tmp_path: Path) -> None:
    model = net()
    optimizer = stepped(model, torch.optim.Adam(model.parameters()))
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": 7}
    found, store = find_converter(save(tmp_path / "c.pt", tree))
    assert "the optimizer counted 1 steps, the job 7" in found.read(store).notes
