"""Ranks of GPT-NeoX, EMULATED: real Hugging Face modules cut up as EleutherAI's own exporter joins them.

The exporter is tools/ckpts/convert_neox_to_hf.py of EleutherAI/gpt-neox: its lists of names, which dim is joined, and
that biases of row-parallel layers are summed. Nothing here uses the programs that are tested with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]

_COLUMNS = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
_ROWS = ("attention.dense.weight", "dense_4h_to_h.weight")
_ROW_BIASES = ("attention.dense.bias", "dense_4h_to_h.bias")


def ranks(
    state: Arrays, tp: int, *, layers: int, parallel: bool, tied: bool = False, divisible: int = 128
) -> list[dict[str, np.ndarray]]:
    """What each of `tp` ranks holds of a GPTNeoXForCausalLM."""
    made: list[dict[str, np.ndarray]] = [{} for _ in range(tp)]
    for name, array in state.items():
        found = re.fullmatch(r"gpt_neox\.layers\.(\d+)\.(.*)", name)
        if found:
            local = f"{int(found[1]) + 2}.{found[2]}"
        else:
            local = {
                "gpt_neox.embed_in.weight": "0.word_embeddings.weight",
                "gpt_neox.final_layer_norm.weight": f"{layers + 3}.norm.weight",
                "gpt_neox.final_layer_norm.bias": f"{layers + 3}.norm.bias",
                "lm_head.weight": f"{layers + 4}.final_linear.weight",
            }[name]
        if tied and name == "lm_head.weight":
            continue
        if tied and name == "gpt_neox.embed_in.weight":
            local = "tied_modules.embed.word_embeddings.weight"
        for rank, part in enumerate(_parts(local, array, tp, parallel, divisible)):
            made[rank][local] = np.ascontiguousarray(part)
    return made


def _parts(name: str, array: np.ndarray, tp: int, parallel: bool, divisible: int) -> list[np.ndarray]:
    if name.endswith(("word_embeddings.weight", "final_linear.weight")):
        unit = divisible * tp
        rows = -(-array.shape[0] // unit) * unit
        return np.split(np.pad(array, [(0, rows - array.shape[0]), (0, 0)]), tp)
    if name.endswith(_COLUMNS):
        return np.split(array, tp)
    if name.endswith(_ROWS):
        return np.split(array, tp, axis=1)
    if name.endswith(_ROW_BIASES) and parallel:
        return _summands(array, tp)
    return [array] * tp


def _summands(array: np.ndarray, tp: int) -> list[np.ndarray]:
    """Different values on every rank that make up `array` when added, without rounding."""
    first = np.round(array * 8) / 8
    return [array] if tp == 1 else [first, array - first, *[np.zeros_like(array)] * (tp - 2)]


def llama_ranks(state: Arrays, tp: int, *, layers: int) -> list[dict[str, np.ndarray]]:
    """What each of `tp` ranks holds of a LlamaForCausalLM, as NeoX's `llama` architecture with grouped queries."""
    made: list[dict[str, np.ndarray]] = []
    for rank in range(tp):
        here: dict[str, np.ndarray] = {
            f"{layers + 3}.norm.scale": state["model.norm.weight"],
            "0.word_embeddings.weight": np.split(state["model.embed_tokens.weight"], tp)[rank],
            f"{layers + 4}.final_linear.weight": np.split(state["lm_head.weight"], tp)[rank],
        }
        for layer in range(layers):
            here.update(_llama_layer(state, f"model.layers.{layer}.", f"{layer + 2}.", rank, tp))
        made.append({name: np.ascontiguousarray(array) for name, array in here.items()})
    return made


def _llama_layer(state: Arrays, source: str, target: str, rank: int, tp: int) -> dict[str, np.ndarray]:
    def rows(*names: str) -> np.ndarray:
        return np.concatenate([np.split(state[f"{source}{name}.weight"], tp)[rank] for name in names])

    def columns(name: str) -> np.ndarray:
        return np.split(state[f"{source}{name}.weight"], tp, axis=1)[rank]

    return {
        f"{target}input_layernorm.scale": state[f"{source}input_layernorm.weight"],
        f"{target}post_attention_layernorm.scale": state[f"{source}post_attention_layernorm.weight"],
        f"{target}attention.query_key_value.weight": rows("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        f"{target}attention.dense.weight": columns("self_attn.o_proj"),
        f"{target}mlp.linear1.weight": rows("mlp.up_proj", "mlp.gate_proj"),
        f"{target}mlp.linear2.weight": columns("mlp.down_proj"),
    }
