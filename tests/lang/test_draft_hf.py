"""Drafts from the tensors of real Hugging Face models: bound, and under the shared names where these are known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.programs.hf import models
from tests.programs.hf.made import made
from ucp.lang.arrays import at, gather
from ucp.lang.draft import draft
from ucp.lang.held import Held
from ucp.layout import Mesh

NAMES = ["llama", "qwen3-tied-bias", "qwen3-moe", "mixtral", "gpt2", "gpt-neox"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_drafted(name: str) -> None:
    model = made(name)
    found = draft([Held(key, array.shape, array.dtype.name) for key, array in model.files.items()], Mesh({}))
    assert found.problem is None
    assert any(fit.split()[0] == model.case.program for fit in found.fits)
    whole = gather(found.program, {at(): model.files}, mesh=Mesh({}))
    assert sum(array.size for array in whole.values()) == sum(array.size for array in model.files.values())
    wanted = model.gather({0: model.files}, in_memory=False)
    shared = whole.keys() & wanted.keys()
    assert "embed.weight" in shared
    assert all(np.array_equal(whole[key], wanted[key]) for key in shared)
    fused = any("several tensors in one?" in note for note in found.notes)
    transposed = any("transposed?" in note for note in found.notes)
    assert (fused, transposed) == {"gpt2": (True, True), "gpt-neox": (True, False)}.get(name, (False, False))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_all_names_are_known_where_nothing_is_fused(name: str) -> None:
    model = made(name)
    found = draft([Held(key, array.shape, array.dtype.name) for key, array in model.files.items()], Mesh({}))
    whole = gather(found.program, {at(): model.files}, mesh=Mesh({}))
    assert whole.keys() == model.gather({0: model.files}, in_memory=False).keys()
    assert found.notes == ()


def test_every_case_is_one_that_exists() -> None:
    assert set(NAMES) <= set(models.CASES)
