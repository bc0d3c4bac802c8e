"""Stock DeepSpeed resumes from native folders of other stages and other numbers of ranks, and cannot tell.

Each run is a real DeepSpeed job with `load_checkpoint` alone, whose model starts from other weights than the source's.
State after loading must equal the source's bit for bit, and the losses that follow those of the run that was never
interrupted, up to the order in which floating-point numbers are added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.real.test_deepspeed_resume import BF16_OPTIMIZER, READ_OPTIONS, TOLERANCE, Move, problems
from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.deepspeed_job import read_result
from tests.support.deepspeed_resume import Resume, resume, target
from tests.support.fsdp_lm import train_and_save
from tests.support.gloo import spawn
from ucp.run.convert import convert

DeepSpeedCases = Callable[[Iterable[Case]], dict[str, Path]]
ROUND_ROBIN = {"round_robin": True}


@dataclasses.dataclass(frozen=True)
class Native(Move):
    """A move through a native folder; `through` is a form that the source is converted to first."""

    through: str | None = None

    @property
    def folder(self) -> str:
        return str(self).replace(">", "")


# Grouped so that DeepSpeed is imported once for each group.
MOVES = {
    "same and other layouts": [
        Native("z2_bf16_dp3", 2, 3, exact=True),
        Native("z1_fp32_dp2", 2, 3),
        Native("z3_fp32_dp2", 1, 4),
        Native("z2_bf16_dp4_rr", 2, 3, ROUND_ROBIN),
        Native("z3_bf16_dp3_subgroup", 3, 2),
    ],
}
MORE_MOVES = {
    "same layout": [
        Native("z1_fp32_dp2", 1, 2, exact=True),
        Native("z3_fp32_dp4", 3, 4, exact=True),
        Native("z2_bf16_dp3", 3, 3, through="universal"),
    ],
    "from 1": [
        Native("z1_bf16_dp4", 1, 2),
        Native("z1_bf16_dp4", 3, 2),
        Native("z1_fp16_dp3", 2, 2),
        Native("z1_fp16_dp3", 3, 4),
        Native("z1_bf16_dp3_rr", 1, 4, ROUND_ROBIN),
        Native("z1_bf16_dp3_rr", 3, 2),
        Native("z1_bf16_dp3_aligned", 1, 2, {"parameter_alignment": True}),
        Native("z1_bf16_dp3_aligned", 2, 4),
        Native("z1_bf16_dp2_fused", 3, 2),
    ],
    "from BF16_Optimizer": [
        Native("z1_bf16opt_dp2", 1, 2, BF16_OPTIMIZER, exact=True),
        Native("z1_bf16opt_dp3", 1, 4, BF16_OPTIMIZER),
        Native("z1_bf16opt_dp3", 2, 2),
    ],
    "from 2": [
        Native("z2_fp32_dp3_rr", 2, 4, ROUND_ROBIN),
        Native("z2_fp32_dp4_aligned_rr", 2, 3, {**ROUND_ROBIN, "parameter_alignment": True}),
        Native("z2_fp32_dp2_unused", 3, 2),
        Native("z2_fp16_dp2", 3, 3),
        Native("z2_bf16_dp2_lion", 3, 3),
    ],
    "from 3": [
        Native("z3_bf16_dp2", 2, 3),
        Native("z3_fp16_dp3", 1, 2),
        Native("z3_fp16_dp3", 3, 1),
        Native("z3_bf16_dp3_subgroup", 3, 4, {"sub_group_size": 1000}),
        Native("z3_bf16_dp2_gather16", 3, 4, through="deepspeed-universal"),
        Native("z3_fp32_dp3_sgd", 3, 2),
        Native("z3_fp32_dp3_sgd", 1, 2, through="universal"),
    ],
    "from 0": [
        Native("z0_fp32_dp2", 1, 2),
        Native("z0_fp32_dp2", 3, 3),
    ],
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_stock_deepspeed_resumes(moves: list[Native], deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    check_moves(moves, deepspeed_cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moves", MORE_MOVES.values(), ids=MORE_MOVES)
def test_stock_deepspeed_resumes_from_everything(
    moves: list[Native], deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    check_moves(moves, deepspeed_cases, tmp_path)


def check_moves(moves: list[Native], deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    folders = deepspeed_cases({move.source: CASES[move.source] for move in moves}.values())
    for move in moves:
        write(move, folders[move.source] / "ckpt", tmp_path)
    resumed = resume([request(move, tmp_path / move.folder) for move in moves], tmp_path / "resumed")
    wrong = {str(move): problems(move, folders[move.source], found) for move, found in zip(moves, resumed, strict=True)}
    assert not {move: found for move, found in wrong.items() if found}


def write(move: Native, source: Path, folder: Path) -> None:
    """The native folder of `move`, for exactly the job that will load it."""
    options: Any = READ_OPTIONS.get(move.source)
    if move.through is not None:
        convert(str(source), str(folder / f"{move.folder}-between"), to=move.through, read_options=options)
        source, options = folder / f"{move.folder}-between", None
    case = move.case
    told: dict[str, Any] = {"stage": case.stage, "round_robin": case.round_robin, "mesh": {"dp": move.world}}
    told["bf16_optimizer"] = case.grad_accum_fp32
    if case.sub_group_size is not None:
        told["sub_group_size"] = case.sub_group_size
    convert(str(source), str(folder / move.folder), to="deepspeed", read_options=options, **told)


def request(move: Native, root: Path) -> Resume:
    return Resume(case=move.case, root=str(root), universal=False, first_step=CASES[move.source].steps)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_deepspeed")
def test_deepspeed_goes_on_from_fsdp2(tmp_path: Path) -> None:
    """A job of torch's FSDP2 that saved with its distributed checkpoint goes on under DeepSpeed."""
    first, *_ = spawn(train_and_save, 2, str(tmp_path / "dcp"), 3, 3)
    case = target(CASES["z1_fp32_dp2"], scheduler=False)
    asked = []
    for stage, world, dtype in [(1, 3, "fp32"), (3, 2, "fp32"), (2, 2, "bf16"), (2, 2, "fp16"), (3, 2, "fp16")]:
        out = tmp_path / f"{stage}-{dtype}"
        convert(str(tmp_path / "dcp"), str(out), to="deepspeed", stage=stage, dtype=dtype, mesh={"dp": world})
        moved = case.replace(stage=stage, world=world, dtype=dtype)
        asked.append(Resume(case=moved, root=str(out), universal=False, first_step=3))
    exact, partitioned, *rounded = resume(asked, tmp_path / "resumed")
    for found in (exact, partitioned, *rounded):
        aside = ("lowp/", "buffer/", "frozen/")
        state = {key: value for key, value in found.state().items() if not key.startswith(aside)}
        assert state.keys() == {key for key in first["truth"] if not key.startswith(aside)}
        assert [key for key, value in state.items() if not np.array_equal(value.numpy(), first["truth"][key])] == []
        assert (found.record["global_steps"], set(found.record["steps"].values())) == (3, {3.0})
        assert found.record["lrs"] == [1e-2, 4e-3]
    assert [found.record["loss_scale"] for found in rounded] == [None, 2.0**8, 2.0**16]
    for found in (exact, partitioned):
        rest = {key: value for key, value in found.state().items() if key.startswith(("buffer/", "frozen/"))}
        assert rest
        assert all(np.array_equal(value.numpy(), first["truth"][key]) for key, value in rest.items())
        assert found.losses == pytest.approx(first["losses"], rel=TOLERANCE["fp32"])


