"""The measured model: a plain decoder-only transformer of a chosen size, with two optimizer groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, HEADS, VOCAB, LENGTH = 1024, 16, 32003, 16
"""The vocabulary is odd, so that partitions need padding."""


class Block(nn.Module):
    """One pre-norm transformer block; input and output are ``[batch, length, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, HIDDEN // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class Decoder(nn.Module):
    """The language model: token ids and labels ``[batch, LENGTH]`` to the mean cross entropy in float32."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.position = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def layers_for(millions: float) -> int:
    """Blocks that bring the model to at least `millions` of parameters."""
    fixed = 2 * VOCAB * HIDDEN + LENGTH * HIDDEN + 2 * HIDDEN
    block = 12 * HIDDEN * HIDDEN + 13 * HIDDEN
    return max(1, math.ceil((millions * 1e6 - fixed) / block))


def build_model(layers: int, *, dtype: torch.dtype = torch.float32, seed: int = 7) -> Decoder:
    """The model in `dtype` with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Decoder(layers)
    finally:
        torch.set_default_dtype(before)


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW groups: matrices with weight decay, vectors without and with another learning rate."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "lr": 4e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ]


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of the one sample that `rank` trains on, both ``[1, LENGTH]``."""
    generator = torch.Generator().manual_seed(1000 + rank)
    tokens = torch.randint(0, VOCAB, (1, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
