"""A small model in the manner of Megatron: fused projections, padded vocabulary, tensor and pipeline parallel.

`LOGICAL` are its tensors as they are; `local` cuts what one rank holds of them by hand, and is what loading is held to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.train.handmade import flat, make
from ucp.catalog import Catalog
from ucp.checkpoint import Checkpoint

VOCAB, PADDED, HIDDEN, GROUPS, R, D, FFN, LAYERS = 7, 12, 6, 2, 3, 2, 8, 4
SIZES = {"groups": GROUPS, "d": D, "divisible": 6}
PROGRAM = """format 1
mesh pp tp
size vocab hidden groups r d ffn l
size divisible = 6
state exp_avg exp_avg_sq : like param

embed [(vocab + _ align divisible * tp)/tp, hidden] <-> embed.weight [vocab, hidden] on pp 0
norm [hidden] <-> norm.weight [hidden] on pp -1
in layers.{l/pp} <-> layers.{l} {
  norm [hidden] <-> norm.weight [hidden]
  qkv [groups/tp (r d + d + d), hidden]
    <-> q.weight [groups r d, hidden], k.weight [groups d, hidden], v.weight [groups d, hidden]
  out [hidden, groups/tp r d] <-> o.weight [hidden, groups r d]
  fc1 [ffn/tp + ffn/tp, hidden] <-> gate.weight [ffn, hidden], up.weight [ffn, hidden]
}
"""


def logical() -> dict[str, Tensor]:
    """The tensors of the model, all different numbers."""
    shapes = {"embed.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.norm.weight": (HIDDEN,),
            f"layers.{i}.q.weight": (GROUPS * R * D, HIDDEN),
            f"layers.{i}.k.weight": (GROUPS * D, HIDDEN),
            f"layers.{i}.v.weight": (GROUPS * D, HIDDEN),
            f"layers.{i}.o.weight": (HIDDEN, GROUPS * R * D),
            f"layers.{i}.gate.weight": (FFN, HIDDEN),
            f"layers.{i}.up.weight": (FFN, HIDDEN),
        }
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for seed, (name, shape) in enumerate(shapes.items())
    }


LOGICAL = logical()


def scaled(factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in LOGICAL.items()}


def checkpoint(folder: Path | str, *, optimizer: bool = True, **options: Any) -> Checkpoint:
    """All tensors and their optimizer states, cut as ZeRO does over three ranks."""
    tensors = {
        name: {"value": value} | ({"exp_avg": value * 10, "exp_avg_sq": value * value} if optimizer else {})
        for name, value in LOGICAL.items()
    }
    groups = [
        ([n for n in LOGICAL if "norm" not in n], {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-7}),
        ([n for n in LOGICAL if "norm" in n], {"lr": 0.01, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-7}),
    ]
    steps = dict.fromkeys(LOGICAL, 3.0) if optimizer else {}
    return Checkpoint(*make(str(folder), tensors, cut=flat(3), steps=steps, groups=groups, **options))


def local(full: Mapping[str, Tensor], *, tp: int, pp: int, tp_rank: int, pp_rank: int) -> dict[str, Tensor]:
    """What rank (`pp_rank`, `tp_rank`) holds of the tensors `full`, with zeros for padding."""
    found: dict[str, Tensor] = {}
    padded = -(-VOCAB // (6 * tp)) * 6 * tp
    if pp_rank == 0:
        embed = torch.cat([full["embed.weight"], torch.zeros(padded - VOCAB, HIDDEN)])
        found["embed"] = embed.chunk(tp)[tp_rank]
    for i in range(LAYERS // pp):
        source, target = f"layers.{i + pp_rank * LAYERS // pp}", f"layers.{i}"
        q = full[f"{source}.q.weight"].reshape(GROUPS, R * D, HIDDEN)
        k = full[f"{source}.k.weight"].reshape(GROUPS, D, HIDDEN)
        v = full[f"{source}.v.weight"].reshape(GROUPS, D, HIDDEN)
        mine = slice(GROUPS // tp * tp_rank, GROUPS // tp * (tp_rank + 1))
        found[f"{target}.norm"] = full[f"{source}.norm.weight"]
        found[f"{target}.qkv"] = torch.cat([q, k, v], dim=1)[mine].reshape(-1, HIDDEN)
        found[f"{target}.out"] = full[f"{source}.o.weight"].chunk(tp, dim=1)[tp_rank]
        halves = (full[f"{source}.{name}.weight"].chunk(tp)[tp_rank] for name in ("gate", "up"))
        found[f"{target}.fc1"] = torch.cat(list(halves))
    if pp_rank == pp - 1:
        found["norm"] = full["norm.weight"]
    return found


class Stage(nn.Module):
    """The part of one rank; every number is unlike what will be loaded."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, **place: int) -> None:
        super().__init__()
        for name, tensor in local(LOGICAL, **place).items():
            home: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            home.register_parameter(leaf, nn.Parameter(torch.full_like(tensor, 77.0, dtype=dtype)))

    def forward(self) -> Tensor:
        return torch.stack([(p.float() ** 2).sum() for p in self.parameters()]).sum()


def adamw(stage: nn.Module) -> torch.optim.Optimizer:
    named = dict(stage.named_parameters())
    norms = [p for name, p in named.items() if "norm" in name]
    others = [p for name, p in named.items() if "norm" not in name]
    return torch.optim.AdamW([{"params": others}, {"params": norms}], lr=9.0)


def check(stage: nn.Module, optimizer: torch.optim.Optimizer | None, **place: int) -> int:
    """Compare all that a rank holds with what was cut by hand; the number of parameters."""
    values = local(LOGICAL, **place)
    named = dict(stage.named_parameters())
    assert named.keys() == values.keys()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), values[name].to(parameter.dtype), rtol=0, atol=0, msg=name)
    if optimizer is not None:
        first, second = local(scaled(10), **place), local({n: t * t for n, t in LOGICAL.items()}, **place)
        for name, parameter in named.items():
            state = optimizer.state[parameter]
            torch.testing.assert_close(state["exp_avg"], first[name], rtol=0, atol=0, msg=name)
            torch.testing.assert_close(state["exp_avg_sq"], second[name], rtol=0, atol=0, msg=name)
            assert state["step"].item() == 3
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
    return len(named)


def without(catalog: Catalog, name: str) -> Catalog:
    """`catalog` as if one tensor had never been."""
    return replace(catalog, tensors={n: t for n, t in catalog.tensors.items() if n != name})
