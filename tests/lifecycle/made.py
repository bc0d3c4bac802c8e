"""Real checkpoints of several families, small, for what is done to them later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import ucp
from tests.support.gloo import spawn
from ucp.converter import read_catalog
from ucp.testing.example import read_all

WIDTH = 16


def build(seed: int, *, sharded: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a frozen parameter, and its optimizer."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))
    model[0].bias.requires_grad_(False)
    if sharded:
        model = fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


def _job(rank: int, world: int, saves: list[tuple[str, int]], form: str, share: bool) -> None:
    model, optimizer = build(7, sharded=True)
    done = 0
    for url, step in saves:
        train(model, optimizer, step - done)
        done = step
        ucp.save((model, optimizer), url, step=step, form=form, share=share)


def save(saves: dict[Path, int], *, world: int = 2, form: str = "native", share: bool = False) -> None:
    """What a job of `world` ranks saves while it trains, to each folder after so many steps."""
    spawn(_job, world, [(str(url), step) for url, step in saves.items()], form, share)


def safetensors(folder: Path) -> Path:
    """A model as Hugging Face's libraries write it, with what lies beside the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    save_file({f"w{n}": torch.randn(30, 20, generator=generator) for n in range(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab ü.txt").write_text("a\nb\n")
    return folder


def _dcp_job(rank: int, world: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dist

    model, _ = build(3, sharded=True)
    dist.save({"model": model.state_dict()}, checkpoint_id=folder)


def dcp(folder: Path) -> None:
    """What torch.distributed.checkpoint writes."""
    spawn(_dcp_job, 2, folder)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(url: Path | str) -> dict[str, Any]:
    """Every state of every tensor: shape, dtype and bytes."""
    return read_all(*read_catalog(str(url)))
