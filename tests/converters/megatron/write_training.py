"""What one rank of a Megatron-Core training job does. Imports Megatron-Core; used inside a job's own process only."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from safetensors.torch import save_file
from torch import distributed

from tests.converters.megatron.write_support import BATCH, LENGTH, Job, batch
from tests.support import megatron_ranks
from tests.support.megatron_schedule import schedule_of

MICRO = 2
"""Microbatches of a rank in one step."""


def patch() -> None:
    """Mend how 0.16.1 loads the states of torch's own Adam, which keeps a step for each parameter.

    With Apex or Transformer Engine the step is a number of the group. Without, Megatron-Core looks for it among what it
    loads, and gives all parameters one and the same tensor, which then counts each step once per parameter.
    """
    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: DistributedOptimizer, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, place = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        put(self, parameter, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step  # type: ignore[method-assign]


def run(rank: int, world: int, job: Job) -> None:
    """Build, load what the job says, record what this rank holds then, train, and save what the job says."""
    del world
    go(rank, Training(job))


def go(rank: int, training: Training) -> None:
    """The same with a training that may load and save in ways of its own."""
    job = training.job
    _seed(rank + (100 if job.load else 0))
    if job.load is not None:
        training.load(Path(job.load), job.form)
    if job.first:
        training.steps(0, job.first)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    training.record(rank, out)
    if job.save is not None:
        training.save(Path(job.save))
    if job.logits:
        training.compute(out)
    losses = training.steps(job.first or training.job.at, job.then)
    if losses and ps.is_pipeline_last_stage() and ps.get_tensor_model_parallel_rank() == 0:
        name = f"losses{ps.get_data_parallel_rank()}.json"
        (out / name).write_text(json.dumps(losses))
    distributed.barrier()


def _seed(number: int) -> None:
    """Other random states for each rank, and others again before something is loaded."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class Training:
    """A model under training on this rank."""

    def __init__(self, job: Job) -> None:
        self.job = job
        dtype = torch.bfloat16 if job.bf16 else torch.float32
        self.chunks = megatron_ranks.build(job.model, job.grid, bf16=job.bf16, params_dtype=dtype, pipeline_dtype=dtype)
        self.config = self.chunks[0].config
        self.config.finalize_model_grads_func = finalize_model_grads
        wrapped = [Float16Module(self.config, chunk) for chunk in self.chunks] if job.bf16 else self.chunks
        parallel = DistributedDataParallelConfig(
            use_distributed_optimizer=job.distributed, grad_reduce_in_fp32=True, bucket_size=None
        )
        self.ddp = [DistributedDataParallel(self.config, parallel, chunk) for chunk in wrapped]
        for one in self.ddp:
            one.broadcast_params()
        options = OptimizerConfig(
            optimizer="adam",
            lr=5e-3,
            min_lr=1e-4,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            bf16=job.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=job.distributed,
            clip_grad=1.0,
        )
        self.optimizer = get_megatron_optimizer(options, self.ddp)
        self.scheduler = schedule_of(
            self.optimizer,
            use_checkpoint_opt_param_scheduler=job.scheduler == "checkpoint",
            override_opt_param_scheduler=False,
        )

    def steps(self, first: int, count: int) -> list[float]:
        """Train on batches `first` to ``first + count``; losses on the last stage."""
        return [self._step(number) for number in range(first, first + count)]

    def _step(self, number: int) -> float:
        inputs, labels = batch(self.job.model, number)
        share = BATCH // ps.get_data_parallel_world_size()
        mine = slice(ps.get_data_parallel_rank() * share, (ps.get_data_parallel_rank() + 1) * share)
        inputs, labels = torch.from_numpy(inputs)[mine], torch.from_numpy(labels)[mine]
        size = share // MICRO

        def feed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for start in range(0, share, size):
                yield inputs[start : start + size], labels[start : start + size]

        for one in self.ddp:
            one.zero_grad_buffer()
        self.optimizer.zero_grad()
        several = len(self.ddp) > 1
        outputs = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[feed() for _ in self.ddp] if several else feed(),
            model=self.ddp if several else self.ddp[0],
            num_microbatches=MICRO,
            seq_length=LENGTH,
            micro_batch_size=size,
            forward_only=False,
        )
        done, _, _ = self.optimizer.step()
        assert done
        self.scheduler.step(increment=1)
        return float(sum(output["loss"] for output in outputs) / len(outputs)) if outputs else 0.0

    def _model_state(self, *, sharded: bool, metadata: Any = None) -> dict[str, Any]:
        names = ["model"] if len(self.chunks) == 1 else [f"model{n}" for n in range(len(self.chunks))]
        if sharded:
            known = metadata or self._metadata
            return {n: c.sharded_state_dict(metadata=known) for n, c in zip(names, self.chunks, strict=True)}
        return {n: c.state_dict_for_save_checkpoint() for n, c in zip(names, self.chunks, strict=True)}

    @property
    def _metadata(self) -> dict[str, Any]:
        """As Megatron-LM's training has it (megatron/training/checkpointing.py, metadata of the content)."""
        kind = {"distrib_optim_sharding_type": "fully_reshardable"} if self.job.distributed else {}
        return {**kind, "chained_optim_avoid_prefix": True}

    def _sharded_rng(self) -> Any:
        """As Megatron-LM saves it (megatron/training/checkpointing.py, ``get_rng_state``)."""
        here = ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank()
        ranks = self.job.grid.pp, self.job.grid.tp
        return ShardedObject("rng_state", [_rng()], ranks, here, ps.get_data_parallel_rank())

    def save(self, folder: Path) -> None:
        """One checkpoint in `folder` as torch_dist, and one beside it in the legacy form."""
        self.save_dist(folder)
        self._save_legacy(folder.with_name(f"{folder.name}_legacy"))

    def save_dist(self, folder: Path) -> None:
        """One checkpoint in `folder` as torch_dist."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {**self._common(), **self._model_state(sharded=True)}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state if len(self.chunks) > 1 else state["model"], metadata=self._metadata
        )
        state["rng_state"] = self._sharded_rng()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        # The strategy starts a process of its own, which daemons such as ranks may not, and leaves it running.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        try:
            dist_checkpointing.save(state, str(folder), strategy, content_metadata=self._metadata)
        finally:
            for child in multiprocessing.active_children():
                child.kill()

    def _common(self) -> dict[str, Any]:
        model = self.job.model
        args = {k: v for k, v in vars(self.config).items() if v is None or isinstance(v, bool | int | float | str)}
        unit = model.divisible * self.job.grid.tp
        args.update(
            padded_vocab_size=-(-model.vocab // unit) * unit,
            vocab_size=model.vocab,
            make_vocab_size_divisible_by=model.divisible,
            use_distributed_optimizer=self.job.distributed,
            untie_embeddings_and_output_weights=not model.tied,
            swiglu=model.gated,
            iteration=self.job.first,
            consumed_train_samples=self.job.first * BATCH,
        )
        return {
            "checkpoint_version": 3.0,
            "iteration": self.job.first,
            "args": argparse.Namespace(**args),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def _save_legacy(self, folder: Path) -> None:
        """Megatron-LM's own layout: megatron/training/checkpointing.py, ``get_checkpoint_name``."""
        mine = folder / legacy_name(self.job)
        mine.mkdir(parents=True, exist_ok=True)
        state = {**self._common(), **self._model_state(sharded=False), "optimizer": self.optimizer.state_dict()}
        state["rng_state"] = [_rng()]
        if self.job.distributed:
            self.optimizer.save_parameter_state(str(mine / "distrib_optim.pt"))
        if ps.get_data_parallel_rank() == 0 or ps.get_expert_data_parallel_rank() == 0:
            torch.save(state, mine / "model_optim_rng.pt")
        distributed.barrier()

    def load(self, folder: Path, form: str) -> None:
        """As Megatron-LM does (megatron/training/checkpointing.py, ``load_checkpoint``)."""
        state = self._loaded_legacy(folder) if form == "legacy" else self._loaded(folder)
        for name, chunk in zip(self._model_state(sharded=False), self.chunks, strict=True):
            chunk.load_state_dict(state[name], strict=True)
        if self.job.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
            if form == "legacy" and self.job.distributed:
                self.optimizer.load_parameter_state(str(folder / legacy_name(self.job) / "distrib_optim.pt"))
            if self.job.scheduler != "none":
                self.scheduler.load_state_dict(state["opt_param_scheduler"])
        else:
            self.optimizer.reload_model_params()
        if "rng_state" in state and self._same_ranks(state["args"]):
            _set_rng(state["rng_state"][0])
        self.job = dataclasses.replace(self.job, at=int(state["iteration"]))

    def _loaded(self, folder: Path) -> dict[str, Any]:
        known = dist_checkpointing.load_content_metadata(str(folder))
        wanted = self._model_state(sharded=True, metadata=known)
        if self.job.optimizer:
            if self.job.distributed:
                # Without Apex or Transformer Engine, 0.16.1 asks an optimizer that never stepped for its step.
                for one in self._optimizers:
                    one._init_optimizer_states_with_dummy_values()
            whole = wanted if len(self.chunks) > 1 else wanted["model"]
            wanted["optimizer"] = self.optimizer.sharded_state_dict(whole, is_loading=True, metadata=known)
        if self._same_ranks(dist_checkpointing.load_common_state_dict(str(folder))["args"]):
            wanted["rng_state"] = self._sharded_rng()
        loaded, missing, unexpected = dist_checkpointing.load(wanted, str(folder), strict="return_all")
        # Megatron-Core calls missing what nobody asks for, and unexpected what is asked for and not there.
        assert not unexpected, unexpected
        assert not missing - {"rng_state"}, missing
        state: dict[str, Any] = loaded
        return state

    def _same_ranks(self, args: argparse.Namespace) -> bool:
        """Whether random states are loaded: those of another number of ranks are not."""
        saved = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        return saved == (self.job.grid.tp, self.job.grid.pp) and not getattr(args, "no_save_rng", False)

    def _loaded_legacy(self, folder: Path) -> dict[str, Any]:
        arrays = [np.ndarray, np.dtype, type(np.dtype("uint32")), np._core.multiarray._reconstruct]
        torch.serialization.add_safe_globals([argparse.Namespace, *arrays])
        state: dict[str, Any] = torch.load(folder / legacy_name(self.job) / "model_optim_rng.pt", weights_only=True)
        return state

    def record(self, rank: int, out: Path) -> None:
        """What this rank holds: values as the model has them, and the optimizer's states, whole over the data axis."""
        places = megatron_ranks.place()
        mine = []
        for number, chunk in enumerate(self.chunks):
            held = {f"value/{name}": value for name, value in chunk.state_dict().items() if torch.is_tensor(value)}
            for name, parameter in chunk.named_parameters():
                for state, tensor in self._states(parameter).items():
                    held[f"{state}/{name}"] = tensor.view(parameter.shape)
            file = f"rank{rank}_{number}.safetensors"
            save_file({key: tensor.detach().clone().contiguous() for key, tensor in held.items()}, out / file)
            mine.append({"at": {**places, "vpp": number}, "file": file, "random": _digest()})
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, mine)
        if rank == 0:
            (out / "ranks.json").write_text(json.dumps([entry for listed in everyone for entry in listed]))
            groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            (out / "groups.json").write_text(json.dumps(groups))

    def compute(self, out: Path) -> None:
        """Logits of the batch that every model of the tests sees."""
        logits = megatron_ranks.forward(self.chunks, self.job.model)
        first = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank() == 0
        if logits is not None and first:
            np.save(out / "logits.npy", logits)

    def _states(self, parameter: Any) -> dict[str, torch.Tensor]:
        return self._distributed(parameter) if self.job.distributed else _plain(self._optimizers, parameter)

    @property
    def _optimizers(self) -> list[Any]:
        chained = isinstance(self.optimizer, ChainedOptimizer)
        return list(self.optimizer.chained_optimizers) if chained else [self.optimizer]

    def _distributed(self, parameter: Any) -> dict[str, torch.Tensor]:
        flat = {state: torch.zeros(parameter.numel()) for state in ("param", "exp_avg", "exp_avg_sq")}
        for one in self._optimizers:
            if parameter in one.model_param_gbuf_map:
                held = one._get_main_param_and_optimizer_states(parameter)
                if "exp_avg" in held:
                    part = one._get_model_param_range_map(parameter)["param"]
                    for state, whole in flat.items():
                        whole[part.start : part.end] = held[state].view(-1)
        dense = getattr(parameter, "allreduce", True)
        group = ps.get_data_parallel_group(with_context_parallel=True) if dense else ps.get_expert_data_parallel_group()
        for whole in flat.values():
            distributed.all_reduce(whole, group=group)
        return flat


