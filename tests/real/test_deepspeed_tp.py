"""Tensor-parallel checkpoints that real DeepSpeed writes here and now: AutoTP, and Megatron's layers in a pipeline."""

from __future__ import annotations

import contextlib
import enum
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.support.deepspeed_job import job_environment
from tests.support.tp.cached import TpFolder, tp_folder  # noqa: F401
from tests.support.tp.case import CASES, QUICK
from tests.support.tp.compare import differences, record, truth
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError
from ucp.lang import format_program, from_json, parse
from ucp.run.convert import prepare

READABLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, case in CASES.items()
    if case.launcher == "autotp" or case.info is not None
]


class Folders:
    """Folders of cases by name, made when they are asked for."""

    def __init__(self, make: TpFolder) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Path:
        return self._make(name)


@pytest.fixture(scope="session")
def folders(tp_folder: TpFolder) -> Folders:  # noqa: F811
    return Folders(tp_folder)


@pytest.mark.parametrize("name", READABLE)
def test_every_state_equals_the_jobs_own(name: str, folders: Folders) -> None:
    case, folder = CASES[name], folders[name]
    with ucp.open(str(folder / "ckpt")) as checkpoint:
        assert differences(checkpoint, truth(folder)) == []
        told = record(folder)
        mesh = checkpoint.catalog.source.mesh
        assert [mesh[axis] for axis in ("pp", "tp", "dp")] == [case.pp, case.tp, case.dp]
        assert checkpoint.catalog.step == told["global_steps"]
        assert {n: checkpoint[n].scalars["step"] for n in told["steps"]} == told["steps"]
        groups = [(sorted(group.params), group.options["lr"]) for group in checkpoint.param_groups]
        assert groups == [(sorted(group["names"]), group["hyper"]["lr"]) for group in told["groups"]]
        if 0 < case.stage < 3:
            trained = {tensor.name for tensor in checkpoint.catalog.tensors.values() if tensor.kind == "parameter"}
            assert checkpoint.catalog.witnesses.keys() == trained


def test_the_program_is_kept_and_short(folders: Folders) -> None:
    with ucp.open(str(folders["megatron_z1_fp32_pp2tp2dp1"] / "ckpt")) as checkpoint:
        kept = checkpoint.catalog.program
        assert kept is not None
        program = format_program(from_json(dict(kept.ast)))
    assert re.search(r"\{l\}\.mlp\.dense_h_to_4h\.weight +\[2 rows20/tp, cols24\]\s+<->", program)
    assert re.search(r"\{l\}\.self_attention\.dense\.weight +\[rows24, cols24/tp\]\s+<->", program)
    assert "[(rows70 + _)/tp, cols24]" in program
    assert len(program.splitlines()) < 40


@pytest.mark.parametrize("name", ["autotp_z1_fp32_tp2dp1_phi3", "megatron_z1_bf16_pp2tp2dp2"])
@pytest.mark.parametrize("to", ["universal", "deepspeed-universal"])
def test_what_is_converted_holds_whole_tensors(name: str, to: str, folders: Folders, tmp_path: Path) -> None:
    ucp.convert(str(folders[name] / "ckpt"), str(tmp_path / "out"), to=to)
    with ucp.open(str(tmp_path / "out")) as checkpoint:
        assert differences(checkpoint, truth(folders[name])) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["autotp_z2_fp32_tp2dp2_uneven", "autotp_z3_bf16_tp2dp2", "megatron_z1_fp32_pp2tp2dp2"]
)
def test_it_is_what_deepspeeds_own_converter_makes(name: str, folders: Folders, tmp_path: Path) -> None:
    stock = tmp_path / "stock" / "global_step2_universal"
    ds_to_universal(folders[name] / "ckpt" / CASES[name].tag, stock)
    compared = 0
    with ucp.open(str(folders[name] / "ckpt")) as checkpoint, ucp.open(str(stock)) as other:
        assert other.catalog.tensors.keys() == checkpoint.catalog.tensors.keys()
        for tensor in checkpoint.catalog.tensors.values():
            for state in tensor.states:
                file = stock / "zero" / tensor.name / f"{'fp32' if state == 'value' else state}.pt"
                saved = torch.load(file)["param"]
                assert torch.equal(saved, checkpoint[tensor.name][state][...]), (tensor.name, state)
                # Its folder, with the pieces' shapes in its model files, is a source like any other.
                assert torch.equal(saved, other[tensor.name][state][...]), (tensor.name, state)
                compared += 1
        groups = [sorted(group.params) for group in checkpoint.param_groups]
        assert [sorted(group.params) for group in other.param_groups] == groups
    assert compared > 60


