"""Checkpoints of Trainer over real DeepSpeed as Hugging Face folders, set against the state of the running job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.converters.hf import made
from tests.real.conftest import DeepSpeedCase
from tests.support.cases import CASES
from tests.support.deepspeed_job import read_result
from ucp.errors import FitError
from ucp.run.convert import prepare

NAMES = ["trainer_z2_bf16_dp2", "trainer_z3_fp32_dp3"]


def opened(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint's folder, and values by name as the job had them."""
    truth = load_file(folder / "truth.safetensors")
    values = {key.partition("/")[2]: held for key, held in truth.items() if key.startswith(("param/", "frozen/"))}
    return folder / read_result(folder)["root"], values


def whole(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the head, which is tied."""
    return {**values, "lm_head.weight": values["model.embed_tokens.weight"]}


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_takes_the_masters(name: str, deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    source, truth = opened(deepspeed_case(CASES[name]))
    conversion = prepare(str(source), str(tmp_path / "written"), to="hf")
    (left,) = [note for note in conversion.target.notes if note.startswith("left out")]
    assert "exp_avg exp_avg_sq" in left
    assert "lr_scheduler" in left or "around" in left
    written = made.to_hf(source, tmp_path / "written")
    model, told = transformers.LlamaForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    assert "lm_head.weight" not in made.on_disk(written)
    masters = {name: held.float() for name, held in whole(truth).items()}
    found = {name: held.float() for name, held in model.state_dict().items()}
    assert made.same(found, masters)
    assert json.loads((written / "config.json").read_text())["model_type"] == "llama"


def test_rounded_they_are_the_working_copies(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    folder = deepspeed_case(CASES[NAMES[0]])
    source, truth = opened(folder)
    with pytest.raises(FitError):
        prepare(str(source), str(tmp_path / "written"), to="hf", dtype="bfloat16")
    written = made.to_hf(source, tmp_path / "written", dtype="bfloat16", lossy=True)
    copies = {
        key.partition("/")[2]: held
        for key, held in load_file(folder / "truth.safetensors").items()
        if key.startswith("lowp/")
    }
    found = made.on_disk(written)
    trained = {name: held for name, held in found.items() if name in copies}
    assert made.same(trained, {name: held.bfloat16() for name, held in copies.items() if name in found})
    assert trained.keys() | {name for name in truth if name not in copies} == found.keys()
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
