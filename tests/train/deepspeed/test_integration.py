"""What a training loop calls: an engine attached to ucp, `resume`, asynchronous saves; and what is refused, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.support.deepspeed_live import Live, Lived, run
from tests.train.deepspeed.moves import MORE, STEPS, At, problems, resumed, state_problems

pytestmark = pytest.mark.usefixtures("needs_deepspeed")

ON_CPU = {"device": "cpu"}
CPU = {"zero_optimization": {"offload_optimizer": ON_CPU}, "zero_force_ds_cpu_optimizer": False}
PARAMETERS_TOO = {**CPU, "zero_optimization": {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}}
PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
ACCUMULATING = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}
CLIENT = {"epoch": "3", "seen": "tensor([0, 1, 2])", "words": "['a', 'b']"}

SAVER = At("z1", 2).case("bf16")


def saver(root: str) -> Live:
    """An attached engine that saves by its own call."""
    actions: list[list[Any]] = [["attach"], ["train", STEPS]]
    actions += [["stock_save", root], ["state", "saved"], ["asked", "asked"], ["train", MORE]]
    return Live(case=SAVER, actions=actions)


def taker(at: At, *actions: Any, config: dict[str, Any] | None = None) -> Live:
    case = resumed(at.case("bf16"), "").case
    return Live(case=case, config=config or {}, actions=[["at", STEPS], *actions, ["state", "loaded"], ["train", MORE]])


def test_an_attached_engine_keeps_its_calls(tmp_path: Path) -> None:
    root, later = str(tmp_path / "run"), str(tmp_path / "later")
    # What the engine held before it loads must not matter, nor may a half of a step be lost without a word.
    busy = [["train", 1], ["at", STEPS], ["attach"], ["stock_load", root], ["asked", "asked"]]
    half = [["half_step"], ["refused", "save", later], ["refused", "load", f"{root}/global_step3"]]
    before, after, waiting, none = run(
        [
            saver(root),
            taker(At("z3", 3), *busy, config=PERSISTENT),
            Live(case=taker(At("z2", 2)).case, config=ACCUMULATING, actions=[["resume", root], *half]),
            Live(case=SAVER, actions=[["attach"], ["stock_load", later]]),
        ],
        tmp_path / "jobs",
    )
    assert after.record["reports"] == [{"path": f"{root}/global_step3", "client": CLIENT}]
    after.record["losses"] = after.losses[1:]
    assert problems(before, after, "bf16") == []
    assert state_problems(before.state("asked"), after.state("asked")) == []
    assert (Path(root) / "latest").read_text() == "global_step3"
    with ucp.open(f"{root}/global_step3") as checkpoint:
        assert (checkpoint.step, checkpoint.family) == (STEPS, "native")
    loaded, *refused = waiting.record["reports"]
    assert loaded["client"] == CLIENT
    assert [one["error"] for one in refused] == ["FitError", "FitError"]
    assert all("between two steps: it added up 1 of 2 gradients" in one["message"] for one in refused)
    assert not Path(later).exists()
    assert none.record["reports"] == [{"path": None, "client": {}}]


@pytest.mark.slow
def test_offloading_and_asynchronous_saves(tmp_path: Path) -> None:
    root, later = str(tmp_path / "run"), str(tmp_path / "later")
    jobs = {
        "saver": saver(root),
        "optimizer on cpu": taker(At("z2", 2), ["resume", root], config=CPU),
        "optimizer of ZeRO-3 on cpu": taker(At("z3", 2), ["resume", root], config=CPU),
        "parameters on cpu": taker(At("z3", 2), ["resume", root, "global_step3"], config=PARAMETERS_TOO),
        "asynchronous": Live(
            case=taker(At("z3", 3)).case,
            actions=[["at", STEPS], ["resume", root], ["state", "loaded"], ["async_save", later], ["train", MORE - 1]],
        ),
        "after it": taker(At("z2", 2), ["load", later], ["nudge"], ["load", later]),
    }
    lived: dict[str, Lived] = dict(zip(jobs, run(list(jobs.values()), tmp_path / "jobs"), strict=True))
    before = lived.pop("saver")
    wrong = {name: problems(before, after, "bf16") for name, after in lived.items()}
    assert not {name: found for name, found in wrong.items() if found}
