"""Stock tensor-parallel jobs of DeepSpeed resume from native folders, cut as the source's own metadata says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.real.test_deepspeed_tp_resume import OTHER_SEED, degrees, differences
from tests.support.tp.cached import TpFolder, tp_folder  # noqa: F401
from tests.support.tp.case import CASES
from tests.support.tp.job import run_resumes
from ucp.errors import FitError
from ucp.run.convert import convert, prepare

MOVES: dict[str, list[dict[str, Any]]] = {
    "autotp_z1_bf16_tp2dp2_tied": [degrees(1, 2, 1, stage=2), degrees(1, 1, 2)],
    "autotp_z1_fp32_tp2dp1": [degrees(1, 2, 2, stage=2), degrees(1, 1, 3, stage=3), degrees(1, 2, 1, stage=3)],
    "autotp_z3_bf16_tp2dp2": [degrees(1, 2, 1, stage=1), degrees(1, 2, 2, stage=3), degrees(1, 1, 2, stage=2)],
    "autotp_z2_fp32_tp2dp2_frozen": [degrees(1, 2, 1, stage=3), degrees(1, 2, 2, stage=1)],
    "autotp_z2_fp32_tp2dp2_uneven": [degrees(1, 1, 2, stage=1)],
    "autotp_z1_fp32_tp2dp1_phi3": [degrees(1, 1, 2, stage=2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("source", MOVES)
def test_stock_tensor_parallel_jobs_resume(source: str, tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    folder, cases = tp_folder(source), []
    for number, move in enumerate(MOVES[source]):
        case = CASES[source].replace(seed=OTHER_SEED, **move)
        out = tmp_path / str(number)
        convert(str(folder / "ckpt"), str(out), to="deepspeed", stage=case.stage, mesh={"tp": case.tp, "dp": case.dp})
        cases.append((case, out))
    found = run_resumes(cases, tmp_path / "resumed", universal=False)
    problems = {str(move): differences(folder, out) for move, out in zip(MOVES[source], found, strict=True)}
    assert not {move: wrong for move, wrong in problems.items() if wrong}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "says"),
    [("autotp_z2_fp32_tp2dp2_uneven", "cannot cut evenly"), ("autotp_z1_fp32_tp2dp1_phi3", "does not say which")],
)
def test_cuts_that_are_not_told_are_refused(source: str, says: str, tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(FitError, match=says):
        prepare(str(tp_folder(source) / "ckpt"), str(tmp_path / "out"), to="deepspeed", mesh={"tp": 2, "dp": 1})
