"""Stock DeepSpeed resumes tensor-parallel checkpoints at other degrees, from the folders that ucp writes.

Every job starts from other weights than the source, so whatever was not loaded shows. State after loading must equal
the source's bit for bit, and losses those of the run that was never interrupted, up to the order of additions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tp.cached import TpFolder, tp_folder  # noqa: F401
from tests.support.tp.case import CASES
from tests.support.tp.compare import record, truth, unpadded
from tests.support.tp.job import run_loads, run_resumes
from ucp.run.convert import carry_out, prepare

FINISH = "ucp.converters.deepspeed_universal:finish_load"
OTHER_SEED = 4242
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}


def degrees(pp: int, tp: int, dp: int, **more: Any) -> dict[str, Any]:
    return {"pp": pp, "tp": tp, "dp": dp, **more}


MOVES: dict[str, list[dict[str, Any]]] = {
    "autotp_z1_bf16_tp2dp2_tied": [degrees(1, 1, 2)],
    "megatron_z1_fp32_pp2tp2dp1": [degrees(1, 1, 2)],
}
MORE_MOVES: dict[str, list[dict[str, Any]]] = {
    "autotp_z1_fp32_tp2dp1": [degrees(1, 1, 1), degrees(1, 2, 2), degrees(1, 2, 1, stage=3), degrees(1, 2, 1)],
    "autotp_z1_bf16_tp2dp2_tied": [degrees(1, 2, 1, stage=2)],
    "autotp_z2_fp32_tp2dp2_uneven": [degrees(1, 1, 2, stage=1), degrees(1, 2, 1), degrees(1, 2, 2, stage=3)],
    "autotp_z3_bf16_tp2dp2": [degrees(1, 1, 2), degrees(1, 2, 1), degrees(1, 2, 2, stage=1)],
    "autotp_z1_fp32_tp2dp1_phi3": [degrees(1, 1, 2), degrees(1, 2, 2)],
    "autotp_z1_fp32_tp4dp1_empty": [degrees(1, 1, 1), degrees(1, 4, 1)],
    "autotp_z2_fp32_tp2dp2_frozen": [degrees(1, 1, 2), degrees(1, 2, 1), degrees(1, 2, 2, stage=3)],
    "autotp_z3_fp32_tp2dp2_frozen": [degrees(1, 1, 2), degrees(1, 2, 2), degrees(1, 2, 1, stage=1)],
    "megatron_z1_fp32_pp2tp2dp2": [degrees(1, 1, 2), degrees(2, 1, 2), degrees(1, 2, 4), degrees(1, 4, 1)],
    "megatron_z1_bf16_pp2tp2dp2": [degrees(1, 1, 2), degrees(1, 2, 4), degrees(2, 2, 2)],
    "megatron_z1_fp32_pp1tp2dp2_untied": [degrees(2, 1, 1), degrees(1, 4, 1), degrees(1, 2, 2)],
}


def test_stock_deepspeed_resumes_at_other_degrees(tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    check_moves([(source, move) for source, moves in MOVES.items() for move in moves], tp_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", MORE_MOVES)
def test_stock_deepspeed_resumes_at_all_degrees(source: str, tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    check_moves([(source, move) for move in MORE_MOVES[source]], tp_folder, tmp_path)


@pytest.mark.slow
def test_from_the_universal_form(tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    """How parameters are cut is known after a detour too."""
    source = "megatron_z1_fp32_pp2tp2dp1"
    carry_out(prepare(str(tp_folder(source) / "ckpt"), str(tmp_path / "form"), to="universal"))
    check_moves([(source, degrees(1, 4, 1))], tp_folder, tmp_path, root=tmp_path / "form")


@pytest.mark.slow
def test_one_model_file_for_each_rank_of_older_versions(tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    source, move = "megatron_z1_fp32_pp2tp2dp1", degrees(1, 2, 1)
    check_moves([(source, move)], tp_folder, tmp_path, mp="2")
    files = sorted(path.name for path in (tmp_path / source / "global_step2_universal").glob("*model_states.pt"))
    assert files == [
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_01_model_states.pt",
    ]


@pytest.mark.slow
def test_ucp_loads_into_other_degrees_by_the_sources_program(tp_folder: TpFolder, tmp_path: Path) -> None:  # noqa: F811
    source = "megatron_z1_fp32_pp2tp2dp1"
    moves = [degrees(1, 4, 1), degrees(2, 1, 1), degrees(2, 2, 1)]
    cases = [CASES[source].replace(seed=OTHER_SEED, **move) for move in moves]
    expected = truth(tp_folder(source))
    for found in run_loads([(case, tp_folder(source) / "ckpt") for case in cases], tmp_path / "loaded"):
        state = {key: unpadded(key, value) for key, value in load_file(str(found / "state.safetensors")).items()}
        assert [key for key, value in state.items() if not torch.equal(value, expected[key])] == []
        assert state.keys() == {key for key in expected if not key.startswith("lowp/")}
        assert json.loads((found / "case.json").read_text()) == {"rates": [0.004, 0.01]}


def check_moves(
    moves: list[tuple[str, dict[str, Any]]],
    folder: TpFolder,
    tmp_path: Path,
    *,
    root: Path | None = None,
    **options: Any,
) -> None:
    for source in dict.fromkeys(source for source, _ in moves):
        origin = str(root or folder(source) / "ckpt")
        carry_out(prepare(origin, str(tmp_path / source), to="deepspeed-universal", **options))
    cases = [(CASES[source].replace(seed=OTHER_SEED, **move), tmp_path / source) for source, move in moves]
    found = run_resumes(cases, tmp_path / "resumed", finish=FINISH)
    problems = {str(move): differences(folder(move[0]), out) for move, out in zip(moves, found, strict=True)}
    assert not {move: wrong for move, wrong in problems.items() if wrong}


def differences(folder: Path, resumed: Path) -> list[str]:
    """Everything in which the resumed job differs from the one that was not interrupted."""
    state = {key: unpadded(key, value) for key, value in load_file(str(resumed / "state.safetensors")).items()}
    wrong = [key for key, value in truth(folder).items() if key not in state or not torch.equal(value, state[key])]
    one, other = record(folder), record(resumed)
    wrong += [key for key in ("global_steps", "steps") if one[key] != other[key]]
    rates = [{name: g["hyper"] for g in told["groups"] for name in g["names"]} for told in (one, other)]
    wrong += ["hyper-parameters"] if rates[0] != rates[1] else []
    tolerance = TOLERANCE[one["case"]["dtype"]]
    pairs = zip(one["losses_after"], other["losses"], strict=True)
    return wrong + [f"loss {b} for {a}" for a, b in pairs if abs(a - b) > tolerance * a]