def ds_to_universal(source: Path, destination: Path) -> None:
    destination.parent.mkdir()
    options = ["--input_folder", str(source), "--output_folder", str(destination), "--num_extract_workers", "1"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options, "--num_merge_workers", "1"],
        env=job_environment(),
        check=True,
        capture_output=True,
        timeout=240,
    )


# What is wrong with a folder is said, and no number comes of it.

AUTOTP, MEGATRON = "autotp_z1_bf16_tp2dp2_tied", "megatron_z1_bf16_pp2tp2dp2"


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a case's tag folder, to be damaged."""

    def make(name: str) -> Path:
        shutil.copytree(folders[name] / "ckpt" / CASES[name].tag, tmp_path / "damaged")
        return tmp_path / "damaged"

    return make


NAMED = (
    "runtime.fp16.loss_scaler.LossScaler",
    "utils.tensor_fragment.fragment_address",
    "runtime.zero.config.ZeroStageEnum",
)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Classes under the names that DeepSpeed's files refer to, whatever other tests imported as deepspeed."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "deepspeed"}
    for name in before:
        del sys.modules[name]
    for path in NAMED:
        module, _, name = f"deepspeed.{path}".rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        stages = {f"stage{number}": number for number in range(4)}
        made = (
            enum.IntEnum(name, stages, module=module)
            if name.endswith("Enum")
            else type(name, (), {"__module__": module})
        )
        setattr(sys.modules[module], name, made)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update(before)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change what a file of DeepSpeed's holds."""
    with stand_ins():
        root = torch.load(path, weights_only=False)
        change(root)
        torch.save(root, path)


def test_without_metadata_the_error_says_what_to_give(folders: Folders) -> None:
    folder = folders["megatron_z1_fp32_pp2tp2dp1_silent"] / "ckpt"
    with pytest.raises(FitError, match="no universal_checkpoint_info") as caught:
        ucp.open(str(folder))
    assert "program=" in str(caught.value.hint)
    assert "--spec" in str(caught.value.hint)


SPEC = """\
format 1
mesh tp
size vocab = 70
size hidden inner qkv ffn
0.word_embeddings.weight      [(vocab + _)/tp, hidden] <-> embed.weight [vocab, hidden]
0.position_embeddings.weight  <-> positions.weight
5.lm_head.weight              [(vocab + _)/tp, hidden] <-> head.weight [vocab, hidden]
4.weight <-> norm.weight
4.bias   <-> norm.bias
in {l} <-> {l} {
  input_layernorm.weight           <-> input_layernorm.weight
  input_layernorm.bias             <-> input_layernorm.bias
  post_attention_layernorm.weight  <-> post_attention_layernorm.weight
  post_attention_layernorm.bias    <-> post_attention_layernorm.bias
  self_attention.query_key_value.weight [qkv/tp, hidden] <-> qkv.weight [qkv, hidden]
  self_attention.query_key_value.bias   [qkv/tp]         <-> qkv.bias [qkv]
  self_attention.dense.weight [hidden, inner/tp] <-> out.weight [hidden, inner]
  self_attention.dense.bias   [hidden]           <-> out.bias [hidden]
  mlp.dense_h_to_4h.weight [ffn/tp + ffn/tp, hidden] <-> gate.weight [ffn, hidden], up.weight [ffn, hidden]
  mlp.dense_4h_to_h.weight [hidden, ffn/tp]          <-> down.weight [hidden, ffn]
  mlp.dense_4h_to_h.bias   [hidden]                  <-> down.bias [hidden]
}
state * : like param
"""


