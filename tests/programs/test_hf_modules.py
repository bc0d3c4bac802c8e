"""The Hugging Face programs against the library's own modules, files and tensor-parallel shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.programs import reference
from tests.programs.hf import models
from tests.programs.hf.made import made, same, tensors
from tests.programs.hf.shards import shards
from tests.programs.names import listed_shape
from ucp.converters._programs import from_config
from ucp.lang import load_program
from ucp.lang.arrays import at, gather, scatter
from ucp.layout import Mesh

CUT = [name for name, case in models.CASES.items() if case.plan]
IDS = torch.randint(0, 40, (11,), generator=torch.Generator().manual_seed(1))
# Rotary tables and RMS norms are computed in float32 by the library, whatever the weights are.
CLOSE = 1e-4


@pytest.mark.parametrize("name", models.CASES)
def test_files_become_the_tensors_of_the_table(name: str) -> None:
    model = made(name)
    logical = model.gather({0: model.files}, in_memory=False)
    sizes = {**model.known(in_memory=False).sizes}
    assert {key: array.shape for key, array in logical.items()} == {key: listed_shape(key, sizes) for key in logical}
    distinct = {id(array): array.nbytes for array in logical.values()}
    assert sum(distinct.values()) == sum(array.nbytes for array in model.files.values())


@pytest.mark.parametrize("name", models.CASES)
def test_logical_tensors_compute_what_the_module_computes(name: str) -> None:
    model = made(name)
    logical = tensors(model.gather({0: model.files}, in_memory=False))
    with torch.no_grad():
        wanted = model.module(IDS[None]).logits[0]
    found = reference.logits(logical, IDS, models.shape(model.case))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", models.CASES)
def test_module_in_memory_has_the_same_tensors_as_its_files(name: str) -> None:
    model = made(name)
    from_files = model.gather({0: model.files}, in_memory=False)
    assert same(model.gather({0: model.memory}, in_memory=True), from_files)


@pytest.mark.parametrize("name", models.CASES)
def test_files_come_back(name: str) -> None:
    model = made(name)
    (back,) = model.scatter(model.gather({0: model.files}, in_memory=False), in_memory=False).values()
    back = {key: array for key, array in back.items() if key in model.files or key != "lm_head.weight"}
    assert same(back, model.files)


@pytest.mark.parametrize("name", models.CASES)
def test_module_in_memory_comes_back(name: str) -> None:
    model = made(name)
    (back,) = model.scatter(model.gather({0: model.memory}, in_memory=True), in_memory=True).values()
    assert same(back, model.memory)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", CUT)
def test_ranks_of_tensor_parallelism(name: str, tp: int) -> None:
    """Shards as transformers cuts them join to what the files hold, and cutting gives those shards again."""
    model = made(name)
    held = model.shards(tp)
    logical = model.gather(held, in_memory=True)
    assert same(logical, model.gather({0: model.files}, in_memory=False))
    back = model.scatter(logical, ranks=tp, in_memory=True)
    assert back.keys() == held.keys()
    assert all(same(back[rank], held[rank]) for rank in held)


def test_published_gpt2_has_the_tensors_of_the_model_with_a_head(tmp_path: Path) -> None:
    """GPT2Model has names without a prefix and no head; older versions of it saved masks."""
    model = made("gpt2")
    files = models.saved(model.module.transformer, tmp_path)
    assert "h.0.attn.c_attn.weight" in files
    masks = {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 32, 32))) for layer in range(3)}
    config = model.known(in_memory=False).sizes
    program = load_program("hf_gpt2_base")
    logical = gather(program, {(): {**files, **masks}}, mesh=Mesh({}), config=config)
    assert same(logical, model.gather({0: model.files}, in_memory=False))
    assert same(scatter(program, logical, mesh=Mesh({}), config=config)[()], files)


def test_tables_that_older_versions_saved_are_dropped() -> None:
    model = made("llama")
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3) for layer in range(3)}
    logical = model.gather({0: {**model.files, **tables}}, in_memory=False)
    assert same(logical, model.gather({0: model.files}, in_memory=False))


def test_a_vocabulary_that_ranks_do_not_divide(tmp_path: Path) -> None:
    """transformers gives the last rank less; shapes show where the cuts are."""
    case = replace(models.CASES["llama"], config={**models.DENSE, "vocab_size": 42})
    files = models.saved(models.model(case), tmp_path)
    held = shards(models.model_class(case), tmp_path, tp=4)
    assert [held[rank]["lm_head.weight"].shape[0] for rank in range(4)] == [11, 11, 11, 9]
    known = from_config(json.loads((tmp_path / "config.json").read_text()))
    shared = {"config": known.sizes, "flags": known.flags}
    program = load_program(case.program)
    logical = gather(program, {at(tp=rank): held[rank] for rank in held}, mesh=Mesh({"tp": 4}), **shared)
    assert same(logical, gather(program, {(): files}, mesh=Mesh({}), **shared))
