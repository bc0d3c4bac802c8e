"""What one rank of a Megatron-Core training job does. Imports Megatron-Core; used inside a job's own process only."""

from __future__ import annotations

import json
import multiprocessing
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.module import Float16Module
from safetensors.torch import save_file
from torch import distributed

from tests.support.megatron import Model
from tests.support.megatron_ranks import build
from tests.support.megatron_schedule import schedule_of
from tests.support.megatron_trained import ITERATION, STATES, Job

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LENGTH = 8
_LR = 5e-3


def run(rank: int, world: int, job: Job, folder: str) -> None:
    """Train this rank's part for a few steps, record what it holds, save it in each format."""
    trainer = Trainer(job)
    for step in range(ITERATION):
        trainer.step(step)
    _record(trainer, rank, Path(folder))
    # Saving starts a process of its own, which daemons such as ranks may not, and leaves it running.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        _save(trainer, rank, Path(folder))
    finally:
        for child in multiprocessing.active_children():
            child.kill()


def _save(trainer: Trainer, rank: int, folder: Path) -> None:
    for form in trainer.job.formats:
        root = folder / form
        place = root / f"iter_{ITERATION:07d}"
        if rank == 0:
            place.mkdir(parents=True)
        distributed.barrier()
        (trainer.save_legacy if form == "legacy" else trainer.save)(place, form)
        distributed.barrier()
        if rank == 0:
            (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


class Trainer:
    """One rank's model chunks, optimizer and scheduler."""

    def __init__(self, job: Job) -> None:
        self.job = job
        dtype = _DTYPES[job.dtype]
        more: dict[str, Any] = {
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": job.dtype == "bf16",
            "fp16": job.dtype == "fp16",
        }
        if job.per_layer:
            more["hetereogenous_dist_checkpoint"] = True
        torch.manual_seed(11)
        self.models = [chunk.train() for chunk in build(job.model, job.grid, **more)]
        _spread(self.models, job.model)
        self.config = self.models[0].config
        self.config.finalize_model_grads_func = finalize_model_grads
        wrapped = [model if job.dtype == "fp32" else Float16Module(self.config, model) for model in self.models]
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=job.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=job.bucket is not None,
            bucket_size=job.bucket,
        )
        self.parallel = [DistributedDataParallel(self.config, settings, model) for model in wrapped]
        for chunk in self.parallel:
            chunk.broadcast_params()
        self.optimizer = get_megatron_optimizer(_optimizer_config(job), self.parallel)
        self.scheduler = schedule_of(
            self.optimizer, use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=False
        )
        self.scheduler.step(increment=1)

    def step(self, number: int) -> None:
        """One step on two micro-batches; Megatron-Core trains no experts under tp without Transformer Engine."""
        for chunk in self.parallel:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.job.model.grouped or (self.job.model.experts is not None and self.job.grid.tp > 1):
            _draw_gradients(self.models, number)
        else:
            self._backward(number)
        done, _, _ = self.optimizer.step()
        assert done, "the step was skipped"
        self.scheduler.step(increment=1)

    def _backward(self, number: int) -> None:
        model, dp = self.job.model, ps.get_data_parallel_rank()
        rng = np.random.default_rng((number, dp))
        batches = [torch.from_numpy(rng.integers(0, model.vocab, (1, _LENGTH + 1))) for _ in range(2)]
        places = torch.arange(_LENGTH)[None]
        causal = torch.ones(1, 1, _LENGTH, _LENGTH).triu(1).bool()

        def forward(found: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
            batch = next(found)
            output = chunk(batch[:, :-1], places, causal, labels=batch[:, 1:].contiguous())
            return output, lambda losses: (losses.float().mean(), {})

        several = len(self.parallel) > 1
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in self.parallel] if several else iter(batches),
            model=self.parallel if several else self.parallel[0],
            num_microbatches=2,
            seq_length=_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )

    def around(self) -> dict[str, Any]:
        """What is saved beside model and optimizer: megatron/training/checkpointing.py, generate_state_dict."""
        return {
            "args": arguments(self.job),
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "opt_param_scheduler": self.scheduler.state_dict(),
            "num_floating_point_operations_so_far": 12345.0,
        }

    def save(self, place: Path, form: str) -> None:
        """A torch_dist checkpoint."""
        told: dict[str, Any] = {} if form == "plain" else {"distrib_optim_sharding_type": form}
        state = self.around()
        several = len(self.models) > 1
        for number, model in enumerate(self.models):
            state[f"model{number}" if several else "model"] = model.sharded_state_dict(metadata=told)
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=told)
        stages, tp = self.job.grid.pp, self.job.grid.tp
        here = (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank())
        state["rng_state"] = ShardedObject(
            "rng_state", [_rng()], (stages, tp), here, replica_id=ps.get_data_parallel_rank()
        )
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(state, str(place), strategy, content_metadata=told)

    def save_legacy(self, place: Path, form: str) -> None:
        """``mp_rank_*`` folders, as megatron/training/checkpointing.py fills them under --ckpt-format torch."""
        grid, tp = self.job.grid, ps.get_tensor_model_parallel_rank()
        stage, expert = ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank()
        name = f"mp_rank_{tp:02d}" + f"_{stage:03d}" * (grid.pp > 1) + f"_{expert:03d}" * (grid.ep > 1)
        state = {**self.around(), "rng_state": [_rng()]}
        several = len(self.models) > 1
        for number, model in enumerate(self.models):
            state[f"model{number}" if several else "model"] = model.state_dict_for_save_checkpoint()
        state["optimizer"] = self.optimizer.state_dict()
        folder = place / name
        folder.mkdir(exist_ok=True)
        if self.job.distributed:
            self.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        first = ps.get_expert_data_parallel_rank() if grid.ep > 1 else ps.get_data_parallel_rank()
        if first == 0:
            torch.save(state, folder / "model_optim_rng.pt")


