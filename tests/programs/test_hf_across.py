"""From one family into another through the logical tensors, with no program for the pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.programs.hf import models
from tests.programs.hf.made import Made, made, same, tensors
from tests.programs.test_hf_modules import IDS
from ucp.errors import FitError


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS[None]).logits[0]


def into(source: Made, target: Made, more: dict[str, np.ndarray]) -> torch.nn.Module:
    """A fresh module of the target's class with the source's weights, by strict loading of names and shapes."""
    logical = source.gather({0: source.files}, in_memory=False)
    (held,) = target.scatter({**logical, **more}, in_memory=True).values()
    fresh = models.model(target.case, seed=7)
    fresh.load_state_dict(tensors(held), strict=True)
    return fresh


@pytest.mark.parametrize(("source", "target"), [("llama", "mistral"), ("mistral", "llama")])
def test_same_architecture_computes_the_same_bits(source: str, target: str) -> None:
    fresh = into(made(source), made(target), {})
    assert not torch.equal(logits(models.model(models.CASES[target], seed=7)), logits(fresh))
    assert torch.equal(logits(fresh), logits(made(source).module))


@pytest.mark.parametrize("tied", ["", "-tied"])
def test_biases_that_the_source_lacks_may_be_zeros(tied: str) -> None:
    """Qwen2 is Llama with biases on queries, keys and values."""
    source = made(f"llama-square{tied}")
    target = made(f"qwen2{tied}")
    sizes = {"q": 16, "k": 8, "v": 8}
    zeros = {f"layers.{layer}.attn.{x}.bias": np.zeros(n) for layer in range(3) for x, n in sizes.items()}
    torch.testing.assert_close(logits(into(source, target, zeros)), logits(source.module), rtol=0, atol=1e-12)


def test_biases_that_the_source_lacks_are_missed() -> None:
    with pytest.raises(FitError, match=r"attn\.[qkv]\.bias"):
        into(made("llama-square"), made("qwen2"), {})


def test_biases_that_the_target_lacks_are_not_lost() -> None:
    with pytest.raises(FitError, match=r"attn\.[qkv]\.bias"):
        into(made("qwen2"), made("llama-square"), {})


def test_a_head_of_its_own_does_not_become_a_tied_one() -> None:
    """Loading would replace it by the embedding without a word."""
    with pytest.raises(FitError, match=r"lm_head\.weight"):
        into(made("llama-square"), made("llama-square-tied"), {})


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-neox"])
def test_files_into_a_module_in_memory(name: str) -> None:
    model = made(name)
    assert torch.equal(logits(into(model, model, {})), logits(model.module))


@pytest.mark.parametrize("name", models.CASES)
def test_files_from_a_module_in_memory_load(name: str) -> None:
    """What the program writes under the names of files, from_pretrained reads as the same model."""
    from safetensors.numpy import save_file

    model = made(name)
    (held,) = model.scatter(model.gather({0: model.memory}, in_memory=True), in_memory=False).values()
    folder = model.folder / "written"
    model.module.config.save_pretrained(folder)
    save_file(
        {key: np.ascontiguousarray(array) for key, array in held.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    read, told = models.model_class(model.case).from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(models.arrays(read), model.memory)


def test_expert_order_matters() -> None:
    """That the judge notices experts in another order."""
    model = made("mixtral")
    logical = model.gather({0: model.files}, in_memory=False)
    logical["layers.1.moe.up"] = logical["layers.1.moe.up"][::-1]
    (held,) = model.scatter(logical, in_memory=True).values()
    fresh = models.model(model.case, seed=7)
    fresh.load_state_dict(tensors(held), strict=True)
    assert not torch.allclose(logits(fresh), logits(model.module))
