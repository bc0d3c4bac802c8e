"""Real jobs that all train one tiny Llama and save it, each in its own way: the sources of the matrix.

``python -m tests.matrix.jobs -`` reads {"folder": …, "jobs": [kind, …]} from standard input. Every job gets a folder of
its name there; frameworks are imported once, and each job's ranks are forked from that process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.deepspeed_job import job_environment
from tests.support.gloo import spawn

STEPS = 2
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Sizes that two tensor-parallel ranks can cut, and a vocabulary that they cannot without padding."""

ZERO: dict[str, Any] = {
    "deepspeed ZeRO-1 bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "deepspeed ZeRO-2": {"zero_optimization": {"stage": 2}},
    "deepspeed ZeRO-3": {"zero_optimization": {"stage": 3}},
}
WORLD = {"hsdp": 4, "fsdp2+tp": 4, "plain": 1}
TORCH = ("plain", "ddp", "fsdp1", "fsdp2", "fsdp2 flat", "hsdp", "fsdp2+tp")
"""Layouts of torch jobs. `plain` saves with save_pretrained, torch.save and torch's Hugging Face writer."""


def config() -> Any:
    """The configuration of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES)


def build() -> Any:
    """The model, the same in every job."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    return LlamaForCausalLM(config())


def groups(model: Any) -> list[dict[str, Any]]:
    """Two groups of parameters, by name: with weight decay and without."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in named if "norm" not in n], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if "norm" in n], "lr": 4e-3, "weight_decay": 0.0},
    ]


def batch(step: int) -> Any:
    """Token numbers of one step, the same on every rank."""
    import torch

    return torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(step))


def torch_job(rank: int, world: int, layout: str, out: str) -> None:
    """Train and save with torch alone."""
    import torch

    model = _wrapped(build(), layout.removesuffix(" flat"), world)
    optimizer = torch.optim.AdamW(groups(model), foreach=False)
    for step in range(STEPS):
        tokens = batch(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if layout == "plain":
        _save_plain(model, optimizer, Path(out))
    else:
        _save_dcp(model, optimizer, out, flat=layout.endswith(" flat"))
    if layout == "fsdp2":
        from ucp.train.save import save

        save((model, optimizer), f"{out}/native", step=STEPS)


def _wrapped(model: Any, layout: str, world: int) -> Any:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    layers = model.model.layers
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp1":
        policy = ModuleWrapPolicy({type(layers[0])})
        mesh = init_device_mesh("cpu", (world,))
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_mesh=mesh, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    if layout in ("hsdp", "fsdp2+tp"):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    if layout == "fsdp2+tp":
        column = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        column |= {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
        row = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        for layer in layers:
            parallelize_module(layer, mesh["tp"], {**column, **row})
        mesh = mesh["dp"]
    if layout != "plain":
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    return model


def _save_dcp(model: Any, optimizer: Any, out: str, *, flat: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    values, states = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save({"model": values, "optim": states}, checkpoint_id=f"{out}/ckpt")


def _save_plain(model: Any, optimizer: Any, out: Path) -> None:
    import peft
    import torch
    import torch.distributed.checkpoint as dcp

    model.save_pretrained(out / "hf", max_shard_size="40KB")
    (out / "bin").mkdir()
    torch.save(model.state_dict(), out / "bin" / "pytorch_model.bin")
    config().save_pretrained(out / "bin")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": STEPS}, out / "model.pt")
    writer = dcp.HuggingFaceStorageWriter(path=str(out / "torch-hf"), save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)
    config().save_pretrained(out / "torch-hf")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(out / "adapter")


def deepspeed_job(rank: int, world: int, kind: str, out: str) -> None:
    """Train and save with DeepSpeed."""
    import deepspeed
    import torch

    model = build()
    named = [{**group, "params": [p for _, p in group["params"]]} for group in groups(model)]
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, **ZERO[kind]}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(named, foreach=False), config=settings)
    for step in range(STEPS):
        tokens = batch(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{out}/ckpt")


def main() -> None:
    """Run the jobs on standard input."""
    os.environ.update(job_environment())
    import deepspeed
    import transformers  # noqa: F401 (imported before any rank is forked, so that ranks start with everything loaded)
    from transformers import LlamaForCausalLM  # noqa: F401

    del deepspeed
    request = json.load(sys.stdin)
    for kind in request["jobs"]:
        out = Path(request["folder"]) / kind
        out.mkdir(parents=True)
        job: Callable[..., None] = deepspeed_job if kind in ZERO else torch_job
        spawn(job, WORLD.get(kind, 2), kind, str(out), method="fork", timeout=240)


if __name__ == "__main__":
    main()
