"""A small language model whose sizes divide by nothing, and its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

VOCAB, WIDTH, INNER, LENGTH, DEPTH = 13, 6, 10, 5, 4


class Block(nn.Module):
    """`seen` is a buffer that every forward pass changes."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """The layers `numbers`, with what is before the first and after the last one of a whole model."""

    def __init__(self, numbers: Sequence[int] = range(DEPTH), *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH) if 0 in numbers else None
        self.positions = nn.Embedding(LENGTH, WIDTH) if 0 in numbers else None
        self.layers = nn.ModuleDict({str(number): Block() for number in numbers})
        self.norm = nn.LayerNorm(WIDTH) if DEPTH - 1 in numbers else None
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if DEPTH - 1 in numbers else None
        if tied and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight
        if frozen and self.positions is not None:
            self.positions.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None and self.positions is not None:
            x = self.embed(x) + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers.values():
            x = layer(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same tokens and labels on every rank."""
    drawn = torch.randint(VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return drawn[:, :-1], drawn[:, 1:]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
