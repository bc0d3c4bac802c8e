"""Stock DeepSpeed resumes from the folders that ucp writes, on other numbers of ranks and under other ZeRO stages.

Each run is a real DeepSpeed job whose model starts from other weights than the source's, so whatever was not loaded
shows. State after loading must equal the source's bit for bit, and the losses that follow those of the run that was
never interrupted: bit for bit where the layout is the same, else up to the order in which floating-point numbers are
added (gradients are summed over ranks, and over other partitions, in another order).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ucp
from tests.converters.deepspeed_universal.made import Made
from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.deepspeed_job import job_environment, read_result
from tests.support.deepspeed_resume import Resume, Resumed, resume, target
from ucp.run.convert import carry_out, convert, prepare
from ucp.store import open_store

FINISH = "ucp.converters.deepspeed_universal:finish_load"
# One rounding of the working precision, a few times over: the sums differ in their last bits, then training goes on.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 5e-4}

DeepSpeedCases = Callable[[Iterable[Case]], dict[str, Path]]


@dataclasses.dataclass(frozen=True)
class Move:
    """From a source case to a layout.

    `exact` says that the losses must be equal bit for bit, `finish` that the job calls `finish_load`, `hyper` that the
    source holds hyper-parameters; `losses` are compared.
    """

    source: str
    stage: int
    world: int
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = False
    finish: bool = True
    hyper: bool = True
    losses: int = 3

    @property
    def case(self) -> Case:
        return target(CASES[self.source], stage=self.stage, world=self.world, **self.changes)

    def __str__(self) -> str:
        kind = "-bf16opt" if self.changes.get("grad_accum_fp32") else ""
        plain = "" if self.finish else "-unfinished"
        return f"{self.source}->z{self.stage}{kind}dp{self.world}{plain}"


# ZeRO-0 does not save which parameters were trained.
READ_OPTIONS = {"z0_fp32_dp2": {"frozen": ["adapter.*"]}}

BF16_OPTIMIZER = {"grad_accum_fp32": True}

# Grouped so that DeepSpeed is imported once for each group.
MOVES = {
    "same and other stages": [
        Move("z3_fp32_dp4", 3, 4, exact=True),
        Move("z1_fp32_dp2", 3, 3),
        Move("z3_fp32_dp4", 1, 2),
        Move("z2_fp16_dp2", 3, 2),
        Move("z3_bf16_dp3_subgroup", 1, 2, BF16_OPTIMIZER),
    ],
}
MORE_MOVES = {
    "same layout": [
        Move("z1_fp32_dp2", 1, 2, exact=True),
        Move("z2_bf16_dp3", 2, 3, exact=True),
        Move("z2_bf16_dp4_rr", 2, 4),
    ],
    "from 1": [
        Move("z1_bf16_dp4", 1, 2),
        Move("z1_bf16_dp4", 2, 3),
        Move("z1_bf16_dp4", 3, 2),
        Move("z1_bf16_dp3_rr", 3, 2),
        Move("z1_bf16_dp3_rr", 1, 3),
        Move("z1_fp16_dp3", 2, 2),
        Move("z1_bf16_dp3_aligned", 2, 2),
        Move("z1_fp32_dp3_elastic", 1, 2, hyper=False),
        Move("z1_bf16_dp2_plain", 3, 4),
    ],
    "from BF16_Optimizer": [
        Move("z1_bf16opt_dp2", 1, 2, BF16_OPTIMIZER, exact=True),
        Move("z1_bf16opt_dp3", 1, 4, BF16_OPTIMIZER),
        Move("z1_bf16opt_dp3", 3, 2),
        Move("z1_bf16opt_dp2", 2, 3),
    ],
    "from 2": [
        Move("z2_bf16_dp3", 3, 3),
        Move("z2_fp32_dp3_rr", 1, 2),
        Move("z2_fp32_dp3_rr", 3, 4),
        Move("z2_fp32_dp4_aligned_rr", 2, 3),
        Move("z2_fp32_dp2_unused", 3, 2),
        Move("z2_bf16_dp4_rr", 1, 2, BF16_OPTIMIZER),
    ],
    "from 3": [
        Move("z3_bf16_dp2", 2, 3),
        Move("z3_fp16_dp3", 3, 2),
        Move("z3_fp16_dp3", 1, 3),
        Move("z3_bf16_dp3_subgroup", 3, 2),
        Move("z3_bf16_dp2_plain", 3, 1, finish=False),
        Move("z3_bf16_dp2_gather16", 2, 2),
    ],
    "other optimizers": [
        Move("z1_fp32_dp3_sgd", 2, 2),
        Move("z3_fp32_dp3_sgd", 1, 3),
        Move("z2_bf16_dp2_lion", 1, 3),
        Move("z3_bf16_dp2_lion", 2, 2),
        Move("z1_bf16_dp2_fused", 3, 2),
    ],
    "from 0": [
        Move("z0_fp32_dp2", 1, 2),
        Move("z0_bf16_dp2", 3, 2),
        # The losses after the first differ by design of the source's wrapper: in a step after which the loss scale
        # grows, it divides the gradients by the new scale (deepspeed/runtime/fp16/unfused_optimizer.py, step).
        Move("z0_fp16_dp3", 2, 3, losses=1),
    ],
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_stock_deepspeed_resumes(moves: list[Move], deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    check_moves(moves, deepspeed_cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moves", MORE_MOVES.values(), ids=MORE_MOVES)
def test_stock_deepspeed_resumes_from_everything(
    moves: list[Move], deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    check_moves(moves, deepspeed_cases, tmp_path)


def check_moves(moves: list[Move], deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    folders = deepspeed_cases({move.source: CASES[move.source] for move in moves}.values())
    written = {source: tmp_path / source for source in folders}
    for source, root in written.items():
        options = READ_OPTIONS.get(source)
        convert(str(folders[source] / "ckpt"), str(root), to="deepspeed-universal", read_options=options)
    resumed = resume([request(move, written[move.source]) for move in moves], tmp_path / "resumed")
    wrong = {str(move): problems(move, folders[move.source], found) for move, found in zip(moves, resumed, strict=True)}
    assert not {move: found for move, found in wrong.items() if found}


def request(move: Move, root: Path) -> Resume:
    return Resume(
        case=move.case, root=str(root), first_step=CASES[move.source].steps, finish=FINISH if move.finish else None
    )


def problems(move: Move, folder: Path, found: Resumed) -> list[str]:
    """Everything in which the resumed job differs from the one that was not interrupted."""
    record = read_result(folder)
    wrong = state_problems(move, load_file(str(folder / "truth.safetensors")), found.state())
    same = ["global_steps", "skipped_steps", "loss_scale", "steps", "scheduler"]
    wrong += [
        f"{key} {found.record[key]} for {record[key]}" for key in same if found.record.get(key) != record.get(key)
    ]
    if not move.hyper:
        return wrong
    if hyper(found.record) != hyper(record):
        wrong.append(f"hyper-parameters {hyper(found.record)} for {hyper(record)}")
    expected, losses = record["losses_after"][: move.losses], found.losses[: move.losses]
    tolerance = 0.0 if move.exact else TOLERANCE[move.case.dtype]
    if len(losses) != len(expected) or any(abs(a - b) > tolerance * b for a, b in zip(losses, expected, strict=True)):
        wrong.append(f"losses {losses} for {expected}")
    return wrong


def state_problems(move: Move, truth: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> list[str]:
    if not move.finish:
        truth = {key: value for key, value in truth.items() if not key.startswith(("frozen/", "buffer/"))}
    wrong = [f"{key} is missing" for key in truth if key not in state]
    return wrong + [f"{key} differs" for key in truth if key in state and not torch.equal(truth[key], state[key])]


def hyper(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Hyper-parameters by parameter name."""
    return sorted(({"names": sorted(g["names"]), **g["hyper"]} for g in record["groups"]), key=lambda g: g["names"])


