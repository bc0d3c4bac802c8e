"""Plain safetensors files, with all states, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters.hf import made
from ucp.catalog import Catalog, Scalar
from ucp.converter import converter, read_catalog
from ucp.errors import CorruptError, FitError, NotFoundError, UsageError
from ucp.run.convert import convert, prepare
from ucp.store import open_store

INDEX = "tensors.safetensors.index.json"


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save with a model and its AdamW; returns every state by the name it is to be filed under."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")
    wanted = dict(model.state_dict())
    for (name, _), state in zip(model.named_parameters(), optimizer.state.values(), strict=True):
        wanted |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return wanted


@pytest.mark.parametrize("size", ["5GB", "300"])
def test_all_states_go_out_and_come_back(size: str, tmp_path: Path) -> None:
    wanted = trained(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "plain"), to="safetensors", shard_bytes=size)
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert (files == ["tensors.safetensors"]) == (size == "5GB")
    assert made.same(made.on_disk(tmp_path / "plain"), wanted)
    before, _ = read_catalog(str(tmp_path / "source"))
    after, store = read_catalog(str(tmp_path / "plain"))
    assert after.source.family == "safetensors"
    assert after.tensors == before.tensors
    found = {
        name if state == "value" else f"{state}/{name}": made.value(after, store, name, state)
        for name, tensor in after.tensors.items()
        for state in tensor.states
    }
    assert made.same(found, wanted)
    assert after.tensors["0.weight"].scalars["step"] == Scalar(3.0, "float32")
    assert after.tensors["1.num_batches_tracked"].kind == after.tensors["1.running_mean"].kind == "buffer"


def test_values_alone(tmp_path: Path) -> None:
    wanted = trained(tmp_path / "source")
    conversion = prepare(str(tmp_path / "source"), str(tmp_path / "plain"), to="safetensors", states="value")
    assert any("exp_avg exp_avg_sq" in note and "step" in note and "param groups" in note for note in conversion.notes)
    convert(str(tmp_path / "source"), str(tmp_path / "plain"), to="safetensors", states="value")
    values = {name: tensor for name, tensor in wanted.items() if "/" not in name}
    assert made.same(made.on_disk(tmp_path / "plain"), values)
    assert made.same(made.read(tmp_path / "plain")[1], values)


def test_values_may_be_rounded_and_states_are_not(tmp_path: Path) -> None:
    wanted = trained(tmp_path / "source")
    with pytest.raises(FitError):
        prepare(str(tmp_path / "source"), str(tmp_path / "plain"), to="safetensors", dtype="bfloat16")
    convert(str(tmp_path / "source"), str(tmp_path / "plain"), to="safetensors", dtype="bfloat16", lossy=True)
    rounded = {
        name: tensor.bfloat16() if "/" not in name and tensor.is_floating_point() else tensor
        for name, tensor in wanted.items()
    }
    assert made.same(made.on_disk(tmp_path / "plain"), rounded)


def test_foreign_files_of_any_name_are_read(tmp_path: Path) -> None:
    parts = [{"a": torch.randn(3, 4), "exp_avg/a": torch.ones(2)}, {"b/c": torch.arange(3)}]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"part{number}.safetensors")
    catalog, found = made.read(tmp_path)
    assert catalog.source.family == "safetensors"
    assert made.same(found, parts[0] | parts[1])


def test_files_of_a_model_without_their_index(tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path, max_shard_size=made.SMALL)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert made.same(made.read(tmp_path, family="safetensors")[1], model.state_dict())
    next(iter(tmp_path.glob("model-*"))).unlink()
    with pytest.raises(NotFoundError, match=r"5 of 6"):
        made.read(tmp_path, family="safetensors")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptError, match=r"a is in two files, x\.safetensors and y\.safetensors"):
        made.read(tmp_path)


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({name: torch.ones(3)}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.safetensors.index.json").write_text(
            json.dumps({"weight_map": {name: f"{name}.safetensors"}})
        )
    with pytest.raises(UsageError, match="two models"):
        made.read(tmp_path)


def written(folder: Path) -> Path:
    trained(folder / "source")
    convert(str(folder / "source"), str(folder / "plain"), to="safetensors")
    return folder / "plain"


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(states="exp_avg"),
        lambda told: told.update(states=[3]),
        lambda told: told.update(kinds={"0.weight": "other"}),
        lambda told: told.update(ties=[]),
        lambda told: told.update(step="3"),
        lambda told: told.update(scalars=[]),
        lambda told: told.update(scalars={"0.weight": {"step": 3}}),
        lambda told: told.update(scalars={"0.weight": [3]}),
    ],
)
def test_a_damaged_description_of_states(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    index = written(tmp_path) / INDEX
    document = json.loads(index.read_text())
    change(document["metadata"]["ucp"])
    index.write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=r"metadata\.ucp"):
        made.read(tmp_path / "plain")


def test_a_state_without_its_tensor(tmp_path: Path) -> None:
    folder = written(tmp_path)
    tensors = load_file(folder / "tensors.safetensors")
    del tensors["0.weight"]
    save_file(tensors, folder / "tensors.safetensors")
    document = json.loads((folder / INDEX).read_text())
    del document["weight_map"]["0.weight"]
    (folder / INDEX).write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=r"0\.weight has no value"):
        made.read(folder)


def test_names_that_would_be_taken_for_states_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "source")
    catalog, store = read_catalog(str(tmp_path / "source"))
    clash = _renamed(catalog, "0.bias", "exp_avg/0.weight")
    with pytest.raises(FitError, match=r"exp_avg/0\.weight"):
        converter("safetensors").target(clash, store)
    converter("safetensors").target(clash, store, states="value")


def _renamed(catalog: Catalog, old: str, new: str) -> Catalog:
    from dataclasses import replace

    names = {name: new if name == old else name for name in catalog.tensors}
    tensors = {names[name]: replace(tensor, name=names[name]) for name, tensor in catalog.tensors.items()}
    fragments = {key._replace(name=names[key.name]): held for key, held in catalog.fragments.items()}
    return replace(catalog, tensors=tensors, fragments=fragments)


@pytest.mark.parametrize("options", [{"states": "some"}, {"layout": 3}, {"tag": "x"}])
def test_options_that_are_none(options: dict[str, object], tmp_path: Path) -> None:
    trained(tmp_path / "source")
    catalog, store = read_catalog(str(tmp_path / "source"))
    with pytest.raises(UsageError):
        converter("safetensors").target(catalog, store, **options)
    with pytest.raises(UsageError, match="unknown option"):
        converter("safetensors").read(open_store(str(tmp_path)), file="x")


def test_the_layout_of_a_file_is_that_of_the_library(tmp_path: Path) -> None:
    """Every dtype, so that tensors are put in the library's own order."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.uint16, torch.uint32, torch.uint64, torch.complex64]
    tensors = {f"t{number}": torch.ones(3).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors |= {"é": torch.ones(2), "none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    source, target = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text("{}")
    made.to_hf(source, target)
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_name_that_the_format_keeps_for_itself_is_refused(tmp_path: Path) -> None:
    torch.save({"__metadata__": torch.ones(3), "weight": torch.ones(2)}, tmp_path / "odd.pt")
    with pytest.raises(FitError, match="__metadata__"):
        prepare(str(tmp_path / "odd.pt"), str(tmp_path / "there"), to="safetensors")


def test_a_file_of_torch_save_beside_is_remarked(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    assert not read_catalog(str(tmp_path))[0].notes
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "last.pt")
    catalog, _ = read_catalog(str(tmp_path))
    assert any(note.startswith("last.pt lies here as well") for note in catalog.notes)
