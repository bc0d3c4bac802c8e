"""A small GPT of Megatron's tensor-parallel layers in DeepSpeed's pipeline engine: pipeline x data x tensor.

Written after what Megatron-DeepSpeed documents of its layers: vocabulary-parallel embedding padded to a multiple of the
tensor-parallel degree, fused query-key-value interleaved by head, fused SwiGLU with both halves on every rank,
column- and row-parallel weights, replicated norms, positions and row-parallel biases, a tied embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, distributed, nn
from torch.nn import functional

from tests.support.engine import Job, engine_config
from tests.support.model import GLOBAL_BATCH, LENGTH, batch, group_names, next_token_loss, param_groups
from tests.support.tp.case import VOCAB, TpCase

HIDDEN, INNER, HEADS, LAYERS = 24, 20, 4, 3
MICRO_BATCH = 3
DIVISIBLE = 4
"""The vocabulary is padded to a multiple of this and of the tensor-parallel degree."""


class Group:
    """The tensor-parallel group of this process; set before layers are built."""

    ranks: Any = None
    size: int = 1
    rank: int = 0


def padded_vocab(tp: int) -> int:
    """Rows of the embedding over all ranks."""
    return math.ceil(VOCAB / (DIVISIBLE * tp)) * DIVISIBLE * tp


class _Copy(torch.autograd.Function):
    """Identity forward; gradients are summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad)


class _Reduce(torch.autograd.Function):
    """Sum over the group forward; identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Gather(torch.autograd.Function):
    """Concatenate along the last dim forward; this rank's part of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if Group.size == 1:
            return x.view_as(x)
        parts = [torch.empty_like(x) for _ in range(Group.size)]
        distributed.all_gather(parts, x.contiguous(), group=Group.ranks)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.chunk(Group.size, dim=-1)[Group.rank].contiguous()


def _sum(x: Tensor) -> Tensor:
    if Group.size == 1:
        return x
    total = x.contiguous().clone()
    distributed.all_reduce(total, group=Group.ranks)
    return total


def _cut(whole: Tensor, dim: int, parts: int = 1) -> nn.Parameter:
    """This rank's piece of each of `parts` equal parts along `dim`; the parameter says how it was cut."""
    pieces = [part.chunk(Group.size, dim)[Group.rank] for part in whole.chunk(parts, dim)]
    parameter = nn.Parameter(torch.cat(pieces, dim).clone())
    parameter.tensor_model_parallel = Group.size > 1  # type: ignore[attr-defined]
    parameter.cut = (dim, parts)  # type: ignore[attr-defined]
    return parameter


