"""The order in which a rank's modules register parameters, by their local names.

Optimizers number parameters in this order, and the distributed one lays them out in it backwards. Modules: ``GPTModel``
(megatron/core/models/gpt/gpt_model.py), ``TransformerLayer``, ``SelfAttention`` (the projection before queries, keys
and values), ``MLP``, ``MoELayer``. Transformer Engine's linear layers register the norm before them first.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(\w+)\.(\w+)|(\w+)\.([a-z]+)(\d+))")
_OUTSIDE = (
    "embedding.word_embeddings.",
    "embedding.position_embeddings.",
    "decoder.layers.",
    "decoder.final_layernorm.",
    "output_layer.",
)
_MODULES = (
    "input_layernorm.",
    "self_attention.linear_proj.",
    "self_attention.linear_qkv.",
    "self_attention.q_layernorm.",
    "self_attention.k_layernorm.",
    "pre_mlp_layernorm.",
    "mlp.linear_fc1.",
    "mlp.linear_fc2.",
    "mlp.router.",
    "mlp.experts.",
    "mlp.shared_experts.gate_",
    "mlp.shared_experts.linear_fc1.",
    "mlp.shared_experts.linear_fc2.",
)
_PARAMETERS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias", "expert_bias")

Place = tuple[int, ...]


def place(name: str) -> Place | None:
    """Sorts names in the order of registration; None for a name that is not known."""
    match = _LAYER.fullmatch(name)
    outside = _first(_OUTSIDE, name)
    if outside is None:
        return None
    if match is None:
        return (outside, 0, 0, 0, 0, 0, _parameter(name))
    module = _first(_MODULES, match[2])
    if module is None:
        return None
    return (outside, int(match[1]), module, *_expert(match[2]), _parameter(match[2]))


def is_expert(name: str) -> bool:
    """Whether a local name is that of routed experts."""
    return ".mlp.experts." in name


def _expert(name: str) -> tuple[int, int, int]:
    """Experts one by one, each with its layers; grouped ones the other way around, weights before biases."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return 0, 0, 0
    if match[1] is not None:
        return int(match[1]), int(match[2].endswith("fc2")), 0
    return int(match[4].endswith("fc2")), int(match[5] == "bias"), int(match[6])


def _first(starts: tuple[str, ...], name: str) -> int | None:
    return next((i for i, start in enumerate(starts) if name.startswith(start)), None)


def _parameter(name: str) -> int:
    last = name.rpartition(".")[2]
    return _PARAMETERS.index(last) if last in _PARAMETERS else len(_PARAMETERS)