def arguments(job: Job) -> Namespace:
    """Megatron-LM's arguments of the job, as far as they describe it."""
    model, grid = job.model, job.grid
    unit = model.divisible * grid.tp
    return Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        group_query_attention=model.groups != model.heads,
        num_query_groups=model.groups if model.groups != model.heads else 1,
        kv_channels=model.hidden // model.heads,
        ffn_hidden_size=model.ffn,
        swiglu=model.gated,
        normalization=model.norm,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        untie_embeddings_and_output_weights=not model.tied,
        position_embedding_type="learned_absolute" if model.learned_positions else "rope",
        max_position_embeddings=model.positions,
        make_vocab_size_divisible_by=model.divisible,
        vocab_size=model.vocab,
        padded_vocab_size=-(-model.vocab // unit) * unit,
        num_experts=model.experts,
        moe_ffn_hidden_size=model.ffn_moe if model.experts else None,
        moe_shared_expert_intermediate_size=model.ffn_shared,
        moe_layer_freq=1 if model.expert_layers is None else list(model.expert_layers),
        moe_grouped_gemm=False,
        transformer_impl="local",
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        decoder_first_pipeline_num_layers=grid.first_stage,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
        context_parallel_size=1,
        data_parallel_size=grid.dp,
        world_size=grid.world,
        use_distributed_optimizer=job.distributed,
        overlap_grad_reduce=job.bucket is not None,
        ddp_bucket_size=job.bucket,
        params_dtype=_DTYPES[job.dtype],
        bf16=job.dtype == "bf16",
        fp16=job.dtype == "fp16",
        consumed_train_samples=48,
        iteration=ITERATION,
    )


def _spread(models: list[Any], model: Model) -> None:
    """Make norms and biases unlike each other, so that none can be taken for another; all ranks do it alike."""
    with torch.no_grad():
        for chunk in models:
            for name, parameter in chunk.named_parameters():
                if parameter.dim() == 1:
                    seed = sum(name.encode()) + 7 * len(name)
                    drawn = torch.randn(model.ffn * 4 + 512, generator=torch.Generator().manual_seed(seed))
                    parameter.add_(0.1 * drawn[: parameter.numel()].to(parameter.dtype))
                if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                    last = ps.get_tensor_model_parallel_rank() + 1
                    excess = last * parameter.shape[0] - model.vocab
                    if excess > 0:
                        parameter[parameter.shape[0] - excess :] = 0


