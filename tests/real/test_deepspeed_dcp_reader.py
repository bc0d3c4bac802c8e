"""A stock torch job that resumes with ``dcp.load`` goes on from a DeepSpeed folder as it is, through ucp's reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.converters.dcp import write_jobs
from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.gloo import spawn


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(("z1_fp32_dp2", "plain", 1), marks=pytest.mark.slow),
        ("z2_fp32_dp3_rr", "fsdp", 2),
        pytest.param(("z3_fp32_dp4", "hsdp", 4), marks=pytest.mark.slow),
    ],
    ids=lambda move: "-".join(map(str, move)),
)
def test_training_goes_on(move: tuple[str, str, int], deepspeed_case: Callable[[Case], Path]) -> None:
    name, layout, world = move
    folder = deepspeed_case(CASES[name])
    truth = load_file(folder / "truth.safetensors")
    record = json.loads((folder / "case.json").read_text())
    run = (str(folder / "ckpt"), CASES[name], layout, record["global_steps"], True)
    for result in spawn(write_jobs.go_on_from_deepspeed, world, *run):
        for key, value in truth.items():
            kind, _, parameter = key.partition("/")
            if kind != "lowp":
                got = result["state"][parameter if kind in ("param", "frozen", "buffer") else key]
                assert got.dtype == value.numpy().dtype
                assert np.array_equal(got, value.numpy()), key
        assert result["hyper"] == [
            tuple(group["hyper"][key] for key in ("lr", "weight_decay", "initial_lr")) for group in record["groups"]
        ]
        assert result["losses"] == pytest.approx(record["losses_after"], rel=1e-5)
