"""The conformance suite, run for every family that there is.

Samples are written by the families' own targets out of one made-up catalog, which makes their truth known and their
size as wanted; that real frameworks write and read the same is the matter of the families' own tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.support import bytecheckpoint_emulated, megatron, megatron_trained
from ucp.catalog import Catalog
from ucp.converter import Converter, Layout, converter, families
from ucp.layout import Mesh
from ucp.store import Store, open_source, open_store
from ucp.testing.converters import (
    ReaderConformance,
    Sample,
    TargetConformance,
    Truth,
    example,
    held,
    read_all,
    write,
)
from ucp.train.save import save

CONFIG = {"model_type": "mine", "architectures": ["Mine"]}


class Written(ReaderConformance, TargetConformance):
    """A family that reads what it writes."""

    family: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    kept: ClassVar[frozenset[str]] = frozenset({"value", "exp_avg", "exp_avg_sq"})

    @pytest.fixture
    def converter(self) -> Converter:
        return converter(self.family)

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        return self.made(tmp_path / "sample", 24)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Sample:
        return self.made(tmp_path / "large", 1024)

    def made(self, folder: Path, width: int) -> Sample:
        catalog, store = example(folder / "source", width=width)
        write(converter(self.family), catalog, store, folder / "written", **self.options)
        return Sample(folder / "written", self.truth(catalog, store))

    def truth(self, catalog: Catalog, store: Store) -> Truth:
        everything = read_all(catalog, store)
        return {name: {s: v for s, v in states.items() if s in self.kept} for name, states in everything.items()}


class TestUniversal(Written):
    family = "universal"


class TestTorch(Written):
    family = "torch"


class TestDeepSpeedUniversal(Written):
    family = "deepspeed-universal"


class TestSafetensors(Written):
    family = "safetensors"


class TestDcp(Written):
    family = "dcp"


class TestHuggingFace(Written):
    family = "hf"
    kept = frozenset({"value"})

    @pytest.fixture(autouse=True)
    def configured(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path_factory.mktemp("config") / "config.json"
        path.write_text(json.dumps(CONFIG))
        monkeypatch.setattr(type(self), "options", {"config": str(path)})


class TestDeepSpeed(Written):
    """ZeRO-1 over two ranks, as `--to deepspeed` writes it."""

    family = "deepspeed"
    options: ClassVar[Mapping[str, Any]] = {"layout": Layout(Mesh({"dp": 2}))}


class Trained(ReaderConformance):
    """A family whose samples are made of a small training job in torch."""

    family: ClassVar[str]

    @pytest.fixture
    def converter(self) -> Converter:
        return converter(self.family)

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        return self.made(tmp_path / "sample", 24)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Sample:
        return self.made(tmp_path / "large", 1024)

    def made(self, folder: Path, width: int) -> Sample:
        folder.mkdir(parents=True)
        torch.manual_seed(width)
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width))
        optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1)
        model(torch.randn(4, width)).square().sum().backward()
        optimizer.step()
        truth = {name: {"value": held(value)} for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            truth[name].update({key: held(state[key]) for key in ("exp_avg", "exp_avg_sq")})
        return Sample(self.saved(folder, model, optimizer), truth)

    def saved(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        raise NotImplementedError


class TestTorchFile(Trained):
    family = "torch"

    def saved(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, folder / "model.pt")
        return folder / "model.pt"


class TestAccelerate(Trained):
    """The files of `Accelerator.save_state`; what it really writes is read in tests/converters/torch."""

    family = "torch"

    def saved(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        torch.save(optimizer.state_dict(), folder / "optimizer.bin")
        torch.save({"torch_manual_seed": torch.get_rng_state()}, folder / "random_states_0.pkl")
        return folder


class TestNative(Trained):
    family = "native"

    def saved(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        save((model, optimizer), str(folder / "saved"), step=1)
        return folder / "saved"


class TestByteCheckpoint(Trained):
    family = "bytecheckpoint"

    def saved(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        entries: dict[tuple[str, ...], Any] = {("param_groups",): [{"params": [], "lr": 0.1}]}
        for name, parameter in model.named_parameters():
            entries["param_groups",][0]["params"].append(name)
            entries.update({("state", name, key): value for key, value in optimizer.state[parameter].items()})
        bytecheckpoint_emulated.save(folder / "run", model=model.state_dict(), optimizer=entries, extra=[{"step": 1}])
        return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> megatron_trained.Trained:
    """A job of Megatron-Core, with weights large enough to show whether they are read."""
    model = megatron.Model("large", layers=2, hidden=96, ffn=152, vocab=2053)
    job = megatron_trained.Job(model, megatron.Grid(tp=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy"))
    return megatron_trained.train([job], tmp_path_factory.mktemp("megatron"))[job.name]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fully_reshardable", "dp_reshardable", "legacy"])
class TestMegatron(ReaderConformance):
    """What Megatron-Core really wrote on four ranks; tests/converters/megatron set its values against the truth."""

    @pytest.fixture
    def converter(self, form: str) -> Converter:
        return converter("megatron")

    @pytest.fixture
    def sample(self, converter: Converter, trained: megatron_trained.Trained, form: megatron_trained.Format) -> Sample:
        path = trained.checkpoint(form)
        store = open_store(str(path))
        return Sample(path, read_all(converter.read(store), store))


WRITTEN: tuple[type[Written], ...] = (
    TestDcp,
    TestDeepSpeed,
    TestDeepSpeedUniversal,
    TestSafetensors,
    TestTorch,
    TestUniversal,
)
TRAINED: tuple[type[Trained], ...] = (TestAccelerate, TestByteCheckpoint, TestNative, TestTorchFile)


@pytest.mark.parametrize("one", [*WRITTEN, *TRAINED], ids=lambda one: one.__name__)
def test_no_other_family_takes_it_for_its_own(one: type[Written | Trained], tmp_path: Path) -> None:
    sample = one().made(tmp_path / "sample", 8)
    store = open_source(str(sample.path))
    assert [family for family in families() if converter(family).detect(store)] == [one.family]


def test_a_folder_of_hugging_face_is_no_folder_of_plain_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    store = write(converter("hf"), *example(tmp_path / "source"), tmp_path / "hf", config=str(tmp_path / "config.json"))
    assert [family for family in families() if converter(family).detect(store)] == ["hf"]
