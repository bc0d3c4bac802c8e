from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.gloo import spawn
from tests.train import jobs
from tests.train.handmade import columns, flat, make
from ucp.checkpoint import Checkpoint
from ucp.store import open_store

STEPS = 3


class Truth:
    """A plain model trained for some steps, its checkpoint, and its next losses."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.model = jobs.build(kind)
        self.optimizer = jobs.optimizer_of(self.model)
        for step in range(STEPS):
            jobs.train_step(self.model, self.optimizer, step)
        self.state = snapshot(self.model, self.optimizer)
        self.checkpoint = save(folder, self.model, self.optimizer, flat(3))
        self.hyper = [(g["lr"], g["betas"], g["weight_decay"]) for g in self.optimizer.param_groups]
        self.losses = [jobs.train_step(self.model, self.optimizer, STEPS + i) for i in range(3)]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{state}/{name}": v.clone() for state, v in optimizer.state.get(parameter, {}).items()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, cut: Any) -> Checkpoint:
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    steps = {}
    for name, tensor in model.state_dict().items():
        if name in named or name in dict(model.named_buffers()):
            states = optimizer.state.get(named.get(name), {})
            tensors[name] = {"value": tensor, **{k: v for k, v in states.items() if k != "step"}}
            if "step" in states:
                steps[name] = float(states["step"])
    groups = [
        ([names[id(p)] for p in g["params"]], {k: v for k, v in g.items() if k != "params"})
        for g in optimizer.param_groups
    ]
    ties = {"head.weight": "embed.weight"} if "embed.weight" in named else {}
    return Checkpoint(*make(str(folder), tensors, cut=cut, steps=steps, groups=groups, ties=ties))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("lm"), "lm")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("stack"), "stack")


@pytest.mark.parametrize(
    ("kind", "layout", "world"),
    [
        ("lm", "fsdp", 2),
        pytest.param("lm", "fsdp", 3, marks=pytest.mark.slow),
        pytest.param("lm", "fsdp", 4, marks=pytest.mark.slow),
        pytest.param("lm", "hsdp", 4, marks=pytest.mark.slow),
        pytest.param("stack", "tp", 2, marks=pytest.mark.slow),
        ("stack", "fsdp+tp", 4),
    ],
)
def test_every_layout_resumes_with_the_same_state(
    kind: str, layout: str, world: int, request: pytest.FixtureRequest
) -> None:
    truth: Truth = request.getfixturevalue(kind)
    for result in spawn(jobs.resume, world, truth.checkpoint, kind, layout, STEPS):
        assert result["state"].keys() == truth.state.keys()
        for key, value in truth.state.items():
            got = torch.from_numpy(result["state"][key])
            assert got.dtype == value.dtype
            assert torch.equal(got, value), key
        assert result["sharded"] > 8
        assert result["layouts"], "states are laid out as their parameters"
        assert result["hyper"] == truth.hyper
        # The order of additions differs between layouts after the first forward pass.
        assert result["losses"] == pytest.approx(truth.losses, rel=2e-5)
        if layout in ("fsdp", "hsdp"):
            assert result["losses"][0] == truth.losses[0]
        assert result["bytes"] == (truth.checkpoint.catalog.nbytes,) * 2, "the job reads each byte once"


def test_every_rank_rounds_its_own_shard(lm: Truth) -> None:
    assert spawn(jobs.round_to_bfloat16, 3, lm.checkpoint) == [True] * 3


def test_gathered_copies_are_thrown_away_first(lm: Truth) -> None:
    assert spawn(jobs.load_after_forward, 2, lm.checkpoint) == [[]] * 2


@pytest.mark.parametrize("cut", [flat(3), pytest.param(columns(2), marks=pytest.mark.slow)])
def test_every_placement_on_a_mesh(tmp_path: Path, cut: Any) -> None:
    source = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.randn(7, 5, 3)}}, cut=cut))
    assert spawn(jobs.placements, 4, source) == [[]] * 4


def test_partial_placements_are_refused(tmp_path: Path) -> None:
    source = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.randn(4, 3)}}))
    for message in spawn(jobs.partial, 2, source):
        assert "memory: w" in message
        assert "redistribute" in message


def test_columns_are_read_once_and_exchanged(tmp_path: Path) -> None:
    source = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.randn(512, 768)}}, cut=flat(2)))
    found = spawn(jobs.columns_of_a_large_matrix, 3, source)
    assert all(right for _, _, right in found)
    assert sum(read for read, _, _ in found) == source.catalog.nbytes


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_ranks_check_together_what_none_of_them_read_whole(lm: Truth, tmp_path: Path, layout: str, world: int) -> None:
    catalog, store = lm.checkpoint.catalog, lm.checkpoint.store
    found = spawn(jobs.checked, world, lm.checkpoint, layout)
    assert all(checked == whole for _, checked, whole in found)
    assert sum(read for read, _, _ in found) == found[0][2], "each byte once, padding too"
    for entry in store.entries():
        data = bytearray(store.read(entry.path))
        if entry.path == "rank1.bin":
            data[len(data) // 2] ^= 1
        (tmp_path / entry.path).write_bytes(data)
    broken = Checkpoint(replace(catalog, url=str(tmp_path)), open_store(str(tmp_path)))
    for said, states in spawn(jobs.damaged, world, broken, layout):
        assert said.startswith("CorruptError: ")
        assert "rank1.bin: bytes 0.." in said
        assert states == 0


def test_ranks_that_read_for_themselves_agree_all_the_same(lm: Truth, tmp_path: Path) -> None:
    catalog, store = lm.checkpoint.catalog, lm.checkpoint.store
    for said, received, held in spawn(jobs.each_for_itself, 2, lm.checkpoint, None):
        assert (said, received) == ("loaded", 0)
        assert all(torch.equal(torch.from_numpy(value), lm.state[name]) for name, value in held.items())
    for entry in store.entries():
        data = bytearray(store.read(entry.path))
        data[100] ^= 1
        (tmp_path / entry.path).write_bytes(data)
    broken = Checkpoint(catalog, open_store(str(tmp_path)))
    # The first rank's copy is whole, and says nothing of the second's.
    for said, _, _ in spawn(jobs.each_for_itself, 2, lm.checkpoint, broken):
        assert said.startswith("CorruptError: ")


def test_what_one_rank_raises_all_of_them_raise(lm: Truth) -> None:
    assert {said.partition(": ")[2] for said in spawn(jobs.one_rank_fails, 2, lm.checkpoint)} == {
        "the disk of this rank is gone"
    }


def test_what_one_rank_cannot_restore_is_an_error_on_all(tmp_path: Path) -> None:
    assert spawn(jobs.one_rank_cannot_restore, 2, str(tmp_path / "ckpt")) == [
        "UcpError: rank 1 failed: ValueError: no room for 3",
        "ValueError: no room for 3",
    ]
