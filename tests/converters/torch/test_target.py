"""What is written, torch.load takes with weights_only, and jobs go on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.converters.torch.against import check_truth, same
from tests.support.torch_jobs import Net, truth_of
from ucp.errors import CorruptError, FitError, NotFoundError

Jobs = Callable[[str], tuple[Path, dict[str, Any]]]


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = net(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(net: torch.nn.Module) -> list[Any]:
    return [p for p in net.parameters() if p.requires_grad]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any], list[float]]:
    """A plain job's checkpoint, the truth at that point, and the losses that follow."""
    torch.manual_seed(11)
    net = Net()
    parameters: Any = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    steps(net, optimizer, 0, 3)
    scheduler.step()
    tree = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 1,
        "step": 3,
        "rng": torch.get_rng_state(),
        "numpy": {"keys": np.arange(3), "position": 4},
        "ema": {"decay": 0.9, "shadow": torch.arange(400_000).float()},
    }
    torch.save(tree, tmp_path / "model.pt")
    truth = {**truth_of(net, [optimizer]), "step": 3}
    return tmp_path / "model.pt", truth, steps(net, optimizer, 3, 3)


def test_a_job_goes_on(saved: Any, tmp_path: Path) -> None:
    path, _, losses = saved
    ucp.convert(str(path), str(tmp_path / "out"), to="torch")
    loaded = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    torch.manual_seed(99)
    net = Net()
    net.load_state_dict(loaded["model"])
    parameters = trained(net)
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=5.0)
    optimizer.load_state_dict(loaded["optimizer"])
    assert steps(net, optimizer, 3, 3) == losses


def test_everything_is_there_and_bit_for_bit(saved: Any, tmp_path: Path) -> None:
    path, truth, _ = saved
    conversion = ucp.prepare(str(path), str(tmp_path / "out"), to="torch")
    ucp.carry_out(conversion)
    check_truth(tmp_path / "out", truth)
    loaded, source = (
        torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True),
        torch.load(path, weights_only=False),
    )
    assert list(loaded["model"]) == [*(n for n in source["model"] if n != "tied.weight"), "tied.weight"]
    for name, value in source["model"].items():
        assert same(loaded["model"][name], value), name
    assert loaded["model"]["tied.weight"].data_ptr() == loaded["model"]["first.weight"].data_ptr()
    assert loaded["optimizer"]["param_groups"][0]["param_names"] == ["first.weight", "first.bias"]
    for number, states in source["optimizer"]["state"].items():
        for state, value in states.items():
            assert same(loaded["optimizer"]["state"][number][state], value), (number, state)
    assert loaded["lr_scheduler"] == source["scheduler"]
    assert (loaded["step"], loaded["epoch"]) == (3, 1)
    assert same(loaded["rng"], source["rng"])
    assert same(loaded["ema"]["shadow"], source["ema"]["shadow"])
    assert loaded["numpy"] == {"position": 4}
    assert [note for note in conversion.notes if "numpy.keys (a NumPy array)" in note]


def test_a_second_time_gives_the_same(saved: Any, tmp_path: Path) -> None:
    path, _, _ = saved
    ucp.convert(str(path), str(tmp_path / "one"), to="torch")
    ucp.convert(str(tmp_path / "one"), str(tmp_path / "two"), to="torch")
    one, two = ((tmp_path / name / "checkpoint.pt").read_bytes() for name in ("one", "two"))
    assert one == two


def test_kinds_are_kept(saved: Any, tmp_path: Path) -> None:
    path, _, _ = saved
    ucp.convert(str(path), str(tmp_path / "out"), to="torch")
    one, two = ucp.open(str(path)), ucp.open(str(tmp_path / "out"))
    assert {name: one[name].kind for name in one} == {name: two[name].kind for name in two}
    assert {one[name].kind for name in one} == {"parameter", "frozen", "buffer"}
    assert one.ties == two.ties


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = {"a": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    torch.save(tree, tmp_path / "m.pth")
    ucp.convert(str(tmp_path / "m.pth"), str(tmp_path / "out"), to="torch")
    loaded = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["model"]
    assert all(same(loaded[name], value) for name, value in tree.items())


def test_what_cannot_be_told_apart_is_a_loss(job: Jobs, tmp_path: Path) -> None:
    path, _ = job("accelerate-unnamed")
    with pytest.raises(FitError, match="cannot be told apart"):
        ucp.prepare(str(path), str(tmp_path / "out"), to="torch")
    ucp.convert(str(path), str(tmp_path / "out"), to="torch", lossy=True)
    loaded = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert [len(group["params"]) for group in loaded["optimizer"]["param_groups"]] == [2]


def test_from_another_family(job: Jobs, tmp_path: Path) -> None:
    path, truth = job("trainer")
    ucp.convert(str(path), str(tmp_path / "universal"), family="torch")
    ucp.convert(str(tmp_path / "universal"), str(tmp_path / "out"), to="torch")
    check_truth(tmp_path / "out", truth)


def test_without_its_root_it_is_no_checkpoint(saved: Any, tmp_path: Path) -> None:
    path, _, _ = saved
    ucp.convert(str(path), str(tmp_path / "out"), to="torch")
    (tmp_path / "out" / "checkpoint.json").unlink()
    (tmp_path / "out" / ".ucp-journal").mkdir()
    for options in ({}, {"family": "torch"}):
        with pytest.raises(NotFoundError, match=r"interrupted|cut short"):
            ucp.open(str(tmp_path / "out"), **options)


def test_a_root_of_another_file(saved: Any, tmp_path: Path) -> None:
    path, _, _ = saved
    ucp.convert(str(path), str(tmp_path / "out"), to="torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "out" / "checkpoint.pt")
    with pytest.raises(CorruptError, match=r"checkpoint.json"):
        ucp.open(str(tmp_path / "out"))


def test_states_that_are_lists_are_with_their_parameter_or_a_loss(tmp_path: Path) -> None:
    """Optimizers of the Shampoo kind keep lists; only a file that pickles states has a place for those."""
    weight, factors = torch.randn(4, 4), [torch.eye(4), torch.ones(4, 4)]
    group = {"lr": 0.1, "params": [0], "param_names": ["weight"]}
    optimizer = {"state": {0: {"exp_avg": weight * 2, "factors": factors}}, "param_groups": [group]}
    torch.save({"model": {"weight": weight}, "optimizer": optimizer}, tmp_path / "source.pt")
    ucp.convert(str(tmp_path / "source.pt"), str(tmp_path / "there"), to="torch")
    ucp.convert(str(tmp_path / "there"), str(tmp_path / "again"), to="torch")
    for name in ("there", "again"):
        loaded = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
        assert all(torch.equal(a, b) for a, b in zip(loaded[0]["factors"], factors, strict=True))
    for to in ("dcp", "deepspeed-universal"):
        with pytest.raises(FitError, match="no tensors of parameters are left out: factors"):
            ucp.convert(str(tmp_path / "source.pt"), str(tmp_path / to), to=to)
