"""Targets that could come out wrong without a word: shared memory, equal names, ranges, numbers, changed sources."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.train.handmade import flat, make
from tests.train.tied import Net, adamw, assert_same_state, checkpoint, train_step, trained
from ucp.checkpoint import Checkpoint
from ucp.train.save import save
from ucp.train.transfer import BLOCK_BYTES


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return checkpoint(tmp_path / "source", *trained(), cut=flat(3))


def one(path: Path, **tensors: torch.Tensor) -> Checkpoint:
    return Checkpoint(*make(str(path), {name: {"value": tensor} for name, tensor in tensors.items()}, cut=flat(2)))


def test_tensors_of_one_memory_are_tied(tmp_path: Path) -> None:
    truth = torch.randn(4, 3)
    room = torch.zeros(4, 3)
    target = {"a": room, "b": room.detach()}
    ucp.load(target, one(tmp_path / "same", a=truth, b=truth))
    assert torch.equal(room, truth)
    with pytest.raises(ucp.ConflictError, match=r"a\[value\] and b\[value\]"):
        ucp.load(target, one(tmp_path / "other", a=truth, b=truth + 1))


def test_a_state_dict_stands_for_its_module(source: Checkpoint) -> None:
    model, optimizer = trained()
    other = Net()
    resumed = adamw(other)
    ucp.load({"model": other.state_dict(), "optimizer": resumed}, source)
    assert other.head.weight is other.embed.weight
    assert train_step(other, resumed) == train_step(model, optimizer)


def test_memory_that_is_shared_in_part_is_refused(tmp_path: Path) -> None:
    whole = torch.zeros(6, 2)
    ckpt = one(tmp_path, qkv=torch.ones(6, 2), k=torch.full((2, 2), 2.0), pair=torch.arange(2.0))
    with pytest.raises(ucp.UsageError, match="qkv and k share a part"):
        ucp.load({"qkv": whole, "k": whole[2:4]}, ckpt, only=["qkv", "k"])
    parts = {"k": whole[2:4], "pair": whole[5]}
    ucp.load(parts, ckpt, only=["k", "pair"])
    assert whole.tolist() == [[0, 0]] * 2 + [[2, 2]] * 2 + [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (torch.zeros(1).expand(5), "one place in memory"),
        (torch.zeros(5, dtype=torch.complex64).conj().imag, "conjugates or negates"),
    ],
)
def test_views_without_memory_of_their_own_are_refused(tmp_path: Path, target: torch.Tensor, problem: str) -> None:
    with pytest.raises(ucp.FitError, match=problem):
        ucp.load({"x": target}, one(tmp_path, x=torch.arange(5.0)))


def test_two_modules_cannot_have_equal_names(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ucp.UsageError, match=r"two tensors named embed\.weight"):
        ucp.load((Net(), Net()), source)
    with pytest.raises(ucp.UsageError, match="two tensors named weight"):
        save({"actor": nn.Linear(2, 2), "critic": nn.Linear(2, 2)}, str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_states_of_tied_tensors_are_compared_as_their_values_are(tmp_path: Path) -> None:
    weight, rest = torch.randn(11, 6), torch.ones(6)
    tensors = {
        name: {"value": value, "exp_avg": value * 2, "exp_avg_sq": value**2}
        for name, value in {
            "embed.weight": weight,
            "head.weight": weight,
            "norm.weight": rest,
            "norm.bias": rest,
        }.items()
    }
    steps = dict.fromkeys(tensors, 3.0)
    calls = {"calls": {"value": torch.tensor(1)}}
    model = Net()
    optimizer = adamw(model)
    same = Checkpoint(*make(str(tmp_path / "same"), tensors | calls, steps=steps))
    ucp.load((model, optimizer), same, hyper_parameters=False)
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], weight * 2)
    tensors["head.weight"]["exp_avg"] = weight * 3
    other = Checkpoint(*make(str(tmp_path / "other"), tensors | calls, steps=steps))
    with pytest.raises(ucp.ConflictError, match=r"embed.weight\[exp_avg\] and head.weight\[exp_avg\]"):
        ucp.load((model, optimizer), other, hyper_parameters=False)
    later = Checkpoint(*make(str(tmp_path / "later"), tensors | calls, steps={**steps, "head.weight": 4.0}))
    with pytest.raises(ucp.FitError, match=r"states of embed.weight and head.weight differ"):
        ucp.load((model, optimizer), later, hyper_parameters=False)


@pytest.mark.parametrize(
    ("number", "stored", "target", "fits"),
    [
        (65504.0, torch.float32, torch.float16, True),
        (1e6, torch.float32, torch.float16, False),
        (-1e6, torch.float32, torch.float16, False),
        (1e6, torch.bfloat16, torch.float16, False),
        (500.0, torch.float32, torch.float8_e4m3fn, False),
        (1e300, torch.float64, torch.float32, False),
        (float("inf"), torch.float32, torch.float16, True),
        (1e38, torch.float32, torch.bfloat16, True),
    ],
)
def test_nothing_finite_becomes_infinite(
    tmp_path: Path, number: float, stored: torch.dtype, target: torch.dtype, fits: bool
) -> None:
    truth = torch.tensor([1.0, number, float("nan"), float("-inf")], dtype=stored)
    room = torch.zeros(4).to(target)
    ckpt = one(tmp_path, x=truth)
    if not fits:
        with pytest.raises(ucp.FitError, match=rf"x\[value\]: .* is beyond {target}"):
            ucp.load({"x": room}, ckpt)
    else:
        ucp.load({"x": room}, ckpt)
        assert torch.equal(room.nan_to_num(7, 8, 9), truth.to(target).nan_to_num(7, 8, 9))


@pytest.mark.parametrize(
    ("number", "room", "fits"),
    [
        (3.5, torch.tensor(0), False),
        (3.0, torch.tensor(0), True),
        (3, torch.tensor(0.0), True),
        (2**24 + 1, torch.tensor(0.0), False),
        (0.1, torch.tensor(0.0), True),
        (2, torch.tensor(False), False),
        (float("nan"), torch.tensor(0), False),
    ],
)
def test_numbers_keep_their_value(tmp_path: Path, number: float, room: torch.Tensor, fits: bool) -> None:
    ckpt = Checkpoint(*make(str(tmp_path), {"x": {"value": torch.ones(1)}}, steps={"x": number}))
    if fits:
        ucp.load({"x": {"step": room}}, ckpt)
        assert room == torch.tensor(number, dtype=room.dtype)
    else:
        with pytest.raises(ucp.FitError, match=r"dtype: x\[step\]"):
            ucp.load({"x": {"step": room}}, ckpt)


def test_globs_that_select_nothing_are_spelled_wrongly(source: Checkpoint) -> None:
    model = Net()
    ucp.load(model, source, only="norm.*")
    with pytest.raises(ucp.FitError, match=r"only: nrm\.\* \(selects nothing\)"):
        ucp.load(model, source, only=["norm.*", "nrm.*"], strict=False)


def test_a_load_that_fills_nothing_fails(source: Checkpoint) -> None:
    with pytest.raises(ucp.FitError, match=r"none of the target's, such as net\.embed\.weight") as no:
        ucp.load(nn.ModuleDict({"net": Net()}), source, strict=False)
    assert "map=" in str(no.value.hint)


def test_thousands_of_missing_names_are_told_soon(tmp_path: Path) -> None:
    catalog, store = make(str(tmp_path), {f"blocks.{i}.attention.query.weight": {} for i in range(2000)})
    target = {f"layers.{i}.attn.q.weight": torch.ones(1) for i in range(2000)}
    start = time.process_time()
    with pytest.raises(ucp.FitError, match="in 4001 places"):
        ucp.load(target, Checkpoint(catalog, store))
    assert time.process_time() - start < 20


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_source_that_changes_is_noticed(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save((model, optimizer), str(tmp_path / "saved"))
    ckpt = ucp.open(tmp_path / "saved")
    lazy = ckpt["norm.bias"]["value"]
    (shard,) = (tmp_path / "saved" / "shards").iterdir()

    def change() -> None:
        at = shard.stat().st_mtime_ns + 5
        shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\1\1")
        os.utime(shard, ns=(at, at))

    if when == "before":
        change()
    else:
        inner = ckpt.store.read_into

        def read_into(*args: Any) -> None:
            inner(*args)
            change()

        monkeypatch.setattr(ckpt.store, "read_into", read_into)
    with pytest.raises(ucp.CorruptError, match="was changed after it was opened"):
        lazy[...]
    with pytest.raises(ucp.CorruptError, match="was changed after it was opened"):
        ucp.load(Net(), ckpt, verify=False, workers=1)


def test_options_of_opening_are_refused_for_what_is_open(source: Checkpoint) -> None:
    with pytest.raises(ucp.UsageError, match="is open"):
        ucp.load(Net(), source, family="deepspeed")


def test_training_state_that_the_source_has_not(source: Checkpoint) -> None:
    with pytest.raises(ucp.FitError, match="missing: loss_scale"):
        ucp.load({"model": Net(), "scaler": torch.amp.GradScaler("cpu")}, source)
    model = Net()
    with pytest.raises(ucp.UsageError, match="an optimizer's state_dict") as no:
        ucp.load({"model": model, "optimizer": adamw(model).state_dict()}, source)
    assert "the optimizer itself" in str(no.value.hint)


def test_a_load_inside_inference_mode_can_be_trained(source: Checkpoint) -> None:
    model = Net()
    optimizer = adamw(model)
    with torch.inference_mode():
        ucp.load((model, optimizer), source)
    assert train_step(model, optimizer) == train_step(*trained())


def test_transient_buffers_are_named(source: Checkpoint) -> None:
    report = ucp.load(Net(), source)
    assert any(note.endswith("stay as they are: scratch") for note in report.notes)


def test_bytes_under_whole_checksums_are_counted_as_checked(source: Checkpoint) -> None:
    model = Net()
    report = ucp.load((model, adamw(model)), source)
    assert report.bytes_checked == report.bytes_read == sum(c.length for c in source.catalog.checksums)
    assert ucp.load(model, source, verify=False).bytes_checked == 0


def test_memory_formats_of_parameters_are_kept(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.turned = nn.Parameter(torch.randn(4, 5).T)
            self.number = nn.Parameter(torch.randn(()))
            self.empty = nn.Parameter(torch.zeros(0, 3))

    def step(model: Odd, optimizer: torch.optim.Optimizer) -> None:
        images = torch.ones(1, 3, 5, 5)
        loss = model.conv(images).square().sum() + (model.turned**3).sum() * model.number + model.empty.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Odd()
    optimizer = torch.optim.NAdam(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    save((model, optimizer), str(tmp_path / "saved"))
    other = Odd()
    resumed = torch.optim.NAdam(other.parameters())
    ucp.load((other, resumed), tmp_path / "saved")
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert mine.stride() == theirs.stride()
        assert_same_state(resumed.state[mine], optimizer.state[theirs])
    step(model, optimizer)
    step(other, resumed)
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through proc(5)")
@pytest.mark.parametrize("room", ["cast", "turned"])
def test_staging_memory_is_bounded(tmp_path: Path, room: str) -> None:
    truth = torch.arange(24 << 20, dtype=torch.float32).reshape(6 << 10, 4 << 10)
    catalog, store = make(str(tmp_path), {"x": {"value": truth}}, cut=flat(3))
    target = torch.zeros_like(truth, dtype=torch.bfloat16) if room == "cast" else torch.zeros_like(truth.T).T
    workers = 2
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    ucp.load({"x": target}, Checkpoint(catalog, store), workers=workers)
    assert resident("VmHWM") - before < workers * 4 * BLOCK_BYTES + (16 << 20)
    assert torch.equal(target, truth.to(target.dtype))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
