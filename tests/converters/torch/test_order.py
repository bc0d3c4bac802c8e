"""The order in which models make their parameters, against the models of transformers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ucp.converters._torch.order import module_order

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    ("llama", {**SMALL, "tie_word_embeddings": True}),
    ("mistral", SMALL),
    ("qwen2", SMALL),
    ("qwen3", {**SMALL, "attention_bias": True}),
    ("gpt2", {"vocab_size": 31, "n_embd": 16, "n_layer": 11, "n_head": 4, "n_positions": 16}),
    ("gpt_neox", SMALL),
    ("gpt_neox", {**SMALL, "attention_bias": False}),
]


def names_of(model_type: str, sizes: dict[str, Any]) -> list[str]:
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(("model_type", "sizes"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_order_is_the_module_s(model_type: str, sizes: dict[str, Any]) -> None:
    names = names_of(model_type, sizes)
    assert module_order(sorted(names), model_type) == names


def test_nothing_is_told_of_other_names_or_models() -> None:
    names = names_of("llama", SMALL)
    assert module_order(names, "mixtral") is None
    assert module_order(names, None) is None
    assert module_order([*names, "model.adapter.weight"], "llama") is None
    assert module_order([*names, "model.layers.0.input_layernorm.scale"], "llama") is None
    assert module_order(["model.layers.norm.weight"], "llama") is None
