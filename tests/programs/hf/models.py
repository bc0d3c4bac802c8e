"""One tiny model per family and variant, with random values in every parameter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.numpy import load_file
from torch.nn import functional

from tests.programs.reference import Shape

DENSE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SQUARE = {name: value for name, value in DENSE.items() if name != "head_dim"}
MOE = {**DENSE, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NEOX = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {**MOE, "moe_intermediate_size": 12, "num_experts": 4}


@dataclass(frozen=True)
class Case:
    """A program, and a model's class and configuration that it is for."""

    program: str
    model: str
    config: dict[str, Any]
    parallel: bool = False
    in_memory: bool = False
    """Whether state_dict() has other names than the files."""
    plan: bool = True
    """Whether transformers has a plan to cut it across tensor-parallel ranks."""


CASES = {
    "llama": Case("hf_llama", "LlamaForCausalLM", DENSE),
    "llama-tied": Case("hf_llama", "LlamaForCausalLM", {**DENSE, "tie_word_embeddings": True}),
    "llama-square": Case("hf_llama", "LlamaForCausalLM", SQUARE),
    "llama-square-tied": Case("hf_llama", "LlamaForCausalLM", {**SQUARE, "tie_word_embeddings": True}),
    "llama-bias": Case("hf_llama", "LlamaForCausalLM", {**DENSE, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("hf_llama", "MistralForCausalLM", DENSE),
    "qwen2": Case("hf_qwen2", "Qwen2ForCausalLM", SQUARE),
    "qwen2-tied": Case("hf_qwen2", "Qwen2ForCausalLM", {**SQUARE, "tie_word_embeddings": True}),
    "qwen3": Case("hf_qwen3", "Qwen3ForCausalLM", DENSE),
    "qwen3-tied-bias": Case(
        "hf_qwen3", "Qwen3ForCausalLM", {**DENSE, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "qwen3-moe": Case("hf_qwen3_moe", "Qwen3MoeForCausalLM", QWEN3_MOE, in_memory=True),
    "qwen3-moe-dense": Case(
        "hf_qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**QWEN3_MOE, "mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": True},
        in_memory=True,
    ),
    "mixtral": Case("hf_mixtral", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}, in_memory=True),
    "phi3": Case("hf_phi3", "Phi3ForCausalLM", {**SQUARE, "pad_token_id": 0}, plan=False),
    "phi3-tied": Case(
        "hf_phi3", "Phi3ForCausalLM", {**SQUARE, "pad_token_id": 0, "tie_word_embeddings": True}, plan=False
    ),
    "gpt2": Case("hf_gpt2", "GPT2LMHeadModel", GPT2, plan=False),
    "gpt2-untied": Case(
        "hf_gpt2", "GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 20}, plan=False
    ),
    "gpt-neox": Case("hf_gpt_neox", "GPTNeoXForCausalLM", NEOX, in_memory=True, parallel=True),
    "gpt-neox-bare": Case(
        "hf_gpt_neox",
        "GPTNeoXForCausalLM",
        {**NEOX, "attention_bias": False, "use_parallel_residual": False},
        in_memory=True,
    ),
}


def config(case: Case) -> Any:
    """The configuration, as an object of transformers."""
    return model_class(case).config_class(**case.config)


def model_class(case: Case) -> Any:
    return getattr(transformers, case.model)


def model(case: Case, *, seed: int = 0) -> Any:
    """The module, in double precision for comparing what it computes, with values of its own in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    made = model_class(case)._from_config(config(case), experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return made


def arrays(module: torch.nn.Module) -> dict[str, Any]:
    """Its state_dict as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def saved(module: Any, folder: Path) -> dict[str, Any]:
    """What save_pretrained writes, read by safetensors."""
    module.save_pretrained(folder)
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def shape(case: Case) -> Shape:
    """What the reference decoder has to know beside the tensors."""
    c = config(case)
    heads = c.num_attention_heads
    d = getattr(c, "head_dim", None) or c.hidden_size // heads
    rope = getattr(c, "rope_parameters", None)
    act = {"silu": functional.silu, "gelu": functional.gelu, "gelu_new": _gelu_tanh}
    return Shape(
        layers=c.num_hidden_layers,
        heads=heads,
        groups=getattr(c, "num_key_value_heads", None) or heads,
        d=d,
        rotary=int(d * rope.get("partial_rotary_factor", 1)) if rope else 0,
        base=rope["rope_theta"] if rope else 0,
        eps=next(getattr(c, k) for k in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if hasattr(c, k)),
        act=act[getattr(c, "hidden_act", None) or c.activation_function],
        parallel=case.parallel,
        renormalize=getattr(c, "norm_topk_prob", True),
        top_k=getattr(c, "num_experts_per_tok", 0),
    )


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")
