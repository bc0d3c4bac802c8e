"""Which shipped program a Hugging Face model needs, and the sizes and flags that its ``config.json`` gives.

Sizes serve where names and shapes leave one open: ``[heads d, hidden]`` tells the product of heads and d only.
Keys and defaults: transformers, ``models/<model_type>/configuration_<model_type>.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import FitError

Config = Mapping[str, Any]

PROGRAMS = {
    "gpt2": "hf_gpt2",
    "gpt_neox": "hf_gpt_neox",
    "llama": "hf_llama",
    "mistral": "hf_llama",
    "mixtral": "hf_mixtral",
    "phi3": "hf_phi3",
    "qwen2": "hf_qwen2",
    "qwen3": "hf_qwen3",
    "qwen3_moe": "hf_qwen3_moe",
}
"""Stem of the shipped program for each ``model_type``."""

_SIZES = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "d": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner"),
    "experts": ("num_local_experts", "num_experts"),
    "ffn_moe": ("moe_intermediate_size",),
    "positions": ("n_positions", "max_position_embeddings"),
}
"""Keys that give a size; the first that is there and not null."""

_NOT_TIED = ("gpt_neox", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
"""Models whose head is not tied where ``tie_word_embeddings`` is not given."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a configuration says: the program's stem, and every size and flag of it that the configuration gives."""

    program: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


def from_config(config: Config, *, in_memory: bool = False) -> Known:
    """Program, sizes and flags for the ``config.json`` of a Hugging Face model.

    `in_memory`: the names are those of a transformers 5 module's ``state_dict()``, not of files.

    Raises FitError if no program is shipped for its ``model_type``.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in PROGRAMS:
        raise FitError(
            f"no program is shipped for model_type {kind!r:.80}; there are programs for {', '.join(sorted(PROGRAMS))}",
            hint="write one: docs/cookbook.md",
        )
    return Known(PROGRAMS[kind], _sizes(kind, config), _flags(kind, config, in_memory=in_memory))


def _sizes(kind: str, config: Config) -> dict[str, int]:
    found = {size: value for size, keys in _SIZES.items() if (value := _first(config, keys)) is not None}
    if "d" not in found and found.get("heads") and "hidden" in found:
        found["d"] = found["hidden"] // found["heads"]
    if kind == "gpt2" and "hidden" in found:
        found.setdefault("ffn", 4 * found["hidden"])
    if kind == "mixtral" and "ffn" in found:
        found["ffn_moe"] = found.pop("ffn")
    return found


def _first(config: Config, keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _flags(kind: str, config: Config, *, in_memory: bool) -> dict[str, bool]:
    found = {"tied": bool(config.get("tie_word_embeddings", kind not in _NOT_TIED))}
    if kind in ("llama", "mistral", "qwen3", "qwen3_moe", "gpt_neox"):
        found["attention_bias"] = bool(config.get("attention_bias", kind == "gpt_neox"))
    if kind in ("llama", "mistral"):
        found["mlp_bias"] = bool(config.get("mlp_bias", False))
    if kind in ("qwen3_moe", "mixtral", "gpt_neox"):
        found["in_memory"] = in_memory
    return found
