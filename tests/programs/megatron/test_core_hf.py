"""The same logical tensors in Megatron-Core and in Hugging Face modules compute the same logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.programs.megatron.models import GPT, GRIDS, LLAMA, MIXTRAL, QWEN2, QWEN3, logical
from tests.support.megatron import ONE, Model, tokens
from ucp.lang import load_program
from ucp.lang.arrays import at, scatter
from ucp.layout import Mesh


@dataclass(frozen=True)
class Twin:
    """The Hugging Face model of the same architecture, and the program for it."""

    program: str
    cls: str
    config: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


def _llama_like(model: Model, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_moe if model.experts else model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.hidden // model.heads,
        "max_position_embeddings": model.positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": model.tied,
        **more,
    }


TWINS = {
    LLAMA: Twin("hf_llama", "LlamaForCausalLM", _llama_like(LLAMA), {"attention_bias": False, "mlp_bias": False}),
    QWEN2: Twin("hf_qwen2", "Qwen2ForCausalLM", _llama_like(QWEN2)),
    QWEN3: Twin("hf_qwen3", "Qwen3ForCausalLM", _llama_like(QWEN3), {"attention_bias": False}),
    MIXTRAL: Twin(
        "hf_mixtral",
        "MixtralForCausalLM",
        _llama_like(
            MIXTRAL,
            num_local_experts=MIXTRAL.experts,
            num_experts_per_tok=MIXTRAL.topk,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        {"in_memory": True},
    ),
    GPT: Twin(
        "hf_gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": GPT.vocab,
            "n_embd": GPT.hidden,
            "n_inner": GPT.ffn,
            "n_layer": GPT.layers,
            "n_head": GPT.heads,
            "n_positions": GPT.positions,
            "layer_norm_epsilon": 1e-5,
        },
    ),
}


def _module(model: Model, tensors: dict[str, np.ndarray]) -> Any:
    """The Hugging Face module filled with the logical tensors, through its own strict loading."""
    twin = TWINS[model]
    cls = getattr(transformers, twin.cls)
    module = cls(cls.config_class(**twin.config)).eval()
    sizes = {"heads": model.heads, "d": model.hidden // model.heads}
    made = scatter(
        load_program(twin.program),
        tensors,
        mesh=Mesh({"tp": 1}),
        coordinates=[at(tp=0)],
        sizes=sizes,
        flags={"tied": model.tied, **twin.flags},
    )[at(tp=0)]
    module.load_state_dict({name: torch.from_numpy(array) for name, array in made.items()}, strict=True)
    return module


@pytest.mark.parametrize("model", TWINS, ids=lambda model: model.name)
@pytest.mark.parametrize("many", [False, True], ids=["one rank", "many ranks"])
def test_both_compute_the_same(families, model, many):
    """Logits that Megatron-Core computed on a grid, against a module made of what that grid's ranks held."""
    held = families[model.name].grids[GRIDS[model][-1] if many else ONE]
    module = _module(model, logical(model, held))
    with torch.no_grad():
        logits = module(torch.from_numpy(tokens(model))).logits.numpy()
    np.testing.assert_allclose(logits, held.logits, atol=2e-5)


def test_the_comparison_notices_one_exchanged_pair_of_heads(families):
    """Logits tell layouts apart: with keys and values exchanged they are far off."""
    held = families["llama"].grids[ONE]
    tensors = logical(LLAMA, held)
    k, v = "layers.0.attn.k.weight", "layers.0.attn.v.weight"
    module = _module(LLAMA, {**tensors, k: tensors[v], v: tensors[k]})
    with torch.no_grad():
        logits = module(torch.from_numpy(tokens(LLAMA))).logits.numpy()
    assert np.abs(logits - held.logits).max() > 1e-2