def _draw_gradients(models: list[Any], number: int) -> None:
    """Gradients at random, the same wherever a parameter is copied."""
    for chunk in models:
        for name, parameter in chunk.named_parameters():
            cut = getattr(parameter, "tensor_model_parallel", False)
            expert = ".experts." in name
            tp = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
            ep = ps.get_expert_model_parallel_rank() if expert else 0
            place = (tp if cut else 0, ps.get_pipeline_model_parallel_rank(), ep)
            rng = np.random.default_rng((number, *place, *name.encode()))
            parameter.main_grad.copy_(torch.from_numpy(rng.standard_normal(parameter.shape, np.float32)))


def _optimizer_config(job: Job) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=_LR,
        min_lr=1e-4,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        bf16=job.dtype == "bf16",
        fp16=job.dtype == "fp16",
        initial_loss_scale=1024.0,
        params_dtype=_DTYPES[job.dtype],
        use_distributed_optimizer=job.distributed,
        clip_grad=1.0,
    )


def _rng() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": parallel_random.get_cuda_rng_tracker().get_states(),
    }


def _record(trainer: Trainer, rank: int, folder: Path) -> None:
    here = {
        "tp": ps.get_tensor_model_parallel_rank(),
        "pp": ps.get_pipeline_model_parallel_rank(),
        "dp": ps.get_data_parallel_rank(),
        "ep": ps.get_expert_model_parallel_rank(),
        "etp": ps.get_expert_tensor_parallel_rank(),
        "edp": ps.get_expert_data_parallel_rank(),
    }
    mine = []
    for number, model in enumerate(trainer.models):
        file, held = f"rank{rank}_{number}.safetensors", {}
        for name, parameter in model.named_parameters():
            states = _states(trainer, parameter)
            for state in STATES:
                held.update({f"{state}/{one}": tensor.clone() for one, tensor in _single(name, states[state], trainer)})
        held.update(
            {f"value/{name}": buffer.clone() for name, buffer in model.named_buffers() if "expert_bias" in name}
        )
        save_file(held, folder / file)
        mine.append({"at": {**here, "vpp": number}, "file": file})
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    if rank == 0:
        (folder / "ranks.json").write_text(json.dumps([entry for listed in everyone for entry in listed]))


def _single(name: str, tensor: torch.Tensor, trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Single experts of GroupedMLP, as its own ``sharded_state_dict`` takes them apart."""
    if not name.endswith((".experts.weight1", ".experts.weight2")):
        yield name, tensor
        return
    experts, hidden = (trainer.job.model.experts or 0) // trainer.job.grid.ep, trainer.job.model.hidden
    first = name.endswith("1")
    whole = tensor.view(experts, hidden, -1) if first else tensor.view(experts, -1, hidden)
    for number, one in enumerate(whole.transpose(-1, -2)):
        layer = "linear_fc1" if first else "linear_fc2"
        yield f"{name.rpartition('.')[0]}.local_experts.{number}.{layer}.weight", one.contiguous()


def _states(trainer: Trainer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Master and moments of a parameter of this rank, whole over the data-parallel ranks."""
    optimizers = trainer.optimizer.chained_optimizers
    if trainer.job.distributed:
        return _gathered(optimizers, parameter)
    master = getattr(parameter, "main_param", None)
    master = parameter if master is None else master
    (state,) = [o.optimizer.state[master] for o in optimizers if master in o.optimizer.state]
    return {"value": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _gathered(optimizers: list[Any], parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    expert = not getattr(parameter, "allreduce", True)
    group = ps.get_expert_data_parallel_group() if expert else ps.get_data_parallel_group(with_context_parallel=True)
    found = {state: torch.zeros(parameter.numel()) for state in STATES}
    for optimizer in optimizers:
        if parameter in optimizer.model_param_gbuf_map:
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            part = optimizer._get_model_param_range_map(parameter)["param"]
            for state, key in zip(STATES, ("param", "exp_avg", "exp_avg_sq"), strict=True):
                found[state][part.start : part.end] = held[key].detach().float().flatten()
    for tensor in found.values():
        distributed.all_reduce(tensor, group=group)
    return {state: tensor.view(parameter.shape) for state, tensor in found.items()}
