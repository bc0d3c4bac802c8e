"""The files of native folders, key by key and byte by byte, against those that DeepSpeed wrote in the same layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.deepspeed_job import job_environment
from ucp.container.leaves import leaf_bytes
from ucp.container.torchfile import read_torch_file
from ucp.run.convert import carry_out, convert, prepare
from ucp.store import Store, open_store
from ucp.tree import Opaque, TensorLeaf, walk

DeepSpeedCases = Callable[[Iterable[Case]], dict[str, Path]]

# From a case to other layouts and back to its own.
ROUNDS = {
    "z1_fp32_dp2": [(3, 4)],
    "z1_fp16_dp3": [],
    "z1_bf16opt_dp2": [(2, 3)],
    "z2_bf16_dp3": [(1, 5), (3, 2)],
    "z2_bf16_dp4_rr": [(2, 3)],
    "z2_fp32_dp2_unused": [],
    "z3_fp32_dp4": [(1, 3)],
    "z3_fp16_dp3": [(2, 2)],
    "z3_bf16_dp3_subgroup": [(3, 7)],
    "z3_fp32_dp3_sgd": [(2, 8)],
}
# Left out so that jobs with and without the option load the file; which job wrote it says nothing to a loader.
OURS_ALONE = ("param_alignment_paddings", "ds_config")


@pytest.mark.parametrize("name", ["z1_fp32_dp2", "z2_bf16_dp3", "z3_fp32_dp4"])
def test_files_are_as_deepspeed_wrote_them(name: str, deepspeed_cases: DeepSpeedCases, tmp_path: Path) -> None:
    check_files(name, deepspeed_cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ROUNDS} - {"z1_fp32_dp2", "z2_bf16_dp3", "z3_fp32_dp4"}))
def test_files_of_every_kind_are_as_deepspeed_wrote_them(
    name: str, deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    check_files(name, deepspeed_cases, tmp_path)


def check_files(name: str, deepspeed_cases: DeepSpeedCases, folder: Path) -> None:
    case = CASES[name]
    source = deepspeed_cases([case])[name] / "ckpt"
    here = source
    for number, (stage, dp) in enumerate([*ROUNDS[name], (case.stage, case.world)]):
        told: dict[str, Any] = {"stage": stage, "mesh": {"dp": dp}}
        if number == len(ROUNDS[name]):
            told |= {"bf16_optimizer": case.grad_accum_fp32, "round_robin": case.round_robin}
        here, before = folder / str(number), here
        convert(str(before), str(here), to="deepspeed", **told)
    theirs, ours = open_store(str(source / case.tag)), open_store(str(here / case.tag))
    files = sorted(path for path in theirs.children() if path.endswith(".pt"))
    assert sorted(ours.children()) == files
    for path in files:
        expected, found = content(theirs, path, case), content(ours, path, case)
        assert found.keys() == expected.keys(), path
        wrong = {key: (found[key], value) for key, value in expected.items() if found[key] != value}
        assert not wrong, path
    assert (here / "latest").read_text() == case.tag


def content(store: Store, path: str, case: Case) -> dict[str, object]:
    """Everything in a file by its place: values, and of tensors dtype, shape and bytes but for what pads them."""
    root = read_torch_file(store, path).root
    state = root.get("optimizer_state_dict", {})
    # Where DeepSpeed's own is wrong, as told in docs/deepspeed.md.
    for key in (*OURS_ALONE, *(["param_slice_mappings"] if case.round_robin else [])):
        state.pop(key, None)
        root.pop(key, None)
    lengths = held_lengths(state, case)
    return {where: described(store, where, node, lengths) for where, node in walk(root)}


def described(store: Store, where: str, node: Any, lengths: dict[str, int]) -> object:
    if isinstance(node, TensorLeaf):
        data = leaf_bytes(store, node)
        cut = min((n for part, n in lengths.items() if where.startswith(part)), default=len(data))
        return (node.extent.dtype, node.extent.shape, data[:cut] if cut >= 0 else b"")
    if isinstance(node, Opaque):
        return node.path
    if isinstance(node, dict):
        ordered = where.startswith(("param_shapes", "optimizer_state_dict.param_slice_mappings"))
        return ("a dict of", [*map(str, node)] if ordered else sorted(map(str, node)))
    return (type(node).__name__, len(node)) if isinstance(node, list | tuple | set) else node


def held_lengths(state: dict[str, Any], case: Case) -> dict[str, int]:
    """How many bytes of the flat tensors are no padding; ZeRO 3 pads inside, with whatever was in memory."""
    if case.stage == 3:
        return {"optimizer_state_dict.": -1, "frozen_param_fragments.": -1}
    paddings = state.get("group_paddings", [])
    masters = state.get("single_partition_of_fp32_groups", [])
    lean = {} if case.grad_accum_fp32 else dict.fromkeys(range(len(paddings)), 0)
    held = [4 * (m.extent.size - lean.get(i, paddings[i])) for i, m in enumerate(masters)]
    states = {f"optimizer_state_dict.base_optimizer_state.state.{i}.exp_avg": n for i, n in enumerate(held)}
    return states | {f"optimizer_state_dict.single_partition_of_fp32_groups.{i}": n for i, n in enumerate(held)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left"), [("trainer_z2_bf16_dp2", {"training_args.bin"}), ("accelerate_z3_fp32_dp2", set())]
)
def test_files_around_a_tag_folder_come_along(
    name: str, left: set[str], deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    """What Trainer and Accelerate look for beside the tag: schedulers, random states, the trainer's state."""
    source = deepspeed_cases([CASES[name]])[name] / CASES[name].root
    conversion = prepare(str(source), str(tmp_path / "out"), to="deepspeed", stage=1, mesh={"dp": 3})
    carry_out(conversion)
    around = conversion.catalog.state["around"]
    assert isinstance(around, dict)
    found, ours = open_store(str(source)), open_store(str(tmp_path / "out"))
    assert around.keys() - {*ours.children()} == left
    assert any("training_args.bin" in note for note in conversion.target.notes) == bool(left)
    for path in sorted(around.keys() - left):
        if isinstance(around[path], bytes):
            assert ours.read(path) == found.read(path)
        else:
            whole = [{w: described(s, w, n, {}) for w, n in walk(read_torch_file(s, path).root)} for s in (found, ours)]
            assert whole[0] == whole[1]
            torch.load(tmp_path / "out" / path, weights_only=False)


