"""The columns of the matrix: families with the layout that they are written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A column: a family, and what a user says of the result.

    `logical` families write by logical names. `weights` says that the form has a place for values alone, `tensors` that
    it has one for tensors alone.
    """

    label: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    logical: bool = False
    weights: bool = False
    tensors: bool = False


COLUMNS = (
    Target("universal", "universal"),
    Target("dcp", "dcp", {"mesh": {"dp": 3}}),
    Target("torch", "torch"),
    Target("safetensors", "safetensors", {"states": "all"}, tensors=True),
    Target("hf", "hf", {"shard_bytes": "40KB"}, weights=True),
    Target("deepspeed, ZeRO-1 on 3", "deepspeed", {"stage": 1, "mesh": {"dp": 3}}),
    Target("deepspeed, ZeRO-3 on 3", "deepspeed", {"stage": 3, "mesh": {"dp": 3}}),
    Target("deepspeed-universal", "deepspeed-universal"),
    Target("megatron, torch_dist", "megatron", {"mesh": {"tp": 2}}, logical=True),
    Target("megatron, mp_rank, TP 2 × PP 2", "megatron", {"form": "legacy", "mesh": {"tp": 2, "pp": 2}}, logical=True),
)
