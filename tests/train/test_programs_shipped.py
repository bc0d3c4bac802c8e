"""From a model of one framework to ranks of another and back: by the names that shipped programs share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import ucp
from tests.format.build import write
from tests.mapping.made import part, read
from tests.train.handmade import make
from ucp.checkpoint import Checkpoint
from ucp.lang import load_program
from ucp.lang.export import export
from ucp.layout import Mesh
from ucp.mapping import consolidate
from ucp.store import LocalStore, open_store

transformers = pytest.importorskip("transformers")


def llama(seed: int, *, tied: bool) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_goes_to_ranks_of_megatron_and_back(tmp_path, tied):
    model = llama(0, tied=tied)
    tensors = {
        name: {"value": p.detach(), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
        for name, p in model.named_parameters()
    }
    ties = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    catalog, store = make(str(tmp_path / "made"), tensors, steps=dict.fromkeys(tensors, 9.0), ties=ties)
    write(catalog, LocalStore(store.url), tmp_path / "hf")
    ucp.convert(
        str(tmp_path / "hf"), str(tmp_path / "logical"), program="hf_llama", sizes={"heads": 4, "groups": 2, "d": 4}
    )
    middle = ucp.open(tmp_path / "logical")
    assert ("lm_head.weight" in middle.names) is not tied

    other = llama(1, tied=tied)
    optimizer = torch.optim.AdamW(other.parameters())
    ucp.load((other, optimizer), middle, program="source", hyper_parameters=False)
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert torch.equal(optimizer.state[mine]["exp_avg"], tensors[name]["exp_avg"]), name

    back = through_megatron(middle, tmp_path / "megatron")
    assert set(back.catalog.tensors) == set(middle.names)
    for name, state in itertools.product(middle.names, ("value", "exp_avg")):
        expected = middle[name][state][...].numpy()
        np.testing.assert_array_equal(read(back.catalog, back.store, name, state), expected, err_msg=name)
    assert back.ties == middle.ties


def through_megatron(middle: Checkpoint, folder) -> Checkpoint:
    """Every rank of two stages of two ranks loads what it holds, saves it, and all are put together again."""
    program, mesh, sizes = load_program("megatron_core_gpt"), Mesh({"pp": 2, "tp": 2}), {"groups": 2, "r": 2, "d": 4}
    flags = {"te": False, "swiglu": True, "tied": bool(middle.ties)}
    logical = {name: middle[name].shape for name in middle.names}
    exporter = export(program, logical, mesh=mesh, sizes=sizes, flags=flags, ties=middle.ties)
    store, parts = open_store(str(folder)), []
    for coordinate in mesh.coordinates():
        shapes = {shard.name: shard.shape for shard in exporter.shards([coordinate])}
        room = {name: {"value": torch.full(n, 7.0), "exp_avg": torch.full(n, 7.0)} for name, n in shapes.items()}
        here = {"mesh": mesh, "coordinate": coordinate, "sizes": sizes, "flags": flags}
        ucp.load(room, middle, program="megatron_core_gpt", **here)
        arrays = {name: {state: tensor.numpy() for state, tensor in states.items()} for name, states in room.items()}
        parts.append(part(store, coordinate, arrays))
    found = consolidate(parts, program, mesh=mesh, sizes={**sizes, "vocab": 50}, flags=flags)
    return Checkpoint(found, store)
