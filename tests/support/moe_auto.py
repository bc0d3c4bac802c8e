"""A model whose mixture-of-experts layers DeepSpeed's AutoEP finds and replaces. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.moe_case import MoeCase

VOCAB, HIDDEN, INNER, LENGTH = 37, 13, 7, 6
CONFIG = {
    "moe_layer_pattern": r"blocks\.\d+\.moe",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "top_k": 2,
    "score_func": "softmax",
    "route_norm": True,
    "use_grouped_mm": False,
}
"""``expert_parallel`` in DeepSpeed's configuration, beside ``enabled`` and ``autoep_size``."""


class Experts(nn.Module):
    """All experts' weights stacked, as transformers has them."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * INNER, HIDDEN, generator=generator) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(count, HIDDEN, INNER, generator=generator) * 0.2)


class Routed(nn.Module):
    """What AutoEP replaces: a router and experts. Never called itself."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, count, bias=False)
        self.experts = Experts(count, seed)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("AutoEP did not replace this layer")


class Block(nn.Module):
    """A linear layer and a mixture of experts, each behind a norm."""

    def __init__(self, case: MoeCase, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.moe = Routed(case.experts[layer], 100 * case.seed + layer)
        self.moe.experts.down_proj.requires_grad_(not case.frozen_expert)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(torch.cumsum(x, dim=1) / LENGTH)
        routed = self.moe(self.norm(x))
        result: Tensor = x + (routed[0] if isinstance(routed, tuple) else routed)
        return result


class AutoLM(nn.Module):
    """A language model of such blocks; gives the loss."""

    def __init__(self, case: MoeCase) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(case, layer) for layer in range(len(case.experts)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())
