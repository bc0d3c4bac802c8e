"""Ranks of frameworks that cannot be installed here, EMULATED: Megatron-Core's real shards renamed and rearranged.

What each framework saves is taken from its source: names of modules, and the order of rows that its attention and MLP
take apart. Nothing here uses the programs that are tested with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tests.support.megatron import Model

Arrays = Mapping[str, np.ndarray]

_MODULES = {
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


def transformer_engine(state: Arrays, model: Model) -> dict[str, np.ndarray]:
    """Megatron-Core's names with Transformer Engine layers (megatron/core/models/gpt/gpt_layer_specs.py)."""
    return {_engine_name(name, model): array for name, array in state.items()}


def _engine_name(name: str, model: Model) -> str:
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    name = re.sub(r"\.experts\.local_experts\.(\d+)\.(.*)", r".experts.\2\1", name)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer and (model.experts is None or (model.expert_layers and not model.expert_layers[int(layer[1])])):
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return name


def renamed(name: str) -> str:
    """Name in Megatron-LM before Megatron-Core (megatron/model/language_model.py and transformer.py of 2023)."""
    for core, legacy in _MODULES.items():
        name = name.replace(f".{core}.", f".{legacy}.")
    return re.sub(r"^decoder\.", "encoder.", name)


def legacy(state: Arrays, model: Model) -> dict[str, np.ndarray]:
    """`model` of a ``model_optim_rng.pt``, nested dicts joined by dots."""
    head = "word_embeddings_for_head.weight" if model.tied else "language_model.output_layer.weight"
    return {
        head if name == "output_layer.weight" else f"language_model.{renamed(name)}": array
        for name, array in state.items()
    }


def of_2021(state: Arrays, model: Model) -> dict[str, np.ndarray]:
    """The same in the names of 2021."""
    words = {"language_model.encoder.": "language_model.transformer.", ".self_attention.": ".attention."}
    made = {}
    for name, array in legacy(state, model).items():
        old = name
        for word, before in words.items():
            old = old.replace(word, before)
        made[old] = array
    return made


def deepspeed(state: Arrays, model: Model, *, first: int, behind: int) -> dict[str, np.ndarray]:
    """Megatron-DeepSpeed's pipeline: the number of the pipeline's layer, then names inside it."""
    final = first + model.layers + behind
    heads = {
        "embedding.": "tied_modules.embed." if model.tied else "1.",
        "encoder.final_layernorm.": f"{final}.",
        "output_layer.": f"{final + 1}.lm_head.",
    }
    return {_deepspeed_name(renamed(name), heads, first): array for name, array in state.items()}


def _deepspeed_name(name: str, heads: Mapping[str, str], first: int) -> str:
    for start, number in heads.items():
        if name.startswith(start):
            return number + name.removeprefix(start)
    layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
    return f"{int(layer) + first}.{rest}"


def rearranged(state: Arrays, model: Model, order: str) -> dict[str, np.ndarray]:
    """With the rows of queries, keys and values of each rank in another order."""
    fused = "query_key_value"
    return {name: _fused_rows(array, model, order) if fused in name else array for name, array in state.items()}


def _fused_rows(array: np.ndarray, model: Model, order: str) -> np.ndarray:
    d, r = model.hidden // model.heads, model.heads // model.groups
    rest = array.shape[1:]
    by_group = array.reshape(-1, r + 2, d, *rest)
    if order == "kind":  # all queries, all keys, all values
        parts = by_group[:, :r], by_group[:, r], by_group[:, r + 1]
        return np.concatenate([part.reshape(-1, *rest) for part in parts])
    if order == "element":  # query, key and value of every element in turn: [heads, d, 3]
        return np.moveaxis(by_group, 1, 2).reshape(array.shape)
    raise ValueError(order)
