"""Hugging Face models that DeepSpeed's AutoTP cuts over ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed
from torch.nn import functional

from tests.support.engine import Job, engine_config
from tests.support.model import GLOBAL_BATCH, batch
from tests.support.tp.case import HEADS, HIDDEN, INNER, LAYERS, TpCase


def build_model(case: TpCase) -> torch.nn.Module:
    """The whole model, weights by the case's seed alone."""
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3"}
    prefix = names[case.architecture]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=case.vocab,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=case.tied,
        attn_implementation="eager",
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(case.seed)
    model: torch.nn.Module = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.frozen and ".0.mlp." in name))
    return model


def _partitioning(case: TpCase) -> dict[str, Any]:
    """Phi-3's fused matrices, which DeepSpeed must be told of: query, key and value; gate and up."""
    if case.architecture != "phi3":
        return {}
    heads = [HIDDEN, *(2 * [case.kv_heads * HIDDEN // HEADS])]
    specs = [
        {"patterns": [r".*qkv_proj\.weight$"], "partition_type": "column", "shape": [heads, -1], "partition_dim": 0},
        {"patterns": [r".*gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
        {"patterns": [r".*(o_proj|down_proj)\.weight$"], "partition_type": "row"},
    ]
    return {"partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
    held = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in held if _ndim(p) >= 2], "lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
            {"params": [p for p in held if _ndim(p) < 2], "lr": 4e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        ]
    )


def _ndim(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_job(case: TpCase, rank: int, world: int, *, load_universal: bool = False) -> Job:
    """The model cut by DeepSpeed inside its engine."""
    deepspeed.init_distributed("gloo", verbose=False)
    model = build_model(case)
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = engine_config(case.plain(), load_universal=load_universal)
    del config["train_batch_size"]
    config["gradient_accumulation_steps"] = 1
    if case.tp > 1:
        config["tensor_parallel"] = {"autotp_size": case.tp, "vocab_parallel_lm_head": False, **_partitioning(case)}
    # AutoTP replaces parameters inside initialize; only a callable sees those it made.
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=config,
    )
    if case.architecture == "phi3":
        # The model takes the widths of its fused matrix from its configuration, which DeepSpeed leaves as it was.
        model.config.num_attention_heads //= case.tp
        model.config.num_key_value_heads //= case.tp
    named = [(name, _ndim(p)) for name, p in engine.module.named_parameters() if p.requires_grad]
    groups = [[name for name, dims in named if dims >= 2], [name for name, dims in named if dims < 2]]
    Whole.shapes = whole
    return Job(case, engine, groups, rank, world)  # type: ignore[arg-type]


class Whole:
    """Shapes of the model's parameters before they were cut, in this process."""

    shapes: dict[str, tuple[int, ...]]


def train(job: Job, first: int, count: int) -> list[float]:
    """Train `count` steps from step `first`; the losses averaged over ranks, the same on every rank."""
    tp, dp = job.case.tp, job.case.data_parallel  # type: ignore[attr-defined]
    size, replica = GLOBAL_BATCH // dp, job.rank // tp
    losses = []
    for step in range(first, first + count):
        inputs, labels = (part[replica * size : (replica + 1) * size] for part in batch(step))
        logits: Tensor = job.engine(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        job.engine.backward(loss)
        job.engine.step()
        mean = loss.detach().double().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / job.world)
    return losses


def client_state(case: TpCase) -> dict[str, Any]:
    """What the training script saves beside the model; DeepSpeed adds what AutoTP did by itself."""
    return {"iteration": case.steps}


def place(job: Job) -> tuple[int, int]:
    """Pipeline stage and tensor-parallel rank of this process."""
    return 0, job.rank % job.case.tp  # type: ignore[attr-defined]


def cuts(job: Job) -> dict[str, Any]:
    """How each parameter was cut, told by its shape alone: (dim, 1), or None where it was not.

    Fused matrices are not told by their shapes: their widths over ranks are among DeepSpeed's own marks on parameters.
    """
    found: dict[str, Any] = {}
    for name, parameter in job.engine.module.named_parameters():
        whole, own = Whole.shapes[name], tuple(getattr(parameter, "ds_shape", parameter.shape))
        marks = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None) or {}
        widths = marks.get("sub_param_shard_widths")
        dims = [d for d, (a, b) in enumerate(zip(whole, own, strict=True)) if a != b]
        found[name] = None if not dims else (dims[0], [list(w) for w in widths] if widths else 1)
    return found