@pytest.mark.slow
def test_weights_alone_are_loaded_without_an_optimizer(deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    """From a source without an optimizer, as Hugging Face's folders are, and whatever the job's groups."""
    name = "z2_fp32_dp2_unused"
    folder = deepspeed_cases([CASES[name]])[name]
    truth = load_file(str(folder / "truth.safetensors"))
    values = [key for key in truth if key.startswith(("param/", "frozen/", "buffer/"))]
    (tmp_path / "weights").mkdir()
    weights = {key.partition("/")[2]: truth[key] for key in values}
    save_file(weights, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    # Weights do not tell what is frozen.
    case, asked = target(CASES[name], scheduler=False, frozen=False), []
    for stage, world in [(1, 2), (3, 3)]:
        convert(str(tmp_path / "weights"), str(tmp_path / str(stage)), to="deepspeed", stage=stage, mesh={"dp": world})
        moved = case.replace(stage=stage, world=world)
        root = str(tmp_path / str(stage))
        asked.append(Resume(case=moved, root=root, universal=False, first_step=3, steps=1, weights_only=True))
    first = read_result(folder)["losses_after"][0]
    for found in resume(asked, tmp_path / "resumed"):
        state = found.state()
        loaded = {key.partition("/")[2]: value for key, value in state.items() if key.startswith(("param/", "buffer/"))}
        assert loaded.keys() == weights.keys()
        assert [name for name, value in weights.items() if not torch.equal(loaded[name], value)] == []
        assert found.losses[0] == pytest.approx(first, rel=TOLERANCE["fp32"])
