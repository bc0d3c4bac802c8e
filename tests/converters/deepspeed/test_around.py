"""Files that Trainer and Accelerate put around a checkpoint: carried, and weights among them compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ucp
from tests.converters.deepspeed.fake import Fake, Written, write
from tests.converters.deepspeed.oracle import read_witness
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import FitError
from ucp.store import open_store

FAKE = Fake([{"w": (5, 3), "b": (3,)}], stage=3)


def read(root: Path, **options: Any) -> Catalog:
    return CONVERTER.read(open_store(str(root)), **options)


@pytest.fixture
def trainer(tmp_path: Path) -> tuple[Path, Written]:
    """A folder as the Trainer leaves it."""
    written = write(FAKE, tmp_path / "global_step5")
    (tmp_path / "latest").write_text("global_step5")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')
    torch.save({"last_epoch": 5}, tmp_path / "scheduler.pt")
    for rank in range(2):
        torch.save({"python": (3, rank), "cpu": torch.arange(rank + 3)}, tmp_path / f"rng_state_{rank}.pth")
    return tmp_path, written


def test_companions_are_carried_under_their_names(trainer: tuple[Path, Written]) -> None:
    root, _ = trainer
    catalog = read(root)
    around = catalog.state["around"]
    assert around["trainer_state.json"] == b'{"global_step": 5}'
    assert around["scheduler.pt"] == {"last_epoch": 5}
    assert [around[f"rng_state_{r}.pth"]["python"] for r in range(2)] == [(3, 0), (3, 1)]
    assert around["rng_state_1.pth"]["cpu"].extent.object == "rng_state_1.pth"
    assert {"trainer_state.json", "scheduler.pt", "rng_state_0.pth"} <= catalog.objects.keys()


def test_companions_belong_to_the_latest_tag_alone(trainer: tuple[Path, Written]) -> None:
    root, _ = trainer
    write(FAKE.with_(step=4.0), root / "global_step4")
    assert "around" not in read(root, tag="global_step4").state
    assert "around" not in read(root / "global_step5").state


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_gathered_weights_are_copies_to_compare(trainer: tuple[Path, Written], name: str) -> None:
    root, written = trainer
    assert not read(root).witnesses
    low = {key: value.clone() for key, value in written.low.items()}
    save_file(low, root / name) if name.endswith("safetensors") else torch.save(low, root / name)
    catalog = read(root)
    assert set(catalog.witnesses) == {"w", "b"}
    assert np.array_equal(read_witness(root, catalog, "w"), low["w"].view(torch.int16).numpy().view("<u2"))
    assert name in catalog.objects


def test_gathered_weights_in_shards(trainer: tuple[Path, Written]) -> None:
    root, written = trainer
    for i, name in enumerate(("w", "b"), 1):
        save_file({name: written.low[name].clone()}, root / f"model-0000{i}-of-00002.safetensors")
    assert set(read(root).witnesses) == {"w", "b"}


def test_weights_of_another_shape_are_not_compared(trainer: tuple[Path, Written]) -> None:
    root, _ = trainer
    save_file({"w": torch.zeros(9, 9)}, root / "model.safetensors")
    catalog = read(root)
    assert not catalog.witnesses
    assert any("other shapes" in note for note in catalog.notes)


def test_weights_that_someone_extracted_into_a_save_root_are_not_compared(tmp_path: Path) -> None:
    written = write(FAKE, tmp_path / "global_step5")
    (tmp_path / "latest").write_text("global_step5")
    torch.save(written.low, tmp_path / "pytorch_model.bin")
    assert not read(tmp_path).witnesses


GPT2 = {
    "transformer.wte.weight": (7, 4),
    "transformer.wpe.weight": (5, 4),
    "transformer.ln_f.weight": (4,),
    "transformer.ln_f.bias": (4,),
    **{f"transformer.h.0.{norm}.{kind}": (4,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
    "transformer.h.0.attn.c_attn.weight": (4, 12),
    "transformer.h.0.attn.c_attn.bias": (12,),
    "transformer.h.0.attn.c_proj.weight": (4, 4),
    "transformer.h.0.attn.c_proj.bias": (4,),
    "transformer.h.0.mlp.c_fc.weight": (4, 6),
    "transformer.h.0.mlp.c_fc.bias": (6,),
    "transformer.h.0.mlp.c_proj.weight": (6, 4),
    "transformer.h.0.mlp.c_proj.bias": (4,),
}


def test_a_configuration_beside_it_answers_what_a_program_asks(tmp_path: Path) -> None:
    written = write(Fake([GPT2], stage=1), tmp_path / "global_step5")
    (tmp_path / "latest").write_text("global_step5")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.raises(FitError, match="cannot be told"):
        ucp.open(tmp_path, program="hf_gpt2")
    config = {"model_type": "gpt2", "n_head": 2, "n_embd": 4, "n_layer": 1, "vocab_size": 7, "n_inner": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with ucp.open(tmp_path, program="hf_gpt2") as checkpoint:
        fused = written.states["transformer.h.0.attn.c_attn.weight"]["value"]
        assert torch.equal(checkpoint["layers.0.attn.k.weight"]["value"][...], fused[:, 4:8].T)
        assert checkpoint.ties == {"lm_head.weight": "embed.weight"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(FitError, match="layers"):
        ucp.open(tmp_path, program="hf_gpt2")
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"')
    with pytest.raises(FitError, match="cannot be told"):
        ucp.open(tmp_path, program="hf_gpt2")
