"""Engines resume from what others saved: FSDP2, DeepSpeed itself, converted checkpoints; and others from engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.support.case import Case
from tests.support.deepspeed_live import Live, run
from tests.train.deepspeed.moves import MORE, STEPS, At, loss_problems, problems, resumed, source, state_problems

pytestmark = pytest.mark.usefixtures("needs_deepspeed")

LOWP = "lowp/"


def test_fsdp2_goes_on_as_zero_and_zero_as_fsdp2(tmp_path: Path) -> None:
    """Counters are made of the step, which is all that such a checkpoint tells."""
    fsdp2, back = str(tmp_path / "fsdp2"), str(tmp_path / "zero")
    plain = Case(name="plain", world=2)
    actions: list[list[Any]] = [["train", STEPS], ["save", fsdp2, {"step": STEPS}], ["state", "saved"], ["train", MORE]]
    as_zero = resumed(At("z3", 3).case("fp32"), fsdp2)
    first, zero, last = run(
        [
            Live(case=plain, fsdp2=True, actions=actions),
            Live(case=as_zero.case, actions=[*as_zero.actions[:-1], ["save", back], *as_zero.actions[-1:]]),
            Live(case=resumed(plain, back).case, fsdp2=True, actions=resumed(plain, back).actions),
        ],
        tmp_path / "jobs",
    )
    loaded = {key: value for key, value in zero.state("loaded").items() if not key.startswith(LOWP)}
    assert state_problems(first.state("saved"), loaded) == []
    assert state_problems(first.state("saved"), last.state("loaded")) == []
    assert loss_problems(first.losses[STEPS:], zero.losses, "fp32") == []
    assert loss_problems(first.losses[STEPS:], last.losses, "fp32") == []
    told = zero.told("loaded")
    assert (told["global_steps"], told["micro_steps"], told["skipped_steps"], told["global_samples"]) == (3, 3, 0, 36)


@pytest.mark.slow
def test_folders_of_deepspeed_and_converted_ones(tmp_path: Path) -> None:
    """DeepSpeed's own folder and its universal form; and stock DeepSpeed from what an engine saved through ucp."""
    case = At("z2", 2).case("fp16", loss_scale_power=12)
    native, stock = str(tmp_path / "native"), str(tmp_path / "stock")
    saver = source(case, native)
    actions = [*saver.actions[:1], ["stock_save", stock], *saver.actions[1:]]
    (before,) = run([Live(case=case, actions=actions)], tmp_path / "before")
    universal, folder = str(tmp_path / "universal"), str(tmp_path / "folder")
    ucp.convert(stock, universal)
    ucp.convert(native, folder, to="deepspeed", stage=2, dtype="fp16", mesh={"dp": 2})
    own = resumed(case, folder)
    found = run(
        [
            resumed(At("z3", 3).case("fp16", loss_scale_power=12), stock),
            resumed(At("z1", 3).case("fp16", loss_scale_power=12), universal),
            Live(case=own.case, actions=[["at", STEPS], ["stock_load", folder], *own.actions[2:]]),
        ],
        tmp_path / "resumed",
    )
    assert [problems(before, one, "fp16") for one in found[:2]] == [[], []]
    # DeepSpeed itself does not keep the number of micro batches.
    assert problems(before, found[2], "fp16") == ["micro_steps 0 for 3"]


@pytest.mark.slow
def test_zero_0_of_deepspeed_itself(tmp_path: Path) -> None:
    case = At("z0", 2).case("fp32", frozen=False)
    stock, native = str(tmp_path / "stock"), str(tmp_path / "native")
    saver = source(case, native)
    before, after = run(
        [
            Live(case=case, actions=[*saver.actions[:1], ["stock_save", stock], *saver.actions[1:]]),
            resumed(At("z3", 2).case("fp32", frozen=False), stock),
        ],
        tmp_path / "jobs",
    )
    assert problems(before, after, "fp32") == []
