"""Folders of others around DCP's: Accelerate, Trainer, Lightning.

The DCP in them is real. The files around it are those of Trainer and Lightning 2.5, EMULATED: neither runs FSDP without
an accelerator. What Accelerate itself writes is the layout ``accelerate`` of the test of layouts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ucp
from tests.support.dcp_alone import sample, save
from ucp.catalog import Catalog
from ucp.converter import find_converter, read_sharded
from ucp.errors import CorruptError, FitError, NotFoundError


@pytest.fixture
def accelerate(tmp_path: Path) -> Path:
    """``checkpoint-3`` of a Trainer that saved an FSDP model in pieces."""
    state, root = sample(), tmp_path / "checkpoint-3"
    save({"model": state["model"]}, root / "pytorch_model_fsdp_0")
    save({"optimizer": state["optim"]}, root / "optimizer_0")
    torch.save({"last_epoch": 3}, root / "scheduler.pt")
    (root / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 1.5}))
    return root


def read(folder: Path) -> Catalog:
    converter, store = find_converter(str(folder))
    assert converter.family == "dcp"
    return converter.read(store)


def test_model_and_optimizer_in_folders_of_their_own(accelerate: Path) -> None:
    catalog = read(accelerate)
    assert list(catalog.tensors) == ["a.weight", "a.bias"]
    for name in catalog.tensors:
        for state in ("value", "exp_avg", "exp_avg_sq"):
            assert catalog.cover(name, state).fragments
    extent = catalog.cover("a.weight", "exp_avg").fragments[0].extent
    assert extent.object == "optimizer_0/__0_0.distcp"
    assert catalog.step == 3
    assert catalog.param_groups[0].params == ("a.weight", "a.bias")
    assert catalog.state["lr_scheduler"] == {"last_epoch": 3}
    assert {"optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "scheduler.pt"} <= catalog.objects.keys()


def test_one_of_the_folders_alone(accelerate: Path) -> None:
    catalog = read(accelerate / "pytorch_model_fsdp_0")
    assert list(catalog.tensors) == ["a.weight", "a.bias"]
    with pytest.raises(FitError, match="an optimizer and no model"):
        read(accelerate / "optimizer_0")


def test_an_optimizer_that_was_cut_short(accelerate: Path) -> None:
    (accelerate / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(NotFoundError, match=r"optimizer_0/\.metadata"):
        read(accelerate)


def test_several_models(accelerate: Path) -> None:
    save({"model": sample()["model"]}, accelerate / "pytorch_model_fsdp_1")
    with pytest.raises(FitError, match="pytorch_model_fsdp_0 pytorch_model_fsdp_1"):
        read(accelerate)


def test_damage_is_told_of_the_right_file(accelerate: Path) -> None:
    path = accelerate / "optimizer_0" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"optimizer_0/__0_0\.distcp"):
        read(accelerate)


def test_what_lightning_keeps_beside(tmp_path: Path) -> None:
    state = sample()
    folder = save({"model": state["model"], "optimizer_0": state["optim"]}, tmp_path / "epoch=1.ckpt")
    meta = {"epoch": 1, "global_step": 3, "lr_schedulers": [{"last_epoch": 1}], "pytorch-lightning_version": "2.5.0"}
    torch.save(meta, folder / "meta.pt")
    catalog = read(folder)
    assert set(catalog.tensors["a.bias"].states) == {"value", "exp_avg", "exp_avg_sq"}
    assert catalog.state == {
        "epoch": 1,
        "global_step": 3,
        "lr_scheduler": [{"last_epoch": 1}],
        "pytorch-lightning_version": "2.5.0",
    }
    assert "meta.pt" in catalog.objects


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tied Llama with its optimizer and its configuration, and its tensors."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tensors = model.state_dict()
    assert "lm_head.weight" in tensors
    states = {name: {"exp_avg": p.detach() * 2, "step": torch.tensor(1.0)} for name, p in model.named_parameters()}
    groups = [{"params": list(states), "lr": 0.1}]
    folder = save({"model": tensors, "optimizer": {"state": states, "param_groups": groups}}, tmp_path / "llama")
    config.save_pretrained(folder)
    return folder, tensors


def test_a_configuration_beside_names_the_program(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = llama
    sharded, _ = read_sharded(str(folder))
    assert sharded.program == "hf_llama"
    assert (sharded.config["hidden"], sharded.flags["tied"]) == (16, True)
    assert sharded.parts[0][1].state["hf_config"]["model_type"] == "llama"


def test_a_tied_head_that_was_saved_as_well_is_a_replica(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    catalog = read(llama[0])
    assert catalog.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert len(catalog.cover("model.embed_tokens.weight", "value").replicas) == 1


def test_into_a_folder_of_hugging_face(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, tensors = llama
    ucp.convert(str(folder), str(tmp_path / "hf"), to="hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
