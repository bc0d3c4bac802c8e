"""Keys and tensors of real torch_dist checkpoints: megatron_core_stacked and megatron_core_layers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from tests.programs.megatron.models import (
    BIASED,
    GPT,
    LLAMA,
    MIXED,
    MIXTRAL,
    QWEN2,
    QWEN3,
    assert_same,
    flags,
    logical,
    sizes,
)
from tests.support.megatron import ONE, Family, Model
from ucp.lang import load_program
from ucp.lang.arrays import at, gather, scatter
from ucp.layout import Mesh

MODELS = (LLAMA, GPT, QWEN2, QWEN3, MIXTRAL, MIXED, BIASED)
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def saved(family: Family) -> dict[str, np.ndarray]:
    """All tensors of the checkpoint, whole, as torch itself reads them."""
    reader = dcp.FileSystemReader(str(family.checkpoint))
    listed = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in listed.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def program_and_flags(model: Model):
    if model.expert_layers:
        return load_program("megatron_core_layers"), {"tied": model.tied, "swiglu": model.gated, "te": False}
    known = {**flags(model), "moe": model.experts is not None}
    known.pop("grouped", None)
    return load_program("megatron_core_stacked"), known


@each_model
def test_a_checkpoint_holds_the_tensors_of_the_module(families, model):
    family = families[model.name]
    program, known = program_and_flags(model)
    found = gather(program, {at(): saved(family)}, mesh=Mesh({}), sizes=sizes(model), flags=known)
    assert_same(found, logical(model, family.grids[ONE]))


@each_model
def test_a_checkpoint_is_made_again(families, model):
    family = families[model.name]
    program, known = program_and_flags(model)
    tensors = logical(model, family.grids[ONE])
    made = scatter(program, tensors, mesh=Mesh({}), coordinates=[at()], sizes=sizes(model), flags=known)
    assert_same(made[at()], saved(family))


def test_optimizer_states_lie_like_their_parameters(families):
    """Keys without their `optimizer.state.exp_avg.` are those of the weights, and so are the shapes."""
    program, known = program_and_flags(LLAMA)
    moments = {key: array * 2 for key, array in saved(families["llama"]).items()}
    found = gather(program, {at(): moments}, mesh=Mesh({}), sizes=sizes(LLAMA), flags=known, state="exp_avg")
    expected = logical(LLAMA, families["llama"].grids[ONE])
    assert_same(found, {name: array * 2 for name, array in expected.items()})
