"""The rows of the matrix: real checkpoints, each with what a user says of those that do not tell it themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.matrix import jobs
from tests.support import bytecheckpoint_emulated, megatron_trained, moe_job, torch_jobs
from tests.support.case import Case
from tests.support.deepspeed_job import run_jobs, run_module
from tests.support.megatron import Grid, Model
from tests.support.moe_case import MoeCase
from tests.support.tp import case as tp
from tests.support.tp import job as tp_job
from ucp.converters._programs import from_config
from ucp.run.convert import convert

OWN = {**jobs.SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 8}
"""``config.json`` of the Llama that most jobs train."""

_MEGATRON = megatron_trained.Job(
    Model("llama"), Grid(tp=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy"), dtype="bf16"
)
_VIRTUAL = megatron_trained.Job(_MEGATRON.model, Grid(pp=2, vpp=2), ("plain",), dtype="fp32", distributed=False)
_EXPERTS = megatron_trained.Job(Model("mixtral", experts=4), Grid(ep=2, dp=2), ("fully_reshardable",), dtype="bf16")
_MEGATRON_CONFIG = {
    **OWN,
    "vocab_size": _MEGATRON.model.vocab,
    "hidden_size": _MEGATRON.model.hidden,
    "intermediate_size": _MEGATRON.model.ffn,
    "num_hidden_layers": _MEGATRON.model.layers,
    "head_dim": _MEGATRON.model.hidden // _MEGATRON.model.heads,
}
_EXPERTS_CONFIG = {
    **_MEGATRON_CONFIG,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "intermediate_size": _EXPERTS.model.ffn_moe,
    "num_local_experts": _EXPERTS.model.experts,
    "num_experts_per_tok": _EXPERTS.model.topk,
}
_AUTOTP = tp.TpCase(name="matrix", dp=2, dtype="bf16")
_AUTOTP_CONFIG = {
    **OWN,
    "vocab_size": _AUTOTP.vocab,
    "hidden_size": tp.HIDDEN,
    "intermediate_size": tp.INNER,
    "num_hidden_layers": tp.LAYERS,
    "num_attention_heads": tp.HEADS,
    "num_key_value_heads": _AUTOTP.kv_heads,
    "head_dim": tp.HIDDEN // tp.HEADS,
}
_PIPELINE = Case(name="matrix", world=4, launcher="pipeline", pipeline_stages=2, scheduler=False, frozen=False)


@dataclass(frozen=True)
class Source:
    """A row: what wrote the checkpoint, and its place below the folder of all of them.

    `config` is the model's ``config.json`` where the checkpoint has none but the model is one of Hugging Face's;
    `named` says that the tensors then have Hugging Face's names. `options` go to the reader with a program.
    """

    label: str
    place: str
    config: Mapping[str, Any] | None = None
    named: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def reading(self) -> dict[str, Any]:
        """What a user says so that it is read by logical names."""
        if not self.named or self.config is None:
            return {}
        known, sizes = from_config(self.config), {"d": self.config["head_dim"]}
        return {"program": known.program, "sizes": sizes, "flags": known.flags, "read_options": self.options}


_DCP = {
    "ddp": "DDP",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "fsdp2 flat": "FSDP2, flattened optimizer",
    "hsdp": "HSDP",
    "fsdp2+tp": "FSDP2 + TP",
}

ROWS = (
    Source("Hugging Face, sharded safetensors", "plain/hf"),
    Source("Hugging Face, `pytorch_model.bin`", "plain/bin"),
    Source("PEFT adapter", "plain/adapter"),
    Source("torch's Hugging Face writer, sharded by rank", "plain/torch-hf"),
    Source("HF Trainer", "trainer/ckpt"),
    Source("Accelerate", "accelerate/ckpt"),
    Source("Lightning", "lightning/ckpt"),
    Source("`torch.save` of model and optimizer", "plain/model.pt", OWN, named=True),
    *(Source(f"DCP: {label}", f"{kind}/ckpt", OWN, named=True) for kind, label in _DCP.items()),
    *(Source(kind.replace("deepspeed", "DeepSpeed"), f"{kind}/ckpt", OWN, named=True) for kind in jobs.ZERO),
    Source("DeepSpeed ZeRO-1 bf16, AutoTP 2", "autotp/ckpt", _AUTOTP_CONFIG, named=True, options={"joined": "yes"}),
    Source("DeepSpeed ZeRO-1, 2 pipeline stages", "pipeline/ckpt"),
    Source("DeepSpeed ZeRO-1, experts over 2 ranks", "moe/ckpt"),
    Source("DeepSpeed universal", "made/deepspeed-universal", OWN, named=True),
    Source("Megatron-Core torch_dist, fully_reshardable", "megatron/fully_reshardable", _MEGATRON_CONFIG),
    Source("Megatron-Core torch_dist, dp_reshardable", "megatron/dp_reshardable", _MEGATRON_CONFIG),
    Source("Megatron `mp_rank_XX`", "megatron/legacy", _MEGATRON_CONFIG),
    Source("Megatron-Core torch_dist, PP 2 × VPP 2", "megatron-virtual/plain", _MEGATRON_CONFIG),
    Source("Megatron-Core torch_dist, experts over 2 ranks", "megatron-experts/fully_reshardable", _EXPERTS_CONFIG),
    Source("ByteCheckpoint (emulated)", "bytecheckpoint", OWN, named=True),
    Source("native shards of ucp, FSDP2", "fsdp2/native", OWN, named=True),
    Source("plain safetensors", "made/safetensors", OWN, named=True),
    Source("universal", "made/universal", OWN, named=True),
)


def make(folder: Path) -> None:
    """Run every job; their checkpoints lie in `folder` at the places of `ROWS`."""
    request = {"folder": str(folder), "jobs": [*jobs.TORCH, *jobs.ZERO]}
    run_module("tests.matrix.jobs", json.dumps(request), timeout=900)
    for kind in ("trainer", "accelerate", "lightning"):
        torch_jobs.make(kind, folder / kind)
    moe_job.run_jobs({folder / "moe": MoeCase(name="matrix")})
    run_jobs({folder / "pipeline": _PIPELINE})
    tp_job.run_jobs({folder / "autotp": _AUTOTP})
    places = {"megatron": _MEGATRON, "megatron-virtual": _VIRTUAL, "megatron-experts": _EXPERTS}
    trained = megatron_trained.train(list(places.values()), folder / "megatron-jobs")
    for place, job in places.items():
        trained[job.name].folder.rename(folder / place)
    _save_with_bytecheckpoint(folder / "plain" / "model.pt", folder / "bytecheckpoint")
    for family, options in (("universal", {}), ("deepspeed-universal", {}), ("safetensors", {"states": "all"})):
        convert(str(folder / "deepspeed ZeRO-2" / "ckpt"), str(folder / "made" / family), to=family, **options)


def _save_with_bytecheckpoint(plain: Path, folder: Path) -> None:
    """What the plain job saved, as ByteCheckpoint would have: it cannot be installed beside a current torch."""
    import torch

    saved = torch.load(plain)
    names = [name for group in saved["optimizer"]["param_groups"] for name in group["param_names"]]
    states: dict[tuple[str, ...], Any] = {
        ("state", names[number], state): tensor
        for number, held in saved["optimizer"]["state"].items()
        for state, tensor in held.items()
    }
    groups = [{**group, "params": group["param_names"]} for group in saved["optimizer"]["param_groups"]]
    states["param_groups",] = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    bytecheckpoint_emulated.save(folder, model=saved["model"], optimizer=states, extra=[{"step": saved["step"]}])
