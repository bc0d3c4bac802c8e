"""Tiny jobs of real frameworks, whose checkpoints the fuzzers start from: ``python -m tests.fuzz.seed_jobs FOLDER``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ucp
from tests.support.bytecheckpoint_emulated import save as save_bytecheckpoint
from tests.support.gloo import spawn
from tests.support.megatron import Grid, Model
from tests.support.megatron_trained import Job, train


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.down = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


def trained() -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def extra() -> dict[str, object]:
    scheduler = {"base_lrs": [0.001], "last_epoch": 1, "_step_count": 2}
    rng = {
        "torch": torch.get_rng_state()[:300].clone(),
        "python": random.Random(0).getstate()[0],
        "numpy": np.arange(3),
    }
    return {"scheduler": scheduler, "rng": rng, "step": 1, "names": ("a", b"b", {1, 2}, None, 1 << 70, 0.5)}


def deepspeed(rank: int, world: int, folder: str, stage: int) -> None:
    import deepspeed as ds

    model, _ = trained()
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    }
    engine, *_ = ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.backward(engine(torch.ones(4, 2)).sum())
    engine.step()
    engine.save_checkpoint(folder, client_state={"seen": 4})


def dcp(folder: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "extra": extra()}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)


def hf(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=200)


def bytecheckpoint(folder: Path) -> None:
    model, _ = trained()
    weights = dict(model.state_dict())
    states = {
        ("state", name, key): torch.ones_like(value) for name, value in model.named_parameters() for key in ("exp_avg",)
    }
    save_bytecheckpoint(folder, model=weights, optimizer=states, extra=[extra()])


def torch_save(folder: Path) -> None:
    folder.mkdir()
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra()}
    torch.save(state, folder / "checkpoint.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)


def native(folder: Path) -> None:
    from ucp.train.save import save

    model, optimizer = trained()
    state = {"model": model, "optimizer": optimizer, "lr_scheduler": extra()["scheduler"]}
    save(state, str(folder), step=1)


def megatron(folder: Path) -> None:
    tiny = Model("tiny", layers=1, hidden=4, heads=2, groups=1, ffn=4, vocab=4, positions=4, divisible=1)
    folder.mkdir()
    train([Job(tiny, Grid(), ("fully_reshardable", "dp_reshardable", "legacy"))], folder)


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    dcp(root / "dcp")
    hf(root / "hf")
    bytecheckpoint(root / "bytecheckpoint")
    torch_save(root / "torch")
    native(root / "native")
    ucp.convert(str(root / "dcp"), str(root / "universal"))
    for stage in (0, 1, 3):
        spawn(deepspeed, 1, str(root / f"deepspeed-{stage}"), stage, timeout=300)
    ucp.convert(str(root / "deepspeed-1"), str(root / "deepspeed-universal"), to="deepspeed-universal")
    megatron(root / "megatron")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