def test_without_metadata_a_program_tells(folders: Folders) -> None:
    folder = folders["megatron_z1_fp32_pp2tp2dp1_silent"]
    expected = truth(folder)
    with ucp.open(str(folder / "ckpt"), program=parse(SPEC)) as checkpoint:
        for state, kind in (("value", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            assert torch.equal(checkpoint["head.weight"][state][...], expected[f"{kind}/5.lm_head.weight"])
            for layer in (1, 2, 3):
                fused = expected[f"{kind}/{layer}.mlp.dense_h_to_4h.weight"]
                gate, up = (checkpoint[f"{layer}.{name}.weight"][state][...] for name in ("gate", "up"))
                assert torch.equal(torch.cat([gate, up]), fused)
                down = checkpoint[f"{layer}.down.weight"][state][...]
                assert torch.equal(down, expected[f"{kind}/{layer}.mlp.dense_4h_to_h.weight"])


def test_a_folder_without_metadata_says_that_it_is_for_jobs_of_degree_1(folders: Folders, tmp_path: Path) -> None:
    folder = folders["megatron_z1_fp32_pp2tp2dp1_silent"] / "ckpt"
    conversion = prepare(str(folder), str(tmp_path / "out"), to="deepspeed-universal", program=parse(SPEC))
    assert any("resume without tensor parallelism" in note for note in conversion.target.notes)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (AUTOTP, "mp_rank_01_model_states.pt"),
        (AUTOTP, "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"),
        (MEGATRON, "mp_rank_03_model_states.pt"),
        (MEGATRON, "bf16_zero_pp_rank_0_mp_rank_02_optim_states.pt"),
        (MEGATRON, "layer_02-model_01-model_states.pt"),
    ],
)
def test_a_missing_file_of_a_rank(name: str, file: str, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    (folder / file).unlink()
    with pytest.raises(NotFoundError, match=re.escape(file)):
        ucp.open(str(folder))


def test_all_files_of_the_last_rank_missing(copy: Callable[[str], Path]) -> None:
    folder = copy(AUTOTP)
    for path in folder.glob("*mp_rank_01*"):
        path.unlink()
    with pytest.raises(
        NotFoundError, match=r"mp_rank_01_model_states.pt: missing; the job had 2 tensor-parallel ranks"
    ):
        ucp.open(str(folder))


def convert(folder: Path, out: Path) -> None:
    ucp.convert(str(folder), str(out))


@pytest.mark.parametrize("name", [AUTOTP, MEGATRON])
def test_optimizer_files_of_two_ranks_swapped(name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    """All shapes fit; the low-precision copies in the model files do not."""
    folder = copy(name)
    one, other = (folder / f"bf16_zero_pp_rank_0_mp_rank_0{rank}_optim_states.pt" for rank in (0, 1))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(ConflictError, match=r"not what its bfloat16 copy in \S+ holds"):
        convert(folder, tmp_path / "out")


def test_model_files_of_two_ranks_swapped(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(AUTOTP)
    one, other = (folder / f"mp_rank_0{rank}_model_states.pt" for rank in (0, 1))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(ConflictError, match=r"not what its bfloat16 copy in \S+ holds"):
        convert(folder, tmp_path / "out")


def test_a_replicated_norm_that_differs_names_both_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(AUTOTP)
    file = folder / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"

    def nudge(root: Any) -> None:
        states = root["optimizer_state_dict"]["base_optimizer_state"]["state"]
        states[1]["exp_avg"][3] += 1

    edit(file, nudge)
    with pytest.raises(ConflictError, match=r"layernorm.*exp_avg|exp_avg.*layernorm") as caught:
        convert(folder, tmp_path / "out")
    assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" in str(caught.value)
    assert file.name in str(caught.value)
    with ucp.open(folder) as checkpoint:
        target = {name: {"exp_avg": torch.empty(tensor.shape)} for name, tensor in checkpoint.items()}
    with pytest.raises(
        ConflictError, match=r"layernorm.*exp_avg.*the replica in \S+mp_rank_01\S+ differs from \S+mp_rank_00"
    ):
        ucp.load(target, folder, strict=False)
    ucp.load(target, folder, strict=False, verify=False)


def test_ranks_of_different_steps(copy: Callable[[str], Path]) -> None:
    folder = copy(MEGATRON)

    def later(root: Any) -> None:
        for state in root["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["step"] += 1

    for dp in (0, 1):
        for mp in (1, 3):
            edit(folder / f"bf16_zero_pp_rank_{dp}_mp_rank_0{mp}_optim_states.pt", later)
    with pytest.raises(ConflictError, match=r"step is 2.0 .* but 3.0"):
        ucp.open(str(folder))


def test_hyper_parameters_of_ranks_differ(copy: Callable[[str], Path]) -> None:
    folder = copy(MEGATRON)

    def other_rate(root: Any) -> None:
        root["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 0.5

    edit(folder / "bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt", other_rate)
    with pytest.raises(ConflictError, match=r"mp_rank_03.* differ in hyper-parameters"):
        ucp.open(str(folder))


def metadata(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``universal_checkpoint_info`` in every model file."""
    for path in folder.glob("mp_rank_*_model_states.pt"):
        edit(path, lambda root: change(root["universal_checkpoint_info"]))


def test_ranks_that_say_different_things_of_their_cuts(copy: Callable[[str], Path]) -> None:
    """What all have in common would join a weight along the wrong dim."""
    folder = copy(MEGATRON)

    def other_list(root: Any) -> None:
        root["universal_checkpoint_info"]["parameter_with_row_parallelism_patterns"].pop()

    edit(folder / "mp_rank_03_model_states.pt", other_list)
    with pytest.raises(FitError, match="universal_checkpoint_info is not the same on all ranks"):
        ucp.open(str(folder))


def test_a_pattern_that_matches_nothing(copy: Callable[[str], Path], folders: Folders) -> None:
    folder = copy(MEGATRON)
    metadata(folder, lambda info: info["tp_replicated_parameter_patterns"].append("old_name"))
    with pytest.raises(FitError, match=r"1 patterns .* 'old_name'"):
        ucp.open(str(folder))
    with ucp.open(str(folder), strict=False) as checkpoint:
        assert differences(checkpoint, truth(folders[MEGATRON])) == []
        assert any("old_name" in note for note in checkpoint.notes)


def test_a_norm_that_no_pattern_names_is_remarked(copy: Callable[[str], Path]) -> None:
    folder = copy(MEGATRON)
    metadata(folder, lambda info: info["tp_replicated_parameter_patterns"].remove(r"\d+.input_layernorm.weight"))
    with ucp.open(str(folder)) as checkpoint:
        assert checkpoint["1.input_layernorm.weight"].shape == (48,)
        (note,) = [note for note in checkpoint.notes if "input_layernorm.weight and 2 more" in note]
        assert "begin alike on all ranks" in note


@pytest.mark.parametrize("pattern", [r"(.*a)*b(.*a)*c", r"((\d+)*)*\.x$", "(" * 3000])
def test_hostile_patterns_do_not_hang(pattern: str, copy: Callable[[str], Path]) -> None:
    folder = copy(MEGATRON)
    metadata(folder, lambda info: info["tp_replicated_parameter_patterns"].append(pattern))
    start = time.monotonic()
    with pytest.raises(FitError, match="pattern"):
        ucp.open(str(folder))
    assert time.monotonic() - start < 10


def test_metadata_that_contradicts_the_shapes(copy: Callable[[str], Path]) -> None:
    folder = copy(MEGATRON)
    metadata(folder, lambda info: info.update(original_vocab_size=700))
    with pytest.raises(CorruptError, match="72 rows for a vocabulary of 700"):
        ucp.open(str(folder))
