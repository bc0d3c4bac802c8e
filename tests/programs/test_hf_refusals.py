"""What does not fit a program is refused with the tensor and the rule named, for every program."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.programs.hf import models
from tests.programs.hf.made import Arrays, made
from ucp.errors import FitError, UcpError

NAMES = ["llama-bias", "qwen2", "qwen3", "qwen3-moe-dense", "mixtral", "gpt2", "gpt-neox"]


def refused(name: str, files: Arrays) -> str:
    with pytest.raises(FitError) as raised:
        made(name).gather({0: files}, in_memory=False)
    return f"{raised.value.message} {raised.value.hint}"


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_tensor(name: str) -> None:
    for wanted in made(name).files:
        wrong = wanted.replace("weight", "wieght").replace("bias", "baas")
        files = {(wrong if key == wanted else key): array for key, array in made(name).files.items()}
        assert wrong in refused(name, files)


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_tensor(name: str) -> None:
    for lost in made(name).files:
        said = refused(name, {key: array for key, array in made(name).files.items() if key != lost})
        assert "missing" in said or "no shard holds" in said or lost in said or "no tensor is named" in said


@pytest.mark.parametrize("name", NAMES)
def test_an_extra_tensor(name: str) -> None:
    files = made(name).files
    extra = next(key for key in files if ".1." in key).replace(".1.", ".1.more.")
    assert extra in refused(name, {**files, extra: np.zeros(3)})


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_with_one_row_more(name: str) -> None:
    for key, array in made(name).files.items():
        longer = np.concatenate([array, array[:1]])
        said = refused(name, {**made(name).files, key: longer})
        assert key in said or models.CASES[name].program in said


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_an_expert_of_another_dtype(name: str) -> None:
    model = made(name)
    key = next(key for key in model.files if "experts.1." in key)
    assert key in refused(name, {**model.files, key: model.files[key].astype(np.float32)})


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_sizes_that_shapes_leave_open_are_asked_for(name: str) -> None:
    from ucp.lang.arrays import gather

    model = made(name)
    with pytest.raises(UcpError) as raised:
        gather(model.program, {(): model.files}, mesh=model.mesh(1), flags=model.known(in_memory=False).flags)
    assert re.search(r"\b(heads|groups) cannot be told", raised.value.message)
    assert "--size" in str(raised.value.hint)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_missing_whole(name: str) -> None:
    """Names do not tell how many layers there were; the configuration does."""
    files = {key: array for key, array in made(name).files.items() if ".2." not in key.replace("experts.2.", "")}
    assert "layers.2." in refused(name, files)
