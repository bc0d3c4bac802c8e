"""``args`` of a checkpoint: the source's own where it was Megatron's, else what tensors and configuration tell.

Names of arguments: megatron/training/arguments.py; which of them a job takes or compares when it loads:
megatron/training/checkpointing.py, ``load_args_from_checkpoint`` and ``check_checkpoint_args``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.container.values import Reference
from ucp.tree import Opaque, Tree

from .._deepspeed_universal.carry import Drop, carry
from .write_choice import Choice

_LAYER = re.compile(r"layers\.(\d+)\.")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
_STAGES = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Which layers were whose in the source."""

_FROM_HF = {
    "rotary_base": ("rope_theta",),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "moe_router_topk": ("num_experts_per_tok",),
}


def namespace(
    catalog: Catalog,
    choice: Choice,
    sizes: Mapping[str, int],
    *,
    rows: int,
    iteration: int,
    samples: int | None,
    drop: Drop,
) -> Opaque:
    """The ``argparse.Namespace`` to be written.

    `sizes` are those of the program, `rows` those of the padded vocabulary. `drop` is told what of the source's own
    arguments is left out.
    """
    own = carry({str(key): value for key, value in choice.args.values.items()}, "args", drop)
    derived = _derived(catalog, sizes)
    if own:
        # Where it does not tell its vocabulary, what was read may be padding too.
        derived.pop("vocab_size", None)
    # Of booleans here no is the default, of all else None.
    undone = {key: False if isinstance(own[key], bool) else None for key in _STAGES if key in own}
    values = {**derived, **own, **undone, **_layout(choice, rows), **_dtypes(choice, own)}
    values["untie_embeddings_and_output_weights"] = "lm_head.weight" in catalog.tensors
    values["iteration"] = iteration
    if samples is not None or not own:
        values["consumed_train_samples"] = samples or 0
        values.setdefault("consumed_valid_samples", 0)
    if choice.optimizer == "none":
        values["no_save_optim"] = True
    return Opaque("argparse", "Namespace", state=values)


def _derived(catalog: Catalog, sizes: Mapping[str, int]) -> dict[str, Tree]:
    """What shapes and names say of the model."""
    names = catalog.tensors
    layers = 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=-1)
    groups = sizes.get("groups")
    heads = sizes.get("heads") or (groups * sizes["r"] if groups and "r" in sizes else None)
    found: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": sizes.get("hidden"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "kv_channels": sizes.get("d"),
        "ffn_hidden_size": sizes.get("ffn") or sizes.get("ffn_moe"),
        "vocab_size": names["embed.weight"].states["value"].shape[0] if "embed.weight" in names else None,
        "num_experts": sizes.get("experts"),
        "moe_ffn_hidden_size": sizes.get("ffn_moe"),
        "moe_shared_expert_intermediate_size": sizes.get("ffn_shared"),
        "untie_embeddings_and_output_weights": "lm_head.weight" in names,
        "swiglu": any(name.endswith(("mlp.gate.weight", "moe.gate")) for name in names),
        "normalization": "LayerNorm" if "norm.bias" in names else "RMSNorm",
        "position_embedding_type": "learned_absolute" if "pos_embed.weight" in names else "rope",
        "add_bias_linear": any(name.endswith("attn.o.bias") for name in names),
        "add_qkv_bias": any(name.endswith("attn.q.bias") for name in names),
        "qk_layernorm": any(name.endswith("attn.q_norm.weight") for name in names),
    }
    found |= _configured(catalog)
    if "pos_embed.weight" in names:
        found["max_position_embeddings"] = names["pos_embed.weight"].states["value"].shape[0]
    return {key: value for key, value in found.items() if value is not None}


def _configured(catalog: Catalog) -> dict[str, Any]:
    config = catalog.state.get("hf_config")
    if not isinstance(config, dict):
        return {}
    rope = config.get("rope_parameters")
    config = {**(rope if isinstance(rope, dict) else {}), **config}
    told = {key: next((config[k] for k in keys if k in config), None) for key, keys in _FROM_HF.items()}
    return {key: value for key, value in told.items() if isinstance(value, int | float)}


def _layout(choice: Choice, rows: int) -> dict[str, Tree]:
    degrees = choice.degrees
    return {
        "tensor_model_parallel_size": degrees["tp"],
        "pipeline_model_parallel_size": degrees["pp"],
        "virtual_pipeline_model_parallel_size": degrees["vpp"] if degrees["vpp"] > 1 else None,
        "expert_model_parallel_size": degrees["ep"],
        "expert_tensor_parallel_size": degrees["etp"],
        "make_vocab_size_divisible_by": choice.divisible,
        "padded_vocab_size": rows,
        "transformer_impl": "transformer_engine" if choice.te else "local",
        "ckpt_format": "torch_dist" if choice.form == "torch_dist" else "torch",
        **_uneven(choice.stages),
    }


def _uneven(stages: Sequence[int]) -> dict[str, Tree]:
    """Stages of another depth; those between the first and the last are alike."""
    if len(stages) < 2:
        return {}
    return {"decoder_first_pipeline_num_layers": stages[0], "decoder_last_pipeline_num_layers": stages[-1]}


def _dtypes(choice: Choice, own: Mapping[str, Tree]) -> dict[str, Tree]:
    found: dict[str, Tree] = {}
    if choice.optimizer != "none":
        found["use_distributed_optimizer"] = choice.optimizer == "distributed"
    if choice.dtype is not None:
        found |= {flag: flag == _DTYPES.get(choice.dtype) for flag in _DTYPES.values()}
        found["params_dtype"] = Reference("torch", choice.dtype)
    return found if choice.dtype is not None or not own else {k: v for k, v in found.items() if k not in own}
