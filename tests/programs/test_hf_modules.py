"""The Hugging Face programs against the library's own modules, files and tensor-parallel shards."""

from __future__ import annotations

import pytest
import torch

from tests.programs import reference
from tests.programs.hf import models
from tests.programs.hf.made import made, same, tensors
from tests.programs.names import listed_shape

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