ZERO_TO_FP32 = """
import sys
from safetensors.torch import save_file
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
save_file({n: t.clone() for n, t in get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]).items()}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage", "dp"), [("z3_fp32_dp4", 2, 3), ("z2_bf16_dp3", 3, 4)])
def test_deepspeeds_own_script_reads_the_folder(
    name: str, stage: int, dp: int, deepspeed_cases: DeepSpeedCases, tmp_path: Path
) -> None:
    """``zero_to_fp32.py`` gives the fp32 weights of a folder that no job has loaded."""
    folder = deepspeed_cases([CASES[name]])[name]
    convert(str(folder / "ckpt"), str(tmp_path / "out"), to="deepspeed", stage=stage, mesh={"dp": dp})
    result = tmp_path / "weights.safetensors"
    subprocess.run(
        [sys.executable, "-c", ZERO_TO_FP32, str(tmp_path / "out"), os.fspath(result)],
        env=job_environment(),
        check=True,
        capture_output=True,
        timeout=120,
    )
    weights = load_file(str(result))
    truth = dict(wanted(load_file(str(folder / "truth.safetensors"))))
    assert all(torch.equal(weights[key], value) for key, value in truth.items())
    assert set(weights) - set(truth) == {"head.weight"}


def wanted(truth: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What the script gives: trained and frozen parameters, and floating-point buffers as float32."""
    for key, value in truth.items():
        kind, _, name = key.partition("/")
        if kind in ("param", "frozen", "buffer"):
            yield name, value.float() if kind == "buffer" else value
