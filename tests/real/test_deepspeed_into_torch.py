"""`ucp.load` takes a DeepSpeed folder, as it is or converted, into torch: FSDP2, HSDP or plain, on any number of ranks.

State must equal the job's own truth bit for bit, each rank reads just its own bytes, and training goes on with the
losses of the DeepSpeed run that was never interrupted, up to the order of additions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.gloo import spawn
from tests.train import jobs
from ucp.run.convert import convert

DeepSpeedCase = Callable[[Case], Path]

MOVES: list[tuple[Any, ...]] = [
    ("z1_fp32_dp3_sgd", "fsdp", 2),
    ("z2_fp32_dp3_rr", "fsdp", 4),
    ("z3_fp32_dp4", "hsdp", 4),
    ("z3_fp32_dp4", "fsdp", 3, "universal"),
]
MORE_MOVES: list[tuple[Any, ...]] = [
    ("z1_fp32_dp2", "plain", 1),
    ("z1_fp32_dp2", "fsdp", 3),
    ("z3_fp32_dp4", "fsdp", 2),
]


@pytest.mark.parametrize(
    "move",
    [*MOVES, *(pytest.param(move, marks=pytest.mark.slow) for move in MORE_MOVES)],
    ids=lambda move: "-".join(map(str, move)),
)
def test_training_goes_on_under_torch(move: Any, deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    name, layout, world, *through = move
    folder = deepspeed_case(CASES[name])
    source = str(folder / "ckpt")
    if through:
        convert(source, str(tmp_path / "converted"), to=through[0])
        source = str(tmp_path / "converted")
    truth = load_file(folder / "truth.safetensors")
    record = json.loads((folder / "case.json").read_text())
    for result in spawn(jobs.go_on_from_deepspeed, world, source, CASES[name], layout, record["global_steps"]):
        for key, value in truth.items():
            kind, _, parameter = key.partition("/")
            if kind == "buffer":
                assert np.array_equal(result["buffers"][parameter], value.numpy())
            elif kind != "lowp":
                got = result["state"][f"param/{parameter}" if kind == "frozen" else key]
                assert got.dtype == value.numpy().dtype
                assert np.array_equal(got, value.numpy()), key
        assert result["hyper"] == [
            tuple(group["hyper"][key] for key in ("lr", "weight_decay", "initial_lr")) for group in record["groups"]
        ]
        assert result["losses"] == pytest.approx(record["losses_after"], rel=1e-5)
        counted, told, needed = result["bytes"]
        assert counted == told == needed, "the job reads each byte once"


@pytest.mark.parametrize("name", ["z1_bf16_dp4", "z3_bf16_dp2"])
def test_masters_round_to_the_working_copy_of_the_job(name: str, deepspeed_case: DeepSpeedCase) -> None:
    folder = deepspeed_case(CASES[name])
    truth = load_file(folder / "truth.safetensors")
    for result in spawn(jobs.bfloat16_from_deepspeed, 3, str(folder / "ckpt"), CASES[name]):
        for parameter, bits in result.items():
            key = f"lowp/{parameter}" if f"lowp/{parameter}" in truth else f"frozen/{parameter}"
            assert np.array_equal(bits, truth[key].to(torch.bfloat16).view(torch.int16).numpy()), key
