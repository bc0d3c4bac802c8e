"""The folder in which the documentation's examples run: what ``ucp demo --keep demo`` leaves behind, and ``zero0``.

Without DeepSpeed the demo's checkpoint is written from random values, in DeepSpeed's layout and with the demo's shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import ucp
from tests.converters.deepspeed.fake import Fake, write
from ucp.demo.model import build_model, param_groups

TAG = "global_step12"


def make_demo(folder: Path) -> None:
    """Make ``demo/`` with a ZeRO-1 checkpoint and both of its conversions inside `folder`."""
    source = folder / "demo" / "deepspeed"
    write(_like_the_demo(), source / TAG)
    (source / "latest").write_text(TAG)
    ucp.convert(str(source), str(folder / "demo" / "universal"))
    ucp.convert(str(source), str(folder / "demo" / "deepspeed-universal"), to="deepspeed-universal")


def make_zero0(folder: Path) -> None:
    """Make ``zero0/``, a ZeRO-0 checkpoint in which a frozen parameter has the shape of two trained ones."""
    torch.manual_seed(0)
    module = {
        "embed": torch.randn(7, 4),
        "adapter": torch.randn(4),
        "norm.weight": torch.ones(4),
        "norm.bias": torch.zeros(4),
    }
    trained = [nn.Parameter(value) for name, value in module.items() if name != "adapter"]
    optimizer = torch.optim.AdamW(trained)
    sum((parameter.square().sum() for parameter in trained), torch.zeros(())).backward()
    optimizer.step()
    root = {"module": module, "buffer_names": [], "optimizer": optimizer.state_dict(), "param_shapes": None}
    root |= {"global_steps": 1, "skipped_steps": 0, "dp_world_size": 2, "mp_world_size": 1, "ds_version": "0.19.8"}
    (folder / "zero0").mkdir()
    torch.save(root, folder / "zero0" / "mp_rank_00_model_states.pt")


def _like_the_demo() -> Fake:
    model = build_model(seed=1)
    return Fake(_groups(model), dp=4, dtype=torch.float32, aliases={"head.weight": "embed.weight"}, step=12.0)


def _groups(model: nn.Module) -> list[Mapping[str, Sequence[int]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[p]: tuple(p.shape) for p in group["params"]} for group in param_groups(model)]
