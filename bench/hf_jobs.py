"""The sources of `bench.hf`, and what other libraries do with them; each command is a process of its own.

    python -m bench.hf_jobs model FOLDER MILLIONS          a random Llama in several files
    python -m bench.hf_jobs shards MODEL FOLDER RANKS      the same as torch's ranks save it
    python -m bench.hf_jobs reshard SOURCE OUTPUT SIZE     transformers loads and saves
    python -m bench.hf_jobs consolidate SOURCE OUTPUT      torch puts the ranks' files together
    python -m bench.hf_jobs megatron SOURCE OUTPUT         in memory, and saved by Megatron-Core

The last renames and joins tensors in memory as Megatron-LM's ``tools/checkpoint/loader_llama_mistral.py`` does, and
saves with ``megatron.core.dist_checkpointing``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE_SIZE = "200MB"
"""Of the source."""


def model(folder: str, millions: str) -> None:
    """Save a Llama of about so many parameters, random, in float32."""
    import torch
    import transformers

    hidden, vocab = 1024, 32000
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * 2816
    layers = max(2, round((float(millions) * 1e6 - 2 * vocab * hidden) / layer))
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=FILE_SIZE)


def shards(source: str, folder: str, ranks: str) -> None:
    """Save the model of `source` as ranks do that hold equal rows of every tensor."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as meet:
        spawn(_save_shards, (source, folder, int(ranks), meet), nprocs=int(ranks))  # type: ignore[no-untyped-call]


def _save_shards(rank: int, source: str, folder: str, ranks: int, meet: str) -> None:
    from torch import distributed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in _tensors(source).items()}
    save(state, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    distributed.destroy_process_group()


def reshard(source: str, output: str, size: str) -> None:
    """What everybody does: load the model, save it."""
    import transformers

    loaded: Any = transformers.LlamaForCausalLM.from_pretrained(source)
    loaded.save_pretrained(output, max_shard_size=size)


def consolidate(source: str, output: str) -> None:
    """One file of the ranks' files, by torch's own function."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    names = {name for path in Path(source).glob("*.safetensors") for name in _names(path)}
    os.makedirs(output)
    consolidate_safetensors_files(source, output, dict.fromkeys(names, 1), num_threads=2)


def megatron(source: str, output: str) -> None:
    """Load everything, rename and join in memory, save for one rank."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from torch import distributed

    if not torch.cuda.is_available():
        # It waits for copies from the accelerator, and makes a flag on it, whether there is one or not.
        for name, instead in {"synchronize": lambda: None, "current_device": lambda: "cpu"}.items():
            setattr(torch.cuda, name, instead)

    config = json.loads(Path(source, "config.json").read_text())
    with tempfile.TemporaryDirectory() as meet:
        distributed.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        state = _as_megatron(_tensors(source), config)
        os.makedirs(output)
        dist_checkpointing.save(state, output)
        distributed.destroy_process_group()


def _as_megatron(held: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sharded tensors of Megatron-Core's GPT, one layer after the other stacked under one key."""
    from megatron.core.dist_checkpointing import ShardedTensor

    layers, groups = config["num_hidden_layers"], config["num_key_value_heads"]
    made: dict[str, Any] = {}

    def put(key: str, tensor: Any, layer: int | None = None) -> None:
        place = ((0, layer, layers),) if layer is not None else ()
        made[f"{key}.{layer}"] = ShardedTensor.from_rank_offsets(key, tensor, *place, prepend_axis_num=len(place))

    put("embedding.word_embeddings.weight", held["model.embed_tokens.weight"])
    put("decoder.final_layernorm.weight", held["model.norm.weight"])
    put("output_layer.weight", held["lm_head.weight"])
    for layer in range(layers):
        for key, tensor in _layer(held, f"model.layers.{layer}.", groups).items():
            put(f"decoder.layers.{key}", tensor, layer)
    return made


def _layer(held: Mapping[str, Any], prefix: str, groups: int) -> dict[str, Any]:
    """The tensors of a layer; queries, keys and values lie together by group."""
    import torch

    parts = [held[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    split = [part.reshape(groups, -1, part.shape[1]) for part in parts]
    return {
        "self_attention.linear_qkv.weight": torch.cat(split, dim=1).reshape(-1, parts[0].shape[1]),
        "self_attention.linear_proj.weight": held[f"{prefix}self_attn.o_proj.weight"],
        "self_attention.linear_qkv.layer_norm_weight": held[f"{prefix}input_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([held[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]),
        "mlp.linear_fc2.weight": held[f"{prefix}mlp.down_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": held[f"{prefix}post_attention_layernorm.weight"],
    }


def _tensors(folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


JOBS: dict[str, Callable[..., None]] = {job.__name__: job for job in (model, shards, reshard, consolidate, megatron)}

if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
