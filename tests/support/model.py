"""A tiny transformer language model with everything in it that makes checkpoints hard, and data that it can learn.

Sizes are odd so that flat partitions need padding under every data-parallel degree.  The model has a tied embedding,
a persistent float buffer, a persistent integer buffer, a buffer that is not saved, frozen parameters, a parameter of
one element and, on request, a trainable parameter that never takes part in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, HIDDEN, INNER, HEADS, LENGTH = 67, 33, 53, 3, 9
GLOBAL_BATCH = 12
"""Samples per step over all ranks: divisible by 1, 2, 3, 4, 6 and 12, so that every layout sees the same data."""


class Block(nn.Module):
    """One pre-norm transformer block; input and output are ``[batch, length, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, hidden // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class TinyLM(nn.Module):
    """The language model; called with token ids ``[batch, LENGTH]`` and, for a loss, with labels of the same shape."""

    drift: Tensor
    calls: Tensor

    def __init__(self, *, tied: bool = True, frozen: bool = True, unused: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.position = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.adapter = nn.Linear(HIDDEN, HIDDEN).requires_grad_(not frozen)
        self.norm = nn.LayerNorm(HIDDEN)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if unused:
            self.spare = nn.Parameter(torch.randn(5, 7))
        self.register_buffer("drift", torch.zeros(HIDDEN))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        x = self.embed(input_ids) + self.position[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = x + 0.1 * self.adapter(x)
        if self.training:
            self._touch_buffers()
        logits = self.head(self.norm(x) * self.gain)
        return logits if labels is None else next_token_loss(logits, labels)

    @torch.no_grad()
    def _touch_buffers(self) -> None:
        # The drift depends on the step count alone: ranks see different data, and a buffer must agree between them.
        self.drift.mul_(0.9).add_(torch.linspace(0.0, 0.1, HIDDEN, dtype=self.drift.dtype))
        self.calls.add_(1)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in float32 of ``[batch, length, VOCAB]`` logits against ``[batch, length]`` labels."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build_model(*, seed: int = 7, **options: bool) -> TinyLM:
    """The model with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    return TinyLM(**options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one step, both ``[GLOBAL_BATCH, LENGTH]``; few tokens occur, so loss falls fast."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 11, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, 0::2] * 3 + 1) % VOCAB
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def local_batch(step: int, *, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The part of `batch` that data-parallel rank `rank` of `world` trains on."""
    size = GLOBAL_BATCH // world
    inputs, labels = batch(step)
    return inputs[rank * size : (rank + 1) * size], labels[rank * size : (rank + 1) * size]


def group_names(model: nn.Module, groups: int) -> list[list[str]]:
    """Names of the trained parameters of each optimizer group: decayed, not decayed and, with three, embeddings."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if groups == 1:
        return [[name for name, _ in named]]
    special = [name for name, _ in named if "embed" in name or name == "position"] if groups == 3 else []
    decay = [name for name, parameter in named if parameter.ndim >= 2 and name not in special]
    plain = [name for name, parameter in named if parameter.ndim < 2 and name not in special]
    return [group for group in (decay, plain, special) if group]


def param_groups(model: nn.Module, *, groups: int = 2) -> list[dict[str, Any]]:
    """Optimizer groups with their own learning rate, betas, momentum and weight decay (Adam and SGD names both)."""
    hyper = [
        {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"lr": 4e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {"lr": 2e-3, "betas": (0.8, 0.9), "weight_decay": 0.01},
    ]
    parameters = dict(model.named_parameters())
    named = group_names(model, groups)
    return [{"params": [parameters[name] for name in names], **hyper[i]} for i, names in enumerate(named)]
