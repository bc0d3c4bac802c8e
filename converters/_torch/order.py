"""The order in which Hugging Face models make their parameters, which files of safetensors do not keep.

Each list has the parts of a name in the order in which the module's ``__init__`` makes them
(transformers, ``models/<model_type>/modeling_<model_type>.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LLAMA = """
    model.embed_tokens
    model.layers.{}.self_attn.q_proj model.layers.{}.self_attn.k_proj model.layers.{}.self_attn.v_proj
    model.layers.{}.self_attn.o_proj model.layers.{}.self_attn.q_norm model.layers.{}.self_attn.k_norm
    model.layers.{}.mlp.gate_proj model.layers.{}.mlp.up_proj model.layers.{}.mlp.down_proj
    model.layers.{}.input_layernorm model.layers.{}.post_attention_layernorm
    model.norm lm_head
"""
_GPT2 = """
    transformer.wte transformer.wpe
    transformer.h.{}.ln_1 transformer.h.{}.attn.c_attn transformer.h.{}.attn.c_proj
    transformer.h.{}.ln_2 transformer.h.{}.mlp.c_fc transformer.h.{}.mlp.c_proj
    transformer.ln_f lm_head
"""
_GPT_NEOX = """
    gpt_neox.embed_in
    gpt_neox.layers.{}.input_layernorm gpt_neox.layers.{}.post_attention_layernorm
    gpt_neox.layers.{}.attention.query_key_value gpt_neox.layers.{}.attention.dense
    gpt_neox.layers.{}.mlp.dense_h_to_4h gpt_neox.layers.{}.mlp.dense_4h_to_h
    gpt_neox.final_layer_norm embed_out lm_head
"""
_ORDERS = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_ENDS = ("weight", "bias")


def module_order(names: Iterable[str], model_type: str | None) -> list[str] | None:
    """`names` in the order of the module; None for another model, or where a name is none of this one's."""
    if model_type not in _ORDERS:
        return None
    parts = _ORDERS[model_type].split()
    repeated = [k for k, part in enumerate(parts) if "{}" in part]
    keys: dict[str, tuple[int, int, int, int]] = {}
    for name in names:
        module, _, end = name.rpartition(".")
        layer = _LAYER.search(module + ".")
        part = _LAYER.sub("{}", module + ".", count=1)[:-1]
        if part not in parts or end not in _ENDS or ("{}" in part) != (layer is not None):
            return None
        place = parts.index(part)
        section = 0 if place < repeated[0] else 1 if place in repeated else 2
        keys[name] = (section, int(layer[0]) if layer else 0, place, _ENDS.index(end))
    return sorted(keys, key=lambda name: keys[name])
