"""`ucp.load` into models, dicts and views on one process: what is filled, what is refused, what is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.train.handmade import flat, make
from tests.train.tied import Net, adamw, assert_same_state, train_step
from ucp.checkpoint import Checkpoint
from ucp.train.report import Cast


def test_all_problems_are_told_at_once_and_nothing_is_touched(source: Any) -> None:
    _, _, ckpt = source
    other = Net(tied=False)
    other.norm = nn.LayerNorm(5)
    other.extra = nn.Linear(2, 2)
    other.calls = torch.tensor(1.0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ucp.FitError) as no:
        ucp.load(other, ckpt)
    text = str(no.value)
    for line in (
        "missing: extra.weight (nearest: ",
        "missing: extra.bias",
        "shape: norm.weight ([6] in the source, [5] in the target)",
        "dtype: calls (int64 in the source would lose its meaning as float32)",
    ):
        assert line in text
    assert_same_state(other.state_dict(), before)


def test_what_the_target_lacks_is_unexpected(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    del other.norm
    with pytest.raises(ucp.FitError, match=r"unexpected: norm.weight\n  unexpected: norm.bias"):
        ucp.load(other, ckpt)
    report = ucp.load(other, ckpt, strict=False)
    assert report.unexpected == ("norm.weight", "norm.bias")


def test_part_of_a_model_by_globs(source: Any) -> None:
    model, _, ckpt = source
    other = Net()
    embed = other.embed.weight.clone()
    report = ucp.load(other, ckpt, only=["norm.*"])
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert torch.equal(other.embed.weight, embed)
    assert report.tensors == 2


@pytest.mark.parametrize("rename", [{"tokens.weight": "embed.weight"}, lambda name: name.replace("tokens", "embed")])
def test_renaming(source: Any, rename: Any) -> None:
    model, _, ckpt = source
    other = Net()
    other.tokens, other.embed = other.embed, None
    report = ucp.load(other, ckpt, map=rename)
    assert torch.equal(other.tokens.weight, model.embed.weight)
    assert report.renamed == {"tokens.weight": "embed.weight"}


def test_a_rename_of_nothing_is_a_spelling_mistake(source: Any) -> None:
    with pytest.raises(ucp.FitError, match=r"map: embd\.weight"):
        ucp.load(Net(), source[2], map={"embd.weight": "embed.weight"})


def test_wrappers_do_not_change_names(source: Any) -> None:
    model, _, ckpt = source
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    other = Net()
    other.norm = checkpoint_wrapper(other.norm)
    wrapped = torch.compile(nn.DataParallel(other), backend="eager")
    assert any(name.startswith("_orig_mod.module.") for name, _ in wrapped.named_parameters())
    report = ucp.load(wrapped, ckpt)
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert report.renamed["_orig_mod.module.norm._checkpoint_wrapped_module.bias"] == "norm.bias"


def test_names_that_wrappers_make_ambiguous_match_nothing(tmp_path: Path) -> None:
    catalog, store = make(
        str(tmp_path), {"module.w": {"value": torch.ones(2)}, "_orig_mod.w": {"value": torch.zeros(2)}}
    )
    with pytest.raises(ucp.FitError, match="missing: w\n"):
        ucp.load({"w": torch.empty(2)}, Checkpoint(catalog, store))


def test_masters_round_to_the_working_dtype(source: Any) -> None:
    model, _, ckpt = source
    other = Net().bfloat16()
    resumed = adamw(other)
    report = ucp.load((other, resumed), ckpt)
    assert torch.equal(other.embed.weight, model.embed.weight.bfloat16())
    # The optimizer keeps its moments in the parameter's dtype, and could not step with others.
    assert resumed.state[other.norm.bias]["exp_avg"].dtype == torch.bfloat16
    assert Cast("norm.bias", "value", "float32", "bfloat16") in report.casts
    assert Cast("norm.bias", "exp_avg_sq", "float32", "bfloat16") in report.casts
    train_step(other, resumed)


@pytest.mark.parametrize(
    ("stored", "wanted", "fits"),
    [
        (torch.float32, torch.int32, False),
        (torch.int64, torch.float64, False),
        (torch.int64, torch.int32, False),
        (torch.int32, torch.int64, True),
        (torch.bool, torch.uint8, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.bfloat16, True),
    ],
)
def test_numbers_stay_what_they_are(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, fits: bool) -> None:
    truth = torch.tensor([0.0, 1.0, 1.00390625, 77.77]).to(stored)
    ckpt = Checkpoint(*make(str(tmp_path), {"x": {"value": truth}}))
    target = torch.full((4,), 9).to(wanted)
    if fits:
        ucp.load({"x": target}, ckpt)
        assert torch.equal(target, truth.to(wanted))
    else:
        with pytest.raises(ucp.FitError, match="dtype: x"):
            ucp.load({"x": target}, ckpt)


def test_dicts_of_tensors_and_of_states(source: Any) -> None:
    model, optimizer, ckpt = source
    target: dict[str, Any] = {
        "embed.weight": torch.empty(11, 6),
        "norm.bias": {"exp_avg": torch.empty(6), "step": torch.zeros(())},
    }
    ucp.load(target, ckpt, only=["embed.*", "norm.bias"])
    assert torch.equal(target["embed.weight"], model.embed.weight)
    assert torch.equal(target["norm.bias"]["exp_avg"], optimizer.state[model.norm.bias]["exp_avg"])
    assert target["norm.bias"]["step"] == 3


def test_views_are_filled_and_what_lies_between_is_not(source: Any) -> None:
    model, _, ckpt = source
    memory = torch.full((6, 30), 9.0)
    ucp.load({"embed.weight": memory[:, 2:24:2].T}, ckpt, only=["embed.weight"])
    assert torch.equal(memory[:, 2:24:2].T, model.embed.weight)
    assert (memory[:, 1::2] == 9).all()
    assert (memory[:, 24:] == 9).all()


def test_a_tie_of_the_target_needs_equal_tensors_in_the_source(tmp_path: Path) -> None:
    same = torch.randn(11, 6)
    tensors = {name: {"value": same.clone()} for name in ("embed.weight", "head.weight")}
    rest = {"norm.weight": {"value": torch.ones(6)}, "norm.bias": {"value": torch.ones(6)}}
    rest["calls"] = {"value": torch.tensor(1)}
    model = Net()
    ucp.load(model, Checkpoint(*make(str(tmp_path / "same"), {**tensors, **rest})))
    assert torch.equal(model.head.weight, same)
    tensors["head.weight"]["value"][5, 5] += 1
    with pytest.raises(ucp.ConflictError, match=r"embed.weight.* and head.weight"):
        ucp.load(Net(), Checkpoint(*make(str(tmp_path / "other"), {**tensors, **rest})))


def test_a_tie_of_the_source_fills_both_tensors_of_the_target(source: Any) -> None:
    model, _, ckpt = source
    other = Net(tied=False)
    ucp.load(other, ckpt)
    assert torch.equal(other.embed.weight, other.head.weight)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_damage_is_found(source: Any, tmp_path: Path) -> None:
    _, _, ckpt = source
    path = tmp_path / "rank1.bin"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    model = Net()
    optimizer = adamw(model)
    with pytest.raises(ucp.CorruptError, match=r"rank1\.bin"):
        ucp.load((model, optimizer), ckpt)
    assert not optimizer.state
    ucp.load((model, optimizer), ckpt, verify=False)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_read_stops_all_workers(source: Any, tmp_path: Path, workers: int) -> None:
    (tmp_path / "rank2.bin").write_bytes(b"short")
    with pytest.raises(ucp.CorruptError, match=r"rank2\.bin.*early"):
        ucp.load(Net(), source[2], workers=workers)


def test_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucp.train.transfer.BLOCK_BYTES", 64)
    truth = torch.randn(7, 5, 9)
    ckpt = Checkpoint(*make(str(tmp_path), {"x": {"value": truth}, "y": {"value": truth[0, 0, 0]}}, cut=flat(3)))
    target = {"x": torch.empty(9, 5, 7).permute(2, 1, 0), "y": torch.empty((), dtype=torch.float64)}
    ucp.load(target, ckpt, workers=3)
    assert torch.equal(target["x"], truth)
    assert target["y"] == truth[0, 0, 0].double()


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (3, "int"),
        ({}, "nothing to load into"),
        ({"x": {"value": torch.ones(1), "exp_avg": 3}}, r"x\[exp_avg\]"),
        ({"model": {"x": torch.ones(1)}, "y": object()}, "object"),
    ],
)
def test_targets_of_unknown_kinds(source: Any, target: Any, problem: str) -> None:
    with pytest.raises(ucp.UsageError, match=problem):
        ucp.load(target, source[2])


def test_memory_that_cannot_be_filled(source: Any) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ucp.FitError, match=r"memory: norm.weight \(.*meta device.*to_empty"):
        ucp.load(model, source[2])


@pytest.mark.gpu
def test_onto_an_accelerator(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucp.train.transfer.BLOCK_BYTES", 64)
    model, _, ckpt = source
    other = Net().to(torch.accelerator.current_accelerator())
    resumed = adamw(other, fused=True)
    ucp.load((other, resumed), ckpt)
    assert_same_state({k: v.cpu() for k, v in other.state_dict().items()}, model.state_dict())
    half = Net().to(torch.accelerator.current_accelerator()).bfloat16()
    ucp.load(half, ckpt)
    assert torch.equal(half.embed.weight.cpu(), model.embed.weight.bfloat16())
