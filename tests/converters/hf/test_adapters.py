"""LoRA adapters of PEFT, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.converters.hf import made
from ucp.converter import read_sharded
from ucp.errors import CorruptError, FitError, UsageError
from ucp.run.convert import convert, prepare


def adapted(folder: Path, **options: Any) -> Any:
    """A Llama with an adapter, saved to `folder`."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=options.pop("saved", None))
    model = peft.get_peft_model(made.model("llama"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder, **options)
    return model.eval()


def same_model(folder: Path, model: Any) -> bool:
    """Whether PEFT makes the same model of `folder`, in parameters and in what it computes."""
    back = peft.PeftModel.from_pretrained(made.model("llama"), folder).eval()
    found, wanted = (peft.get_peft_model_state_dict(one) for one in (back, model))
    return made.same(found, wanted) and torch.equal(made.logits(back), made.logits(model))


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("through", [False, True])
def test_adapters_come_back(saved: list[str] | None, through: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = adapted(source, saved=saved)
    catalog, found = made.read(source)
    assert catalog.source.family == "hf"
    assert made.same(found, load_file(source / "adapter_model.safetensors"))
    if through:
        convert(str(source), str(tmp_path / "universal"), to="universal")
        source = tmp_path / "universal"
    written = made.to_hf(source, tmp_path / "written")
    theirs = tmp_path / "source"
    assert made.names(written) == made.names(theirs)
    assert (written / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    assert same_model(written, model)


def test_adapters_in_torch_files_come_back_as_safetensors(tmp_path: Path) -> None:
    model = adapted(tmp_path / "source", safe_serialization=False)
    assert (tmp_path / "source" / "adapter_model.bin").exists()
    written = made.to_hf(tmp_path / "source", tmp_path / "written")
    assert same_model(written, model)


def test_an_adapter_has_no_program_of_its_base(tmp_path: Path) -> None:
    adapted(tmp_path)
    made.model("llama").config.save_pretrained(tmp_path)
    assert read_sharded(str(tmp_path))[0].program is None


def test_an_adapter_may_be_rounded(tmp_path: Path) -> None:
    adapted(tmp_path / "source")
    with pytest.raises(FitError):
        prepare(str(tmp_path / "source"), str(tmp_path / "written"), to="hf", dtype="bfloat16")
    written = made.to_hf(tmp_path / "source", tmp_path / "written", dtype="bfloat16", lossy=True)
    source, found = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "source", written))
    assert made.same(found, {name: tensor.bfloat16() for name, tensor in source.items()})


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    adapted(tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").unlink()
    made.read(tmp_path / "source")
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        made.to_hf(tmp_path / "source", tmp_path / "written")
    adapted(tmp_path / "again")
    config = str(tmp_path / "again" / "adapter_config.json")
    written = made.to_hf(tmp_path / "source", tmp_path / "written", config=config)
    assert made.names(written) >= {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_whose_configuration_is_damaged(tmp_path: Path) -> None:
    adapted(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{]")
    with pytest.raises(CorruptError, match=r"adapter_config\.json"):
        made.read(tmp_path)
