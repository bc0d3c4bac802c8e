"""Megatron-Core jobs go on at other ranks from what they saved with us, bit for bit as from their own checkpoints.

The reference is Megatron-Core itself: a third job on the same grid loads what the first saved with
``dist_checkpointing`` alone. What ours hold after loading must be the same on every rank, and so must the next losses.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.converters.megatron.write_support import Job, Ran
from tests.programs.megatron.models import BIASED, GPT, LLAMA, MIXED, MIXTRAL, QWEN3
from tests.support.megatron import Grid, Model
from tests.train.megatron.support import assert_same_states, run_jobs
from ucp.checkpoint import open_checkpoint

STEPS, MORE = 2, 2
EVEN = 112
"""A vocabulary that no number of ranks has to pad: what is learned of padding is no part of a model."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A job that trains and saves, and the grid on which others go on."""

    model: Model
    source: Grid
    target: Grid
    ways: tuple[str, ...]
    bf16: bool = True
    distributed: bool = True

    @property
    def name(self) -> str:
        kind = "distributed" if self.distributed else "float16" if self.bf16 else "fp32"
        return f"{self.model.name}-{self.source.name}-{self.target.name}-{kind}"


def small(model: Model, *, vocab: int = EVEN) -> Model:
    """With two layers."""
    return dataclasses.replace(model, layers=2, vocab=vocab)


def ran(case: Case, folder: Path) -> tuple[Ran, Ran, dict[str, Ran]]:
    """The source, Megatron-Core's own going on, and ours by the way that was saved and loaded."""
    kind = {"bf16": case.bf16, "distributed": case.distributed}
    saved = str(folder / "saved")
    first = Job(case.model, case.source, str(folder / "source"), save=saved, first=STEPS, then=MORE, **kind)
    then = [
        Job(case.model, case.target, str(folder / way), load=saved, form=way, then=MORE, **kind)
        for way in ("megatron", *case.ways)
    ]
    source, reference, *others = run_jobs([first, *then])
    return source, reference, dict(zip(case.ways, others, strict=True))


def check(case: Case, folder: Path) -> None:
    source, reference, ours = ran(case, folder)
    assert len(source.losses) == MORE
    for job in ours.values():
        assert_same_states(job, reference)
        assert job.losses == reference.losses
    if case.model.vocab == EVEN:
        assert reference.losses == pytest.approx(source.losses, rel=2e-3)


FAST = Case(small(LLAMA, vocab=103), Grid(tp=2), Grid(pp=2), ("live", "strategy"))
ALL = ("live", "pending", "dict", "lean", "strategy", "async", "stored", "program")
CASES = [
    Case(small(LLAMA), Grid(tp=2, dp=2), Grid(pp=2, dp=2), ALL),
    Case(small(LLAMA), Grid(pp=2), Grid(tp=2, dp=2), ("live", "dict"), distributed=False),
    Case(small(QWEN3), Grid(dp=2), Grid(tp=2), ("live", "strategy"), bf16=False, distributed=False),
    Case(dataclasses.replace(GPT, vocab=EVEN), Grid(tp=2), Grid(pp=2, vpp=2), ("live", "dict")),
    Case(small(MIXTRAL), Grid(ep=2, dp=2, pp=2), Grid(ep=4, dp=4), ("live", "strategy")),
    Case(small(BIASED), Grid(ep=2, dp=2), Grid(dp=2, ep=2, pp=2), ("live",)),
    Case(dataclasses.replace(MIXED, vocab=EVEN), Grid(ep=2, dp=2), Grid(ep=2, dp=2, pp=2), ("live", "dict")),
]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran, Ran, dict[str, Ran]]:
    folder = tmp_path_factory.mktemp("fast")
    return folder, *ran(FAST, folder)


@pytest.mark.parametrize("way", FAST.ways)
def test_goes_on_at_other_ranks(fast: tuple[Path, Ran, Ran, dict[str, Ran]], way: str) -> None:
    _, _, reference, ours = fast
    assert_same_states(ours[way], reference)
    assert ours[way].losses == reference.losses


def test_what_is_stored_is_called_as_in_torch_dist(fast: tuple[Path, Ran, Ran, dict[str, Ran]]) -> None:
    folder = fast[0] / "saved"
    ours, theirs = open_checkpoint(folder / "live"), open_checkpoint(folder / "megatron", names="stored")
    held, wanted = ours.catalog.tensors, theirs.catalog.tensors
    assert {name: tensor.states for name, tensor in held.items()} == {
        name: tensor.states for name, tensor in wanted.items()
    }
    assert held["decoder.layers.mlp.linear_fc1.weight"].states["exp_avg"].shape == (2, 152, 48)
    assert ours.step == STEPS
    assert ours.catalog.state["lr_scheduler"]["num_steps"] == STEPS


def test_states_are_written_once(fast: tuple[Path, Ran, Ran, dict[str, Ran]]) -> None:
    catalog = open_checkpoint(fast[0] / "saved" / "live").catalog
    held = sum(path.stat().st_size for path in (fast[0] / "saved" / "live" / "shards").iterdir())
    assert catalog.nbytes <= held < catalog.nbytes * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_goes_on_at_other_ranks_whatever_trains(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
