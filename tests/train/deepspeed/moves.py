"""Moves of live engines from one layout to another through a checkpoint, and what must be the same on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ucp
from tests.support.case import Case, Precision
from tests.support.deepspeed_live import Live, Lived, run
from tests.support.deepspeed_resume import OTHER_SEED

# One rounding of the working precision, a few times over: the sums differ in their last bits, then training goes on.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 5e-4}
STEPS, MORE = 3, 3

KINDS: dict[str, dict[str, Any]] = {
    "z0": {"stage": 0},
    "z1": {"stage": 1},
    "z1-round-robin": {"stage": 1, "round_robin": True},
    "z1-aligned": {"stage": 1, "parameter_alignment": True},
    "bf16-optimizer": {"stage": 1, "grad_accum_fp32": True},
    "z2": {"stage": 2},
    "z3": {"stage": 3},
    "z3-sub-groups": {"stage": 3, "sub_group_size": 1500},
}


class At(NamedTuple):
    """A layout: what of `KINDS`, on how many ranks."""

    kind: str
    world: int

    def case(self, dtype: Precision, **changes: Any) -> Case:
        """The job at this layout."""
        return Case(name=self.kind, world=self.world, dtype=dtype, **{**KINDS[self.kind], **changes})


def source(case: Case, url: str) -> Live:
    """A job that trains, saves and trains on."""
    actions: list[list[Any]] = [["train", STEPS], ["save", url], ["state", "saved"], ["train", MORE]]
    return Live(case=case, actions=actions)


def resumed(case: Case, url: str, **changes: Any) -> Live:
    """A job with other first weights that loads and trains on."""
    actions: list[list[Any]] = [["at", STEPS], ["load", url], ["state", "loaded"], ["train", MORE]]
    return Live(case=case.replace(seed=OTHER_SEED), actions=actions, **changes)


def check_moves(
    dtype: Precision, moves: Mapping[At, Sequence[At]], out: Path, *, losses: int = MORE, **changes: Any
) -> None:
    """Every source saves once, every target of it loads: states bit for bit, and the losses that follow."""
    jobs: list[Live] = []
    pairs: list[tuple[str, int, int]] = []
    for here, targets in moves.items():
        url = str(out / f"{here.kind}-{here.world}")
        first = len(jobs)
        jobs.append(source(here.case(dtype, **changes), url))
        for there in targets:
            pairs.append((f"{here} -> {there}", first, len(jobs)))
            jobs.append(resumed(there.case(dtype, **changes), url))
    lived = run(jobs, out / "jobs")
    assert {ucp.open(str(out / f"{here.kind}-{here.world}")).step for here in moves} == {STEPS}
    wrong = {name: problems(lived[a], lived[b], dtype, losses=losses) for name, a, b in pairs}
    assert not {name: found for name, found in wrong.items() if found}


def problems(before: Lived, after: Lived, dtype: Precision, *, losses: int = MORE) -> list[str]:
    """Everything in which a job that loaded differs from the one that went on by itself."""
    wrong = state_problems(before.state("saved"), after.state("loaded"))
    told, found = before.told("saved"), after.told("loaded")
    same = "global_steps skipped_steps global_samples micro_steps loss_scale steps scheduler lrs names shared".split()
    wrong += [f"{key} {found[key]} for {told[key]}" for key in same if found[key] != told[key]]
    if hyper(found) != hyper(told):
        wrong.append(f"hyper-parameters {hyper(found)} for {hyper(told)}")
    return wrong + loss_problems(before.losses[STEPS:], after.losses, dtype, losses)


def state_problems(truth: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors that are not equal bit for bit, and those on one side alone."""
    alone = [f"{key} is on one side alone" for key in truth.keys() ^ state.keys()]
    return alone + [f"{key} differs" for key in truth.keys() & state.keys() if not torch.equal(truth[key], state[key])]


def loss_problems(expected: Sequence[float], losses: Sequence[float], dtype: Precision, count: int = MORE) -> list[str]:
    """Losses that are not those of the job that was never interrupted."""
    pairs = list(zip(expected[:count], losses[:count], strict=True))
    if len(pairs) != count or any(abs(a - b) > TOLERANCE[dtype] * a for a, b in pairs):
        return [f"losses {list(losses)} for {list(expected)}"]
    return []


def hyper(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hyper-parameters by parameter name, without the step that DeepSpeed's FusedAdam counts in groups by itself."""
    groups = [{"names": sorted(g["names"]), **g["hyper"]} for g in told["groups"]]
    return sorted(({k: v for k, v in g.items() if k != "step"} for g in groups), key=lambda g: g["names"])
