"""Jobs of DeepSpeed's pipeline engine: the model cut into stages, each with its own data-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, distributed, nn

from tests.support.case import Case
from tests.support.engine import Job, engine_config
from tests.support.model import (
    GLOBAL_BATCH,
    HIDDEN,
    LENGTH,
    VOCAB,
    Block,
    group_names,
    local_batch,
    next_token_loss,
    param_groups,
)
from tests.support.optimizers import build_optimizer

MICRO_BATCH = 3


class Embedding(nn.Module):
    """First layer: token ids ``[batch, length]`` to ``[batch, length, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.position = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.embed(tokens) + self.position[: tokens.shape[1]]
        return result

    @property
    def weight(self) -> Tensor:
        """What the tied head shares."""
        return self.embed.weight


class FinalNorm(nn.Module):
    """Layer before the head, with a persistent buffer."""

    ticks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.register_buffer("ticks", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.ticks.add_(1.0)
        result: Tensor = self.norm(x)
        return result


def project(layer: Embedding, x: Tensor) -> Tensor:
    """The tied head: logits from the embedding's own weight."""
    return nn.functional.linear(x, layer.embed.weight)


def build_job(case: Case, rank: int, world: int) -> Job:
    """The pipelined model in DeepSpeed's pipeline engine; every rank holds one stage."""
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(case.seed)
    module = PipelineModule(
        layers=_layers(tied=case.tied),
        num_stages=case.pipeline_stages,
        loss_fn=next_token_loss,
        partition_method="uniform",
        base_seed=case.seed,
    )
    names = group_names(module, case.groups)
    config = engine_config(case)
    config["train_micro_batch_size_per_gpu"] = MICRO_BATCH
    config["gradient_accumulation_steps"] = GLOBAL_BATCH // (MICRO_BATCH * case.data_parallel)
    optimizer = build_optimizer(case.optimizer, param_groups(module, groups=case.groups))
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return Job(case, engine, names, rank, world)


def _layers(*, tied: bool) -> list[Any]:
    body = [*(LayerSpec(Block) for _ in range(3)), LayerSpec(FinalNorm)]
    if tied:
        first = TiedLayerSpec("embed", Embedding, tied_weight_attr="weight")
        last = TiedLayerSpec("embed", Embedding, forward_fn=project, tied_weight_attr="weight")
        return [first, *body, last]
    return [LayerSpec(Embedding), *body, LayerSpec(nn.Linear, HIDDEN, VOCAB, bias=False)]


def train(job: Job, first: int, count: int) -> list[float]:
    """Train `count` steps from step `first`; the losses averaged over the whole batch, the same on every rank."""
    return [float(job.engine.train_batch(_micro_batches(job, step))) for step in range(first, first + count)]


def _micro_batches(job: Job, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    replica = job.engine.grid.get_data_parallel_rank()
    inputs, labels = local_batch(step, rank=replica, world=job.case.data_parallel)
    yield from zip(torch.split(inputs, MICRO_BATCH), torch.split(labels, MICRO_BATCH), strict=True)


def union(truth: dict[str, Tensor], record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Join what the stages hold (collective).

    A tied layer exists in several stages, but DeepSpeed keeps only its `tied_weight_attr` in step; other parameters of
    it train in the first stage alone.  The first stage's values are the truth, and the record's ``stage_copies_differ``
    lists the keys of which a later stage holds something else.
    """
    everything: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, (truth, record))
    tensors: dict[str, Tensor] = {}
    merged = dict(everything[0][1])
    differing = set()
    for part, described in everything:
        for key, value in part.items():
            if not torch.equal(tensors.setdefault(key, value), value):
                differing.add(key)
        merged["names"] = list(dict.fromkeys([*merged["names"], *described["names"]]))
        merged["steps"] = {**merged["steps"], **described["steps"]}
        merged["groups"] = [_join_groups(a, b) for a, b in zip(merged["groups"], described["groups"], strict=True)]
    assert not any("embed.weight" in key for key in differing), "the tied weight itself is out of step"
    return tensors, {**merged, "stage_copies_differ": sorted(differing)}


def _join_groups(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    assert left["hyper"] == right["hyper"], "one group has two sets of hyper-parameters"
    return {"names": list(dict.fromkeys([*left["names"], *right["names"]])), "hyper": left["hyper"]}
