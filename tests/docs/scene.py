"""The folder in which the examples of the documentation run: what ``ucp demo --keep demo`` leaves behind.

Without DeepSpeed its checkpoint is written from random values, in DeepSpeed's layout and with the demo's shapes.
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


def make(folder: Path) -> None:
    """Make ``demo/`` with a ZeRO-1 checkpoint and both of its conversions inside `folder`."""
    source = folder / "demo" / "deepspeed"
    write(_like_the_demo(), source / TAG)
    (source / "latest").write_text(TAG)
    ucp.convert(str(source), str(folder / "demo" / "universal"))
    ucp.convert(str(source), str(folder / "demo" / "deepspeed-universal"), to="deepspeed-universal")


def _like_the_demo() -> Fake:
    model = build_model(seed=1)
    return Fake(_groups(model), dp=4, dtype=torch.float32, aliases={"head.weight": "embed.weight"}, step=12.0)


def _groups(model: nn.Module) -> list[Mapping[str, Sequence[int]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[p]: tuple(p.shape) for p in group["params"]} for group in param_groups(model)]
