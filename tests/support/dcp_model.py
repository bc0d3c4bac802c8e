"""A small model for DCP jobs: odd sizes, a scalar, experts, a frozen layer, buffers, layers that can be cut in two."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

VOCAB, HIDDEN, INNER, EXPERTS = 22, 10, 14, 4
FROZEN = ("adapter.weight", "adapter.bias")
BUFFERS = ("mean", "calls")


class Block(nn.Module):
    """A norm and an MLP, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


class Experts(nn.Module):
    """Stacked experts, all of which see all tokens; where they lie is what matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 7))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.full_tensor() if isinstance(self.w, DTensor) else self.w
        return torch.einsum("bh,ehf->b", x, w).unsqueeze(-1)


class Model(nn.Module):
    """Tokens ``[batch]`` in, loss out."""

    def __init__(self, *, experts: bool = False, frozen: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.experts = Experts() if experts else None
        self.adapter = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB if tied else VOCAB - 1, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.randn(HIDDEN))
        self.register_buffer("calls", torch.tensor(3))
        for parameter in self.adapter.parameters():
            parameter.requires_grad = not frozen

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        if self.experts is not None:
            x = x + self.experts(x)
        return functional.cross_entropy(self.head(self.adapter(x)).float(), tokens % (VOCAB - 1))


def optimizer_of(model: nn.Module, shapes: dict[str, int] | None = None) -> torch.optim.AdamW:
    """AdamW with two groups: matrices, which decay, and the rest. `shapes` has dims of parameters that are flat now."""
    named = [(clean(name), p) for name, p in model.named_parameters() if p.requires_grad]
    dims = shapes or {name: p.ndim for name, p in named}
    groups = [
        {"params": [p for name, p in named if dims.get(name, 1) > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [p for name, p in named if dims.get(name, 1) < 2], "lr": 4e-3, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], foreach=False)


def clean(name: str) -> str:
    """`name` without what wrappers put in."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
