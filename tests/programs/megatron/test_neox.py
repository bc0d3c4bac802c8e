"""gpt_neox on EMULATED ranks (see `neox`), and what it gives to real Hugging Face modules, which compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from tests.programs.megatron import neox
from tests.programs.megatron.models import assert_same
from ucp.errors import UcpError
from ucp.lang import load_program
from ucp.lang.arrays import at, gather, scatter
from ucp.layout import Mesh

LAYERS, VOCAB = 3, 103
FLAGS = {"tied": False, "parallel_residual": True, "gqa": False, "rms": False, "linear1": False, "gated": False}
HEADS = {"heads": 4, "d": 8, "vocab": VOCAB}


def module(kind: str, *, tied: bool = False, **config):
    torch.manual_seed(4)
    cls = getattr(transformers, kind)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    made = cls(cls.config_class(**common, intermediate_size=44, tie_word_embeddings=tied, **config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


def arrays(of) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in of.state_dict().items()}


def logits(of) -> np.ndarray:
    tokens = torch.arange(40).reshape(2, 20) % VOCAB
    with torch.no_grad():
        return of(tokens).logits.numpy()


def gathered(ranks, flags, sizes):
    shards = {at(tp=rank, dp=0): state for rank, state in enumerate(ranks)}
    mesh = Mesh({"tp": len(ranks), "dp": 1})
    return gather(load_program("gpt_neox"), shards, mesh=mesh, sizes=sizes, flags=flags)


def scattered(tensors, tp, flags, sizes):
    mesh = Mesh({"tp": tp, "dp": 1})
    made = scatter(load_program("gpt_neox"), tensors, mesh=mesh, sizes=sizes, flags=flags)
    return [made[at(tp=rank, dp=0)] for rank in range(tp)]


def refilled(program, tensors, like, *, tied=False, **flags):
    """A new module of the same architecture with the logical tensors, by its own strict loading."""
    made = scatter(
        load_program(program),
        tensors,
        mesh=Mesh({"tp": 1}),
        coordinates=[at(tp=0)],
        sizes={"heads": 4, "d": 8},
        flags={"tied": tied, **flags},
    )[at(tp=0)]
    new = type(like)(like.config).eval()
    new.load_state_dict({name: torch.from_numpy(array) for name, array in made.items()}, strict=True)
    return new


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel residual", "sequential"])
def test_pythia(tp, parallel):
    original = module("GPTNeoXForCausalLM", use_parallel_residual=parallel)
    ranks = neox.ranks(arrays(original), tp, layers=LAYERS, parallel=parallel)
    found = gathered(ranks, {**FLAGS, "parallel_residual": parallel}, HEADS)
    again = refilled("hf_gpt_neox", found, original, attention_bias=True, in_memory=True)
    np.testing.assert_array_equal(logits(again), logits(original))


@pytest.mark.parametrize("tp", [1, 2])
def test_pythia_is_cut_again(tp):
    """Where every rank holds the same bias the program runs both ways."""
    original = module("GPTNeoXForCausalLM", use_parallel_residual=False)
    ranks = neox.ranks(arrays(original), tp, layers=LAYERS, parallel=False)
    flags = {**FLAGS, "parallel_residual": False}
    for made, expected in zip(scattered(gathered(ranks, flags, HEADS), tp, flags, HEADS), ranks, strict=True):
        assert_same(made, expected)


def test_a_tied_head():
    original = module("GPTNeoXForCausalLM", tied=True, use_parallel_residual=True)
    ranks = neox.ranks(arrays(original), 2, layers=LAYERS, parallel=True, tied=True)
    found = gathered(ranks, {**FLAGS, "tied": True}, HEADS)
    again = refilled("hf_gpt_neox", found, original, tied=True, attention_bias=True, in_memory=True)
    np.testing.assert_array_equal(logits(again), logits(original))


def test_summed_biases_are_not_cut_again():
    original = module("GPTNeoXForCausalLM", use_parallel_residual=True)
    found = gathered(neox.ranks(arrays(original), 2, layers=LAYERS, parallel=True), FLAGS, HEADS)
    with pytest.raises(UcpError, match="bias"):
        scattered(found, 2, FLAGS, HEADS)


def test_norms_that_drifted_apart_are_averaged():
    original = module("GPTNeoXForCausalLM", use_parallel_residual=True)
    ranks = neox.ranks(arrays(original), 2, layers=LAYERS, parallel=True)
    name = "3.input_layernorm.weight"
    ranks[1][name] = ranks[1][name] + 1
    found = gathered(ranks, FLAGS, HEADS)["layers.1.attn.norm.weight"]
    np.testing.assert_allclose(found, (ranks[0][name] + ranks[1][name]) / 2, rtol=1e-6)


def test_weights_that_drifted_apart_are_an_error():
    ranks = neox.ranks(
        arrays(module("GPTNeoXForCausalLM", use_parallel_residual=False)), 2, layers=LAYERS, parallel=False
    )
    ranks[1]["3.attention.dense.bias"] = ranks[1]["3.attention.dense.bias"] + 1
    with pytest.raises(UcpError, match=r"3\.attention\.dense\.bias"):
        gathered(ranks, {**FLAGS, "parallel_residual": False}, HEADS)


@pytest.mark.parametrize("tp", [1, 2])
def test_llama_architecture(tp):
    original = module("LlamaForCausalLM", num_key_value_heads=2)
    ranks = neox.llama_ranks(arrays(original), tp, layers=LAYERS) if tp == 1 else _even(original, tp)
    flags = {**FLAGS, "gqa": True, "rms": True, "linear1": True, "gated": True}
    sizes = {**HEADS, "groups": 2, "divisible": 1}
    found = gathered(ranks, flags, sizes)
    again = refilled("hf_llama", found, original, attention_bias=False, mlp_bias=False)
    np.testing.assert_array_equal(logits(again), logits(original))
    for made, expected in zip(scattered(found, tp, flags, sizes), ranks, strict=True):
        assert_same(made, expected)


def _even(original, tp):
    """Ranks with the vocabulary padded to a number that `tp` divides."""
    state = arrays(original)
    rows = -(-VOCAB // tp) * tp - VOCAB
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = np.pad(state[name], [(0, rows), (0, 0)])
    return neox.llama_ranks(state, tp, layers=LAYERS)
