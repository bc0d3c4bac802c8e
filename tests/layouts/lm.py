"""A small language model that learns in a few steps, whose parts every kind of parallelism can cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

VOCAB, HIDDEN, INNER, HEADS, LENGTH, DEPTH, EXPERTS = 61, 24, 46, 4, 16, 4, 4
GLOBAL_BATCH = 24
"""Samples per step over all ranks: every number of data-parallel ranks here divides it."""


class Attention(nn.Module):
    """Causal; with fewer heads where tensor parallelism has cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.k = nn.Linear(HIDDEN, HIDDEN)
        self.v = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = [part(x).view(batch, length, -1, HIDDEN // HEADS).transpose(1, 2) for part in (self.q, self.k, self.v)]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group; each of them gets the whole gradient."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def, override]
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def, override]
        return gradient, None


class _Same(torch.autograd.Function):
    """What every rank has; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def, override]
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def, override]
        total = gradient.clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class Experts(nn.Module):
    """All experts on all tokens, weighted by a gate. Under expert parallelism ranks have some experts each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if not isinstance(self.up, DTensor):
            return _apply(x, weights, self.up, self.down)
        mesh, local = self.up.device_mesh, self.up.to_local()
        first = mesh.get_local_rank() * len(local)
        group = mesh.get_group()
        x, weights = _Same.apply(x, group), _Same.apply(weights, group)
        own = _apply(x, weights[..., first : first + len(local)], local, self.down.to_local())  # type: ignore[operator]
        result: Tensor = _Sum.apply(own, group)
        return result


def _apply(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = functional.gelu(torch.einsum("bth,ehi->beti", x, up))
    return torch.einsum("beti,eij,bte->btj", inner, down, weights)


class Block(nn.Module):
    """Attention, MLP and experts, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        mixed: Tensor = self.down(functional.gelu(self.up(y))) + self.experts(y, self.gate(y).softmax(-1))
        return x + mixed


class Model(nn.Module):
    """The blocks `numbers`, with what is before the first and after the last one of the whole model."""

    def __init__(self, numbers: Sequence[int] = range(DEPTH)) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN) if 0 in numbers else None
        self.position = nn.Embedding(LENGTH, HIDDEN) if 0 in numbers else None
        self.blocks = nn.ModuleDict({str(number): Block() for number in numbers})
        self.norm = nn.LayerNorm(HIDDEN) if DEPTH - 1 in numbers else None
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False) if DEPTH - 1 in numbers else None

    def forward(self, x: Tensor) -> Tensor:
        """Token ids, or what the stage before gives, to logits, or what the next stage takes."""
        if self.embed is not None and self.position is not None:
            x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks.values():
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def build(seed: int, numbers: Sequence[int] = range(DEPTH)) -> Model:
    """The blocks `numbers` of the model whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    whole, part = Model(), Model(numbers)
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    return part


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One group: what FSDP1 keeps in one flat parameter has one weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, foreach=False)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(step: int, *, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels that data-parallel `rank` of `world` sees: a text in which mostly one token follows another."""
    generator = torch.Generator().manual_seed(step)
    successor = torch.randint(VOCAB, (VOCAB,), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    follows = torch.rand(GLOBAL_BATCH, LENGTH + 1, generator=generator) < 0.9
    for at in range(1, LENGTH + 1):
        tokens[:, at] = torch.where(follows[:, at], successor[tokens[:, at - 1]], tokens[:, at])
    mine = tokens.chunk(world)[rank]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
