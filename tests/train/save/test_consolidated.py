"""Whole tensors straight from the ranks: what a conversion of a native save would give, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import ucp
from tests.support.gloo import spawn
from tests.train.jobs import build, optimizer_of, shard, train_step
from ucp.errors import FitError, StorageError, UsageError
from ucp.train.save import async_save, save

LAYOUTS = [("fsdp", 3), ("fsdp+tp", 4), ("tp", 2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("tensors/") and "/c/" in name}


def trained(world: int, layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard(build("lm" if layout == "fsdp" else "stack"), layout, world)
    optimizer = optimizer_of(model)
    for step in range(2):
        train_step(model, optimizer, step)
    return model, optimizer


def saves(rank: int, world: int, folder: str, layout: str) -> int:
    state = trained(world, layout)
    save(state, f"{folder}/native", step=2)
    report = save(state, f"{folder}/direct", step=2, form="universal")
    handle = async_save(state, f"{folder}/async", step=2, form="universal")
    with torch.no_grad():
        for parameter in state[0].parameters():
            parameter.zero_()
    handle.result(120)
    return report.bytes_written


@pytest.mark.parametrize(
    ("layout", "world"), [LAYOUTS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in LAYOUTS[1:])]
)
def test_the_same_objects_as_by_conversion(tmp_path: Path, layout: str, world: int) -> None:
    written = spawn(saves, world, str(tmp_path), layout)
    ucp.convert(str(tmp_path / "native"), str(tmp_path / "converted"))
    expected = tensors(tmp_path / "converted")
    assert expected
    assert tensors(tmp_path / "direct") == expected
    assert tensors(tmp_path / "async") == expected
    for name in ("direct", "async"):
        ckpt = ucp.open(str(tmp_path / name))
        assert (ckpt.family, ckpt.step) == ("universal", 2)
        assert len(ckpt.param_groups) == len(ucp.open(str(tmp_path / "native")).param_groups)
    assert written[0] == sum(len(data) for data in contents(tmp_path / "direct").values())


def other_forms(rank: int, world: int, folder: str) -> None:
    state = trained(world, "fsdp")
    for form in ("dcp", "safetensors", "torch"):
        save(state, f"{folder}/{form}", step=2, form=form)
    save(state, f"{folder}/native", step=2)


def test_any_family_that_can_be_written(tmp_path: Path) -> None:
    spawn(other_forms, 2, str(tmp_path))
    source = ucp.open(str(tmp_path / "native"))
    for form in ("dcp", "safetensors", "torch"):
        ckpt = ucp.open(str(tmp_path / form))
        for name in source:
            for state in source[name]:
                assert torch.equal(ckpt[name][state][...], source[name][state][...]), (form, name, state)


def refused(rank: int, world: int, folder: str) -> list[str]:
    told = []
    state = {"w": torch.full((4, 4), 1.0)}
    for form in ("bytecheckpoint", "nothing"):
        try:
            save(state, f"{folder}/{form}", form=form)
        except (FitError, UsageError) as error:
            told.append(f"{type(error).__name__}: {error}")
    state["w"][0, 0] = rank
    try:
        save(state, f"{folder}/differ", form="universal")
    except ucp.ConflictError as error:
        told.append(str(error))
    distributed.barrier()
    save({"w": torch.zeros(2)}, f"{folder}/good", form="universal")
    return told


def test_what_cannot_be_saved_is_refused_on_all_ranks(tmp_path: Path) -> None:
    told = spawn(refused, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "no form of checkpoint" in told[0][1]
    assert "different values" in told[0][2]
    assert "bytecheckpoint" in told[0][0]
    for name in ("bytecheckpoint", "nothing", "differ"):
        with pytest.raises(ucp.NotFoundError):
            ucp.open(str(tmp_path / name))
    assert torch.equal(ucp.open(str(tmp_path / "good"))["w"]["value"][...], torch.zeros(2))


def fails_on_one(rank: int, world: int, folder: str) -> str:
    from ucp.train.save import consolidated

    if rank == 1:
        original = consolidated._write_one

        def failing(*arguments: Any) -> Any:
            if arguments[2].object.startswith("tensors/b"):
                raise StorageError("the disk is full")
            return original(*arguments)

        consolidated._write_one = failing
    state = {name: torch.arange(1000.0) + number for number, name in enumerate("abbbcdefgh")}
    state |= {f"b{number}": torch.arange(100.0) for number in range(8)}
    with pytest.raises(ucp.UcpError) as no:
        save(state, f"{folder}/failed", form="universal")
    return str(no.value)


def test_a_rank_that_fails_fails_all(tmp_path: Path) -> None:
    told = spawn(fails_on_one, 3, str(tmp_path))
    assert all("disk is full" in one for one in told)
    with pytest.raises(ucp.NotFoundError):
        ucp.open(str(tmp_path / "failed"))
    assert not tensors(tmp_path / "failed")