def _rng() -> dict[str, Any]:
    """Random states of this rank."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng(held: dict[str, Any]) -> None:
    random.setstate(held["random_rng_state"])
    np.random.set_state(held["np_rng_state"])
    torch.set_rng_state(held["torch_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(held["rng_tracker_states"])


def _digest() -> str:
    """Tells whether two ranks would draw the same numbers."""
    held = _rng()
    tracked = {name: state.tolist() for name, state in sorted(held["rng_tracker_states"].items())}
    arrays = [part.tolist() if hasattr(part, "tolist") else part for part in held["np_rng_state"]]
    told = [held["random_rng_state"], arrays, held["torch_rng_state"].tolist(), tracked]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _plain(optimizers: list[Any], parameter: Any) -> dict[str, torch.Tensor]:
    main = getattr(parameter, "main_param", None)
    main = parameter if main is None else main
    for one in optimizers:
        states = one.optimizer.state.get(main, {})
        if states:
            return {"param": main, "exp_avg": states["exp_avg"], "exp_avg_sq": states["exp_avg_sq"]}
    return {}


def legacy_name(job: Job) -> str:
    """Folder of this rank's files (megatron/training/checkpointing.py, ``get_checkpoint_name``)."""
    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    if job.grid.pp > 1:
        name += f"_{ps.get_pipeline_model_parallel_rank():03d}"
    return name + (f"_{ps.get_expert_model_parallel_rank():03d}" if job.grid.ep > 1 else "")


def _forward(feed: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
    inputs, labels = next(feed)
    places = torch.arange(inputs.shape[1])[None].expand_as(inputs)
    mask = torch.ones(1, 1, inputs.shape[1], inputs.shape[1]).triu(1).bool()
    return chunk(inputs, places, mask, labels=labels), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}