class Column(nn.Module):
    """Linear layer cut along its output; `parts` fused matrices lie one after the other."""

    def __init__(self, inputs: int, outputs: int, *, parts: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = _cut(torch.randn(outputs, inputs) * 0.1, 0, parts)
        self.bias = _cut(torch.randn(outputs) * 0.1, 0, parts) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(_Copy.apply(x), self.weight, self.bias)


class Row(nn.Module):
    """Linear layer cut along its input; the bias is whole on every rank and added after the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _cut(torch.randn(outputs, inputs) * 0.1, 1)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = _Reduce.apply(functional.linear(x, self.weight))
        return summed + self.bias


class VocabularyRows(nn.Module):
    """Token embedding (and head) cut along the padded vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(padded_vocab(Group.size), HIDDEN)
        whole[:VOCAB] = torch.randn(VOCAB, HIDDEN) * 0.1
        self.weight = _cut(whole, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        first = Group.rank * self.weight.shape[0]
        inside = (tokens >= first) & (tokens < first + self.weight.shape[0])
        rows = functional.embedding(torch.where(inside, tokens - first, 0), self.weight)
        return _Reduce.apply(rows * inside.unsqueeze(-1))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the real tokens, padding left out."""
        whole: Tensor = _Gather.apply(functional.linear(_Copy.apply(x), self.weight))
        return whole[..., :VOCAB]


class EmbeddingPipe(nn.Module):
    """First layer, and last one where it is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = VocabularyRows()
        self.position_embeddings = nn.Embedding(LENGTH, HIDDEN)
        nn.init.normal_(self.position_embeddings.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]]
        return result

    @property
    def word_embeddings_weight(self) -> Tensor:
        """What the tied head shares."""
        return self.word_embeddings.weight


class Head(nn.Module):
    """Untied last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = VocabularyRows()

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head.logits(x)


class Attention(nn.Module):
    """Self-attention with query, key and value interleaved by head in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = Column(HIDDEN, 3 * HIDDEN)
        self.dense = Row(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        mixed = self.query_key_value(x).view(size, length, HEADS // Group.size, 3, HIDDEN // HEADS)
        query, key, value = mixed.permute(3, 0, 2, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dense(found.transpose(1, 2).reshape(size, length, HIDDEN // Group.size))


class Mlp(nn.Module):
    """SwiGLU: gate and up are one matrix, of which every rank has its part of both."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = Column(HIDDEN, 2 * INNER, parts=2, bias=False)
        self.dense_4h_to_h = Row(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class TransformerLayerPipe(nn.Module):
    """One pre-norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def _tied_logits(layer: EmbeddingPipe, x: Tensor) -> Tensor:
    return layer.word_embeddings.logits(x)


def _layers(*, tied: bool) -> list[Any]:
    body = [*(LayerSpec(TransformerLayerPipe) for _ in range(LAYERS)), LayerSpec(nn.LayerNorm, HIDDEN)]
    if not tied:
        return [LayerSpec(EmbeddingPipe), *body, LayerSpec(Head)]
    shared = {"tied_weight_attr": "word_embeddings_weight"}
    first = TiedLayerSpec("embed", EmbeddingPipe, **shared)
    return [first, *body, TiedLayerSpec("embed", EmbeddingPipe, forward_fn=_tied_logits, **shared)]


def universal_info(case: TpCase) -> dict[str, Any]:
    """What Megatron-DeepSpeed's ``GPTModelPipe.universal_checkpoint_info`` says of such a model."""
    words = r"tied_modules.embed.word_embeddings.weight"
    positions = r"tied_modules.embed.position_embeddings.weight" if case.tied else r"\d+.position_embeddings.weight"
    vocabulary = [words] if case.tied else [r"\d+.word_embeddings.weight", r"\d+.lm_head.weight"]
    info: dict[str, Any] = {
        "universal_checkpoint_version": case.info,
        "original_vocab_size": VOCAB,
        "padded_vocab_size": padded_vocab(case.tp),
        "vocabulary_parameter_patterns": vocabulary,
        "pipeline_replicated_parameter_patterns": [words, positions] if case.tied else [],
    }
    if case.tp > 1:
        info["tp_replicated_parameter_patterns"] = [
            positions,
            r"\d+.input_layernorm.weight",
            r"\d+.input_layernorm.bias",
            r"\d+.post_attention_layernorm.weight",
            r"\d+.post_attention_layernorm.bias",
            r"\d+.self_attention.dense.bias",
            r"\d+.mlp.dense_4h_to_h.bias",
            r"\d+.weight",
            r"\d+.bias",
        ]
        info["parameter_with_row_parallelism_patterns"] = [
            r"\d+.mlp.dense_4h_to_h.weight",
            r"\d+.self_attention.dense.weight",
        ]
        info["parameter_with_2_sub_params_cat_dim_0"] = [r"\d+.mlp.dense_h_to_4h.weight"]
    return info


def client_state(case: TpCase) -> dict[str, Any]:
    """What the training script saves beside the model."""
    state: dict[str, Any] = {"iteration": case.steps, "checkpoint_version": 3.0}
    return state if case.info is None else {**state, "universal_checkpoint_info": universal_info(case)}


def build_job(case: TpCase, rank: int, world: int, *, load_universal: bool = False) -> Job:
    """The model in DeepSpeed's pipeline engine; every rank holds its stage's and its tensor-parallel rank's part."""
    module = build_module(case, rank)
    names = group_names(module, 2)
    config = engine_config(case.plain(), load_universal=load_universal)
    config["train_micro_batch_size_per_gpu"] = MICRO_BATCH
    config["gradient_accumulation_steps"] = GLOBAL_BATCH // (MICRO_BATCH * case.dp)
    config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    optimizer = torch.optim.AdamW(param_groups(module, groups=2))
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return Job(case, engine, names, rank, world)  # type: ignore[arg-type]


def build_module(case: TpCase, rank: int) -> PipelineModule:
    """What this rank holds of the model, without an engine."""
    deepspeed.init_distributed("gloo", verbose=False)
    topology = PipeModelDataParallelTopology(num_pp=case.pp, num_mp=case.tp, num_dp=case.dp)
    for ranks in topology.get_axis_comm_lists("model"):
        group = distributed.new_group(ranks)
        if rank in ranks:
            Group.ranks, Group.size, Group.rank = group, case.tp, ranks.index(rank)
    torch.manual_seed(case.seed)
    return PipelineModule(
        layers=_layers(tied=case.tied),
        topology=topology,
        loss_fn=next_token_loss,
        partition_method="uniform",
        base_seed=case.seed,
        seed_layers=True,
    )


def train(job: Job, first: int, count: int) -> list[float]:
    """Train `count` steps from step `first`; the losses averaged over the whole batch, the same on every rank."""
    return [float(job.engine.train_batch(_micro_batches(job, step))) for step in range(first, first + count)]


def _micro_batches(job: Job, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    size, replica = GLOBAL_BATCH // job.case.data_parallel, job.engine.grid.get_data_parallel_rank()
    inputs, labels = (part[replica * size : (replica + 1) * size] for part in batch(step))
    yield from zip(torch.split(inputs, MICRO_BATCH), torch.split(labels, MICRO_BATCH), strict=True)


def place(job: Job) -> tuple[int, int]:
    """Pipeline stage and tensor-parallel rank of this process."""
    return job.engine.grid.get_pipe_parallel_rank(), Group.rank


def cuts(job: Job) -> dict[str, tuple[int, int] | None]:
    """How each parameter of this rank was cut: (dim, parts), or None where every rank has all of it."""
    return cuts_of(job.engine.module)


def cuts_of(module: nn.Module) -> dict[str, tuple[int, int] | None]:
    """The same of a module."""
    return {name: getattr(parameter, "cut", None) for name, parameter in module.named_parameters()}
