"""The conformance suite on what transformers, the Hub's library and torch write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.converters.hf import made, writers
from ucp.converter import Converter, converter
from ucp.testing.converters import ReaderConformance, Sample, held


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.folder_of(tmp_path_factory.mktemp("ranks"), 2, save_distributed=True)


def sample_of(path: Path, tensors: Mapping[str, torch.Tensor]) -> Sample:
    return Sample(path, {name: {"value": held(tensor)} for name, tensor in tensors.items()})


class Reading(ReaderConformance):
    """One family; a large sample is a single tensor in a file of this `name`."""

    family = "hf"
    name = "model.safetensors"

    @pytest.fixture
    def converter(self) -> Converter:
        return converter(self.family)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Sample:
        tensors = {"w": torch.randn(1200, 1000)}
        (tmp_path / "large").mkdir()
        save = save_file if self.name.endswith(".safetensors") else torch.save
        save(tensors, tmp_path / "large" / self.name)
        sample = sample_of(tmp_path / "large", tensors)
        return replace(sample, options={"ranks": 1}) if self.name.startswith("shard-") else sample


class TestSeveralFiles(Reading):
    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        model = made.model("llama")
        model.save_pretrained(tmp_path / "sample", max_shard_size=made.SMALL)
        return sample_of(tmp_path / "sample", model.state_dict())


class TestOneFile(Reading):
    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        model = made.model("llama-tied")
        model.save_pretrained(tmp_path / "sample")
        return sample_of(tmp_path / "sample", {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})


class TestTorchFiles(Reading):
    name = "pytorch_model.bin"

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        model = made.model("gpt2-untied")
        made.save_torch_files(model.state_dict(), tmp_path / "sample", size=made.SMALL)
        return sample_of(tmp_path / "sample", model.state_dict())


class TestRanksOfTorch(Reading):
    name = "shard-00001-model-00001-of-00001.safetensors"

    @pytest.fixture
    def sample(self, saved: Path) -> Sample:
        return replace(sample_of(saved, writers.truth()), options={"ranks": 2})


class TestPlainFiles(Reading):
    family = "safetensors"
    name = "x.safetensors"

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
        (tmp_path / "sample").mkdir()
        save_file({"a": tensors["a"]}, tmp_path / "sample" / "one.safetensors")
        save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "sample" / "two.safetensors")
        return sample_of(tmp_path / "sample", tensors)
