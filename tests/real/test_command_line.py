"""The command line on checkpoints that real DeepSpeed wrote, from the first look to the equal result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cases import CASES

KINDS = {"param": "parameter", "frozen": "frozen", "buffer": "buffer"}
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.argv[0] = "ucp"
from ucp.cli import main
try:
    main()
finally:
    print("loaded:", *[name for name in ("torch", "zarr", "deepspeed") if name in sys.modules], file=sys.stderr)
"""


def ucp(*arguments: object, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program on its own; its last line on stderr says what it loaded."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UCP_")}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**environment, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done


def document(*arguments: object, exit_code: int = 0) -> dict:
    return json.loads(ucp(*arguments, "--json", exit_code=exit_code).stdout)


@pytest.fixture(scope="module", params=[pytest.param("z2_fp16_dp2", marks=pytest.mark.slow), "z3_bf16_dp2"])
def source(request, deepspeed_case) -> Path:
    return deepspeed_case(CASES[request.param])


@pytest.fixture(scope="module")
def truth(source) -> Mapping[str, torch.Tensor]:
    return load_file(source / "truth.safetensors")


@pytest.fixture(scope="module")
def universal(source, tmp_path_factory) -> Path:
    there = tmp_path_factory.mktemp("universal") / "checkpoint"
    report = document("convert", source / "ckpt", there)
    assert not report["already_done"]
    return there


@pytest.mark.parametrize("command", ["info", "ls", "tree", "state", "show", "plan"])
def test_looking_loads_nothing_heavy(source, universal, command, tmp_path) -> None:
    more = {"show": ["embed.weight", "--stats"], "plan": [tmp_path / "new"]}.get(command, [])
    for url in (source / "ckpt", universal):
        done = ucp(command, url, *more)
        assert done.stdout
        assert done.stderr.splitlines()[-1] == "loaded:"


def test_info_and_ls_know_every_tensor(source, universal, truth) -> None:
    case = json.loads((source / "case.json").read_text())
    for url in (source / "ckpt", universal):
        facts = document("info", url)
        assert (facts["step"], facts["complete"]) == (case["global_steps"], True)
        assert facts["mesh"]["dp"] == case["layout"]["dp"]
        assert facts["ties"] == {"head.weight": "embed.weight"}
        rows = {row["name"]: row for row in document("ls", url)["tensors"]}
        assert {name: (row["kind"], row["shape"]) for name, row in rows.items()} == {
            key.partition("/")[2]: (KINDS[key.partition("/")[0]], list(tensor.shape))
            for key, tensor in truth.items()
            if key.partition("/")[0] in KINDS
        }


def test_stats_are_those_of_the_true_state(universal, source, truth) -> None:
    for state, kind in (("value", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        array = truth[f"{kind}/blocks.1.qkv.weight"].double().numpy()
        for url in (source / "ckpt", universal):
            found = document("show", url, "blocks.1.qkv.weight", "--stats")["stats"][state]
            assert (found["min"], found["max"]) == (array.min(), array.max())
            assert found["mean"] == pytest.approx(array.mean(), rel=1e-9)


def test_the_result_is_whole_equal_and_made_once(source, universal) -> None:
    deep = document("verify", universal, "--deep", "--against", source / "ckpt", "--training-state")
    assert deep["ok"]
    assert deep["checksums"] > 0
    assert document("convert", source / "ckpt", universal)["already_done"]
    assert document("verify", source / "ckpt", "--deep")["ok"]


def test_processes_write_the_same_bytes_as_threads(source, universal, tmp_path) -> None:
    ucp("convert", source / "ckpt", tmp_path / "again", "--processes", "--workers", "2")
    for path in sorted(universal.glob("tensors/**/c/**/*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(universal)).read_bytes()


def test_deepspeeds_universal_form_holds_the_same(source, tmp_path) -> None:
    ucp("convert", source / "ckpt", tmp_path / "new", "--to", "deepspeed-universal")
    assert document("verify", source / "ckpt", "--against", tmp_path / "new")["ok"]


@pytest.fixture
def copy(source, tmp_path) -> Path:
    shutil.copytree(source / "ckpt", tmp_path / "copy")
    return tmp_path / "copy"


def optimizer_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*/*_optim_states.pt"))


def test_a_flipped_bit_is_found_by_verify_and_by_convert(copy, tmp_path) -> None:
    first = next(f for f in document("show", copy, "norm.weight")["fragments"] if f["state"] == "exp_avg")
    path = copy / first["object"]
    data = bytearray(path.read_bytes())
    data[first["offset"]] ^= 1
    path.write_bytes(data)
    found = document("verify", copy, "--deep", exit_code=6)["findings"]
    assert [(f["kind"], f["where"]) for f in found] == [("checksum", first["object"])]
    failed = ucp("convert", copy, tmp_path / "new", exit_code=6)
    assert f"{first['object']}: bytes" in failed.stderr
    assert ucp("info", tmp_path / "new", exit_code=3).stdout == ""


def test_a_missing_rank_and_a_truncated_file(copy) -> None:
    path = optimizer_file(copy)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert path.name in ucp("info", copy, exit_code=6).stderr
    path.unlink()
    error = document("info", copy, exit_code=3)["error"]
    assert path.name in error["message"]
    assert error["hint"]
