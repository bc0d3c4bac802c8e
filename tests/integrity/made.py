"""Checkpoints to damage: a small model with optimizer states and training state, in every form that keeps digests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import ucp

SEED = 3
LARGE = (9 << 20) // 8
"""Elements in a row of a tensor of two rows, which has three digest blocks: the last one is not whole."""


def job(seed: int = SEED, *, large: bool = False) -> dict[str, Any]:
    """A model with a tied weight, its optimizer after one step, a schedule and random states."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    model.register_buffer("seen", torch.arange(5))
    if large:
        model.register_parameter("large", nn.Parameter(torch.randn(2, LARGE)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "rng": ucp.Rng(), "epoch": seed}


def make(form: str, folder: Path, *, large: bool = False) -> Path:
    """A checkpoint in `form`, in `folder`: ``native``, ``universal``, or what torch or safetensors write themselves."""
    state = job(large=large)
    if form in ("torch", "dcp", "safetensors"):
        folder.mkdir(parents=True)
        del state["rng"]
        plain = {name: value if name == "epoch" else value.state_dict() for name, value in state.items()}
        _FOREIGN[form](plain, folder)
    else:
        ucp.save(state, str(folder), step=4, form=form)
    return folder


def _safetensors(plain: dict[str, Any], folder: Path) -> None:
    save_file({name: value.clone() for name, value in plain["model"].items()}, folder / "model.safetensors")


_FOREIGN: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "torch": lambda plain, folder: torch.save(plain, folder / "checkpoint.pt"),
    "dcp": lambda plain, folder: dcp_save(plain, checkpoint_id=folder, no_dist=True),
    "safetensors": _safetensors,
}


def url_of(folder: Path) -> str:
    """What to open."""
    one = folder / "checkpoint.pt"
    return str(one if one.exists() else folder)


def objects(folder: Path) -> list[Path]:
    """All files of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