def test_round_robin_jobs_are_refused(deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    """DeepSpeed loads wrong values into such a job without a word; `finish_load` says so."""
    case = CASES["z2_fp32_dp3_rr"]
    folder = deepspeed_cases([case])[case.name]
    conversion = prepare(str(folder / "ckpt"), str(tmp_path / "out"), to="deepspeed-universal")
    carry_out(conversion)
    assert any("round_robin_gradients" in note for note in conversion.target.notes)
    asked = request(Move(case.name, 2, 3, {"round_robin": True}), tmp_path / "out")
    with pytest.raises(RuntimeError, match="FitError: this job sets round_robin_gradients"):
        resume([asked], tmp_path / "refused")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "groups"), [("z3_fp32_dp2", 2), ("z1_bf16_dp4", 2)], ids=["more", "fewer"])
def test_values_are_loaded_whatever_the_jobs_groups(
    source: str, groups: int, deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    """ZeRO-1 and 2 walk the job's groups and the saved ones side by side; no group may be left out without a word."""
    folder = deepspeed_cases([CASES[source]])[source]
    convert(str(folder / "ckpt"), str(tmp_path / "out"), to="deepspeed-universal")
    move = Move(source, 2, 2, {"groups": groups})
    # No step: torch's schedulers stop at another number of groups by themselves.
    (found,) = resume([dataclasses.replace(request(move, tmp_path / "out"), steps=0)], tmp_path / "resumed")
    assert state_problems(move, load_file(str(folder / "truth.safetensors")), found.state()) == []
    asked = request(Move(source, 3, 2, {"groups": groups}), tmp_path / "out")
    if groups < CASES[source].groups:
        with pytest.raises(RuntimeError, match=r"FitError: .* are in 2 groups there"):
            resume([asked], tmp_path / "refused")


def test_the_client_state_comes_back(deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    """What stock DeepSpeed hands back from the universal folder is what it hands back from its own checkpoint."""
    case = CASES["z1_fp32_dp2"]
    folder = deepspeed_cases([case])[case.name]
    convert(str(folder / "ckpt"), str(tmp_path / "out"), to="deepspeed-universal")
    native = Resume(case=target(case), root=str(folder / "ckpt"), universal=False, first_step=case.steps, steps=1)
    ours = dataclasses.replace(native, root=str(tmp_path / "out"), universal=True, finish=FINISH)
    expected, found = (run.record["client_state"] for run in resume([native, ours], tmp_path / "resumed"))
    assert "random_states" in expected
    # ZeRO-1 says nothing of the shapes of frozen parameters; a universal folder does.
    assert "adapter.weight" in found.pop("frozen_param_shapes")
    assert expected.pop("frozen_param_shapes") == "None"
    assert found == expected


def test_folders_of_deepspeeds_own_converter_are_sources(deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    """What ``ds_to_universal.py`` writes from ZeRO-3 loads under ZeRO-3 alone; converted, it resumes under ZeRO-1."""
    cases = [CASES["z1_fp32_dp2"], CASES["z3_fp32_dp4"]]
    folders = deepspeed_cases(cases)
    for case in cases:
        folder, stock = folders[case.name], tmp_path / case.name
        ds_to_universal(folder / "ckpt" / case.tag, stock / f"{case.tag}_universal")
        with ucp.open(str(stock)) as checkpoint:
            assert checkpoint.family == "deepspeed-universal"
            compare(checkpoint, load_file(str(folder / "truth.safetensors")), read_result(folder))
    out = tmp_path / "out"
    convert(str(tmp_path / "z3_fp32_dp4"), str(out), to="deepspeed-universal")
    move = Move("z3_fp32_dp4", 1, 4)
    (found,) = resume([request(move, out)], tmp_path / "resumed")
    assert problems(move, folders[move.source], found) == []


def ds_to_universal(source: Path, destination: Path) -> None:
    """Run DeepSpeed's own converter."""
    destination.parent.mkdir()
    options = ["--input_folder", str(source), "--output_folder", str(destination), "--num_extract_workers", "1"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options, "--num_merge_workers", "1"],
        env=job_environment(),
        check=True,
        capture_output=True,
        timeout=240,
    )


def compare(checkpoint: ucp.Checkpoint, truth: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Every tensor, step and hyper-parameter."""
    for key, value in truth.items():
        kind, _, name = key.partition("/")
        state = "value" if kind in ("param", "frozen", "buffer") else kind
        assert kind == "lowp" or torch.equal(checkpoint[name][state][...], value), key
    assert {name: checkpoint[name].scalars["step"] for name in record["steps"]} == record["steps"]
    found = [{"names": group.params, "lr": group.options["lr"]} for group in checkpoint.param_groups]
    assert found == [{"names": tuple(group["names"]), "lr": group["hyper"]["lr"]} for group in record["groups"]]


LOAD_SCALAR = """
import sys, types, torch
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
value = torch.zeros(1)
mapping = types.SimpleNamespace(
    lp_fragment_address=types.SimpleNamespace(start=0, numel=1), get_hp_fragment=lambda: value, optim_fragment={}
)
parameter = types.SimpleNamespace(shape=torch.Size([]), numel=lambda: 1, _hp_mapping=mapping)
step = load_hp_checkpoint_state(parameter, sys.argv[1], 0, 1)
states = mapping.optim_fragment
print([step.item(), value.item(), states["exp_avg"].item(), states["exp_avg_sq"].item()])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("needs_deepspeed")
def test_deepspeeds_loader_takes_scalar_parameters(tmp_path: Path) -> None:
    made = Made("scalar-parameter")
    made.adam("other", 2)
    made.adam("scale")
    made.out = open_store(str(tmp_path))
    made.write(made.catalog())
    folder = tmp_path / "global_step3_universal" / "zero" / "scale"
    command = [sys.executable, "-c", LOAD_SCALAR, str(folder)]
    done = subprocess.run(command, env=job_environment(), capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == [3.0, 1.0, 2.0, 3.0]


def test_an_interrupted_conversion_does_not_load(deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    """With any part of the writes, in their order, DeepSpeed refuses, with and without the tag."""
    from tests.converters.deepspeed_universal import half_written

    case = CASES["z3_fp32_dp2"]
    folder = deepspeed_cases([case])[case.name]
    conversion = prepare(str(folder / "ckpt"), str(tmp_path / "out"), to="deepspeed-universal")
    carry_out(conversion)
    small = [path for path, _ in conversion.target.finish({})]
    order = [task.object for task in conversion.plan.tasks] + small
    assert order[-1] == "latest_universal"
    for stage, needed in ((1, "mp_rank_00_model_states.pt"), (3, "zero_pp_rank_0_mp_rank_00_model_states.pt")):
        partial = tmp_path / f"partial-{stage}"
        loaded = half_written.run(target(case, stage=stage, world=1), tmp_path / "out", partial, order)
        by_tag = next(i for i, path in enumerate(order) if path.endswith(f"/{needed}"))
        assert loaded == {"tag": list(range(by_tag + 1, len(order) + 1)), "latest": [len(order)]}
        shutil.rmtree(partial)
