"""What one rank of a Megatron-Core job does. Imports Megatron-Core; used inside a job's own process only."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.numpy import save_file
from torch import distributed
from torch.nn import functional

from tests.support.megatron import ONE, Grid, Model, tokens


def hold(rank: int, world: int, model: Model, grid: Grid, folder: str) -> None:
    """Build this rank's part, load it (or make it, on one rank), save what it holds and what it computes."""
    chunks = build(model, grid)
    checkpoint = Path(folder) / "checkpoint"
    if grid == ONE:
        _draw(chunks[0], model)
        _save(chunks, checkpoint)
    else:
        _load(chunks, checkpoint)
    out = Path(folder) / grid.name
    out.mkdir(exist_ok=True)
    _record(chunks, grid, rank, out)
    logits = forward(chunks, model)
    if logits is not None and ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank() == 0:
        np.save(out / "logits.npy", logits)
    distributed.barrier()


def config(model: Model, grid: Grid, **more: Any) -> TransformerConfig:
    """Megatron-Core's own description of the model; `more` are further options of it."""
    options: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "ffn_hidden_size": model.ffn,
        "normalization": model.norm,
        "gated_linear_unit": model.gated,
        "activation_func": functional.silu if model.gated else _gelu_tanh,
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "barrier_with_L1_time": False,
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.etp,
    }
    if grid.vpp > 1:
        options["virtual_pipeline_model_parallel_size"] = grid.vpp
    if grid.first_stage is not None:
        options["num_layers_in_first_pipeline_stage"] = grid.first_stage
    if model.experts is not None:
        options.update(_expert_options(model))
    return TransformerConfig(**{**options, **more})


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _expert_options(model: Model) -> dict[str, Any]:
    return {
        "num_moe_experts": model.experts,
        "moe_router_topk": model.topk,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_ffn_hidden_size": model.ffn_moe,
        "moe_shared_expert_intermediate_size": model.ffn_shared,
        "moe_router_score_function": "sigmoid" if model.routed_with_bias else "softmax",
        "moe_router_enable_expert_bias": model.routed_with_bias,
        "moe_shared_expert_gate": model.routed_with_bias,
        "moe_grouped_gemm": model.grouped,
        "moe_layer_freq": 1 if model.expert_layers is None else list(model.expert_layers),
    }


def build(model: Model, grid: Grid, **options: Any) -> list[GPTModel]:
    """This rank's model chunks, one unless the pipeline is interleaved; `options` of the config besides."""
    ps.initialize_model_parallel(
        grid.tp,
        grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    init_num_microbatches_calculator(distributed.get_rank(), None, 2 * grid.dp, 1, grid.dp)
    settings = config(model, grid, **options)
    return [_chunk(model, grid, settings, number) for number in range(grid.vpp)]


def _chunk(model: Model, grid: Grid, settings: TransformerConfig, number: int) -> GPTModel:
    if model.expert_layers is None:
        spec = get_gpt_layer_local_spec(
            num_experts=model.experts,
            moe_grouped_gemm=model.grouped,
            qk_layernorm=model.qk_norm,
            normalization=model.norm,
        )
    else:
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    stage = {"ignore_virtual": False, "vp_stage": number} if grid.vpp > 1 else {}
    unit = model.divisible * grid.tp
    chunk = GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=-(-model.vocab // unit) * unit,
        max_sequence_length=model.positions,
        pre_process=ps.is_pipeline_first_stage(**stage),
        post_process=ps.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="learned_absolute" if model.learned_positions else "rope",
        parallel_output=True,
        vp_stage=number if grid.vpp > 1 else None,
    )
    return chunk.eval()


def _draw(chunk: GPTModel, model: Model) -> None:
    """Weights that leave no symmetry: norms and biases too are random. Padded rows of the vocabulary are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else 0.15 * drawn)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                parameter[model.vocab :] = 0
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def _save(chunks: list[GPTModel], checkpoint: Path) -> None:
    checkpoint.mkdir()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    # The strategy starts a process of its own, which daemons such as ranks may not, and leaves it running.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        dist_checkpointing.save(chunks[0].sharded_state_dict(), str(checkpoint), strategy)
    finally:
        for child in multiprocessing.active_children():
            child.kill()


def _load(chunks: list[GPTModel], checkpoint: Path) -> None:
    wanted = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def place() -> dict[str, int]:
    """This rank's index on each mesh axis but that of model chunks."""
    return {
        "tp": ps.get_tensor_model_parallel_rank(),
        "pp": ps.get_pipeline_model_parallel_rank(),
        "dp": ps.get_data_parallel_rank(),
        "ep": ps.get_expert_model_parallel_rank(),
        "etp": ps.get_expert_tensor_parallel_rank(),
        "edp": ps.get_expert_data_parallel_rank(),
    }


def _record(chunks: list[GPTModel], grid: Grid, rank: int, out: Path) -> None:
    here = place()
    mine = []
    for number, chunk in enumerate(chunks):
        file = f"rank{rank}_{number}.safetensors"
        state = {name: value for name, value in chunk.state_dict().items() if torch.is_tensor(value)}
        save_file({name: value.numpy().copy() for name, value in state.items()}, out / file)
        mine.append({"at": {**here, "vpp": number}, "file": file})
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    if rank == 0:
        (out / "ranks.json").write_text(json.dumps([entry for listed in everyone for entry in listed]))


def forward(chunks: list[GPTModel], model: Model) -> np.ndarray | None:
    """Logits [batch, sequence, vocab] of the whole batch on the last stage; None elsewhere."""
    batch = torch.from_numpy(tokens(model))
    count, length = batch.shape
    places = torch.arange(length)[None]
    causal = torch.ones(1, 1, length, length).triu(1).bool()

    def step(sequences: Any, chunk: GPTModel) -> tuple[torch.Tensor, Any]:
        return chunk(next(sequences)[None], places, causal), lambda output, non_loss_data=False: output.detach()

    several = len(chunks) > 1
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batch) for _ in chunks] if several else iter(batch),
            model=chunks if several else chunks[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not outputs:
        return None
    mine = torch.cat(outputs)
    whole = [torch.empty_like(mine) for _ in range(ps.get_tensor_model_parallel_world_size())]
    distributed.all_gather(whole, mine, group=ps.get_tensor_model_parallel_group())
    return torch.cat(whole, -1)[..., : model.vocab].numpy()
