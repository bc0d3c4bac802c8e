"""A tiny GPT of Megatron-Core, on the CPU. Used inside a job's own process only: it changes torch for good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.support import megatron_cpu
from tests.support.megatron_schedule import schedule_of

megatron_cpu.patch()
megatron_cpu.patch_optimizers()
# Streams that are seeded begin from their seeds, as on an accelerator.
torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
logging.getLogger("megatron").setLevel(logging.ERROR)

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.nn import functional  # noqa: E402

LAYERS, HIDDEN, HEADS, FFN, VOCAB, LENGTH = 4, 32, 4, 48, 64, 12
"""The vocabulary is one that no number of ranks has to pad."""


def dataset() -> Any:
    """Sequences, each with its loss mask: different numbers of tokens count."""
    from torch.utils.data import TensorDataset

    draw = torch.Generator().manual_seed(1)
    first, stride = (torch.randint(0, count, (50, 1), generator=draw) for count in (VOCAB, 5))
    tokens = (first + stride * torch.arange(LENGTH + 1)) % VOCAB
    counted = torch.randint(LENGTH // 2, LENGTH + 1, (50, 1), generator=draw)
    return TensorDataset(tokens, (torch.arange(LENGTH) < counted).float())


def build(mesh: Any, *, vpp: int = 1, distributed: bool = False, **options: Any) -> list[Any]:
    """This rank's chunks in Megatron-Core's wrapper; the same weights at every layout."""
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    settings = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        barrier_with_L1_time=False,
        finalize_model_grads_func=finalize_model_grads,
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths wants, experts or not
        tensor_model_parallel_size=mesh["tp"],
        pipeline_model_parallel_size=mesh["pp"],
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, **options},
    )
    parallel = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    return [DistributedDataParallel(settings, parallel, _chunk(settings, number, vpp)) for number in range(vpp)]


def _chunk(settings: Any, number: int, vpp: int) -> Any:
    stage = {"ignore_virtual": False, "vp_stage": number} if vpp > 1 else {}
    return GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=ps.is_pipeline_first_stage(**stage),
        post_process=ps.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=number if vpp > 1 else None,
    )


def forward(
    loss: Callable[[torch.Tensor, torch.Tensor, float], Any], *, weighted: bool
) -> Callable[[Iterator[Any], Any], tuple[torch.Tensor, Any]]:
    """A forward step; `loss` is given losses and mask of [samples, tokens], and the factor."""

    def step(data: Iterator[Any], chunk: Any) -> tuple[torch.Tensor, Any]:
        given = next(data)
        (tokens, mask), factor = given if weighted else (given, 1.0)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        places = torch.arange(LENGTH)[None].expand_as(inputs)
        hidden = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
        return chunk(inputs, places, hidden, labels=labels), lambda found: loss(found.float(), mask, factor)

    return step


def optimizer(chunks: list[Any], *, distributed: bool) -> tuple[Any, Any, Any]:
    """Megatron-Core's optimizer of fp32 weights, its schedule, and the tracker of random streams."""
    options = OptimizerConfig(
        optimizer="adam",
        lr=5e-3,
        min_lr=1e-4,
        weight_decay=0.1,
        params_dtype=torch.float32,
        use_distributed_optimizer=distributed,
        clip_grad=1.0,
    )
    made = get_megatron_optimizer(options, chunks)
    schedule = schedule_of(made)
    return made, schedule, get_cuda_rng_tracker()
