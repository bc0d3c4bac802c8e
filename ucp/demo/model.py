"""A small transformer and an endless text that it learns in a few steps; odd sizes make every layout pad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, HIDDEN, INNER, HEADS, LAYERS, LENGTH = 97, 102, 307, 6, 3, 32
GLOBAL_BATCH = 12
"""Samples per step over all ranks; every layout of the demo divides it."""


class Block(nn.Module):
    """Pre-norm attention and MLP on ``[batch, length, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then MLP, each added to its input."""
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class Transformer(nn.Module):
    """Token ids and labels ``[batch, LENGTH]`` in, mean cross entropy out. Embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.position = nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def build_model(seed: int) -> Transformer:
    """The model with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    return Transformer()


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without and with a learning rate of their own."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [
        {"params": matrices, "lr": 6e-3, "weight_decay": 0.1},
        {"params": vectors, "lr": 2e-3, "weight_decay": 0.0},
    ]


def local_batch(step: int, *, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of `step` that data-parallel `rank` of `world` trains on; together the ranks see one batch."""
    text = _text(torch.Generator().manual_seed(step))
    size = GLOBAL_BATCH // world
    mine = text[rank * size : (rank + 1) * size]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def _text(generator: torch.Generator) -> Tensor:
    """``[GLOBAL_BATCH, LENGTH + 1]`` tokens: each has one successor, which nine times in ten follows it."""
    successor = torch.randint(VOCAB, (VOCAB,), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    follows = torch.rand(GLOBAL_BATCH, LENGTH + 1, generator=generator) < 0.9
    for i in range(1, LENGTH + 1):
        tokens[:, i] = torch.where(follows[:, i], successor[tokens[:, i - 1]], tokens[:, i])
    return tokens
