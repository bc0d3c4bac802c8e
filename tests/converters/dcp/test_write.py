"""What is written, looked at: by torch, by our own reader, and item by item."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from tests.converters.dcp.write_support import STEPS, Trained, written
from tests.train.handmade import flat, make
from ucp.catalog import Catalog
from ucp.converter import read_catalog
from ucp.converters._dcp.metadata import read_metadata
from ucp.converters._dcp.told import Told
from ucp.errors import CorruptError, FitError, UsageError
from ucp.plan import Extent
from ucp.run.convert import convert, prepare
from ucp.run.gather import read_region
from ucp.store import open_store
from ucp.tree import Opaque, TensorLeaf

MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("lm"), "lm")


@pytest.fixture(scope="module")
def folder(lm: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "dcp"
    convert(lm.url, str(path), to="dcp", files=3)
    return path


def metadata_of(path: Path) -> Metadata:
    return FileSystemReader(path).read_metadata()


def loaded(path: Path) -> dict[str, Any]:
    """Everything in a folder, as torch nests it without being told what to expect."""
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
    for key, value in items or ():
        yield from leaves(value, f"{path}/{key}")


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def holds(catalog: Catalog, store: Any) -> Mapping[tuple[str, str], bytes]:
    keys = [(name, state) for name, tensor in catalog.tensors.items() for state in tensor.states]
    covers = {key: catalog.cover(*key) for key in keys}
    return {key: read_region(store, cover, flat(1)(cover.spec.shape)[0]).tobytes() for key, cover in covers.items()}


def test_torch_saves_the_same_job_under_the_same_keys(lm: Trained, folder: Path, tmp_path: Path) -> None:
    _save_state_dict(lm.nested, FileSystemWriter(tmp_path / "torch"), no_dist=True)
    theirs, ours = metadata_of(tmp_path / "torch"), metadata_of(folder)
    # A job whose optimizer knows the tied weight by its other name finds that as well.
    tied = {f"optim.state.head.weight.{state}" for state in (*MOMENTS, "step")}
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys() | tied
    assert {key: path for key, path in ours.planner_data.items() if key not in tied} == theirs.planner_data
    assert ours.version == theirs.version
    for key, held in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[key]
        assert type(mine) is type(held)
        if isinstance(held, TensorStorageMetadata):
            assert (mine.size, mine.properties) == (held.size, held.properties), key


def test_without_a_template_torch_gives_the_nested_state(lm: Trained, folder: Path) -> None:
    found, wanted = dict(leaves(loaded(folder))), dict(leaves(lm.nested))
    assert wanted.keys() <= found.keys()
    assert not [key for key, value in wanted.items() if not same(found[key], value)]


def test_every_item_is_a_file_of_torch_save_that_runs_nothing(folder: Path) -> None:
    metadata = metadata_of(folder)
    for index, place in metadata.storage_data.items():
        data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        held = torch.load(io.BytesIO(data), weights_only=True)
        if index.index is not None:
            chunk = metadata.state_dict_metadata[index.fqn].chunks[index.index]
            assert (chunk.offsets, chunk.sizes) == (index.offset, held.shape)
    files = {place.relative_path: place.offset + place.length for place in metadata.storage_data.values()}
    assert files.keys() == {f"__{rank}_0.distcp" for rank in range(3)}


def test_our_own_reader_finds_the_source_again(lm: Trained, folder: Path, tmp_path: Path) -> None:
    source, found = read_catalog(lm.url), read_catalog(str(folder))
    again = tmp_path / "again"
    convert(str(folder), str(again), to="dcp", files=2)
    for catalog, store in (found, read_catalog(str(again))):
        assert catalog.tensors == source[0].tensors
        assert (catalog.ties, catalog.step) == ({"head.weight": "embed.weight"}, STEPS)
        assert [(g.params, dict(g.options)) for g in catalog.param_groups] == [
            (g.params, dict(g.options)) for g in source[0].param_groups
        ]
        assert holds(catalog, store) == holds(*source)


def test_the_flat_form_has_the_keys_of_torchtitan(lm: Trained, tmp_path: Path) -> None:
    convert(lm.url, str(tmp_path / "titan"), to="dcp", model="", optimizer="optimizer", flat="yes")
    found = loaded(tmp_path / "titan")
    assert torch.equal(found["embed.weight"], lm.nested["model"]["embed.weight"])
    optimizer = found["optimizer"]
    assert torch.equal(optimizer["state.gain.exp_avg"], lm.nested["optim"]["state"]["gain"]["exp_avg"])
    assert optimizer["param_groups.gain.betas"] == (0.9, 0.99)
    assert optimizer["param_groups.embed.weight.lr"] == optimizer["param_groups.head.weight.lr"] == 0.01
    catalog, _ = read_catalog(str(tmp_path / "titan"))
    assert catalog.tensors == read_catalog(lm.url)[0].tensors


def test_training_state_is_under_keys_of_its_own(tmp_path: Path) -> None:
    state = {
        "lr_scheduler": {"last_epoch": 3, "base_lrs": [0.1, 0.2]},
        "rng": {"python": (3, (1, 2), None)},
        "list": [{"a": 1}, {"a": 2}],
        "trainer": Opaque("some.package", "Trainer", state={"x": 1}),
        "mixed": {"good": "text", "bad": Opaque("some.package", "Thing")},
        "consumed_samples": 48,
    }
    catalog, store = make(str(tmp_path / "in"), {"w": {"value": torch.ones(2, 2)}}, state=state)
    target = written(catalog, store, str(tmp_path / "out"))
    found = loaded(tmp_path / "out")
    assert found.pop("model").keys() == {"w"}
    assert found == {
        "lr_scheduler": {"last_epoch": 3, "base_lrs": [0.1, 0.2]},
        "rng": {"python": (3, (1, 2), None)},
        "list": [{"a": 1}, {"a": 2}],
        "mixed": {"good": "text"},
        "consumed_samples": 48,
    }
    assert [note for note in target.notes if "left out" in note] == [
        "left out: trainer (an object of class some.package.Trainer)",
        "left out: mixed.bad (an object of class some.package.Thing)",
    ]
    assert any("no optimizer states" in note for note in target.notes)


def test_other_kinds_of_adam_get_the_options_that_torch_asks_for(tmp_path: Path) -> None:
    tensors = {"w": {state: torch.rand(3) for state in ("value", *MOMENTS)}}
    rate = TensorLeaf(Extent.contiguous("", 0, (), "float32"), inline=struct.pack("<f", 0.5))
    options = {"lr": rate, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
    catalog, store = make(str(tmp_path / "in"), tensors, steps={"w": 4}, groups=[(["w"], options)])
    target = written(catalog, store, str(tmp_path / "out"))
    (group,) = loaded(tmp_path / "out")["optim"]["param_groups"]
    own = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    assert group.keys() - own.keys() == {"bias_correction"}
    assert not own.keys() - group.keys()
    assert group["lr"] == 0.5
    assert {key: value for key, value in group.items() if key not in options} == {
        key: value for key, value in own.items() if key not in options
    } | {"params": ["w"]}
    assert any("decoupled_weight_decay" in note for note in target.notes)


def test_tensors_are_dealt_to_files_of_one_size(tmp_path: Path) -> None:
    tensors = {f"w{i}": {"value": torch.rand(7 * i + 40, 600)} for i in range(6)}
    catalog, store = make(str(tmp_path / "in"), tensors, cut=flat(3))
    target = written(catalog, store, str(tmp_path / "out"), files=4)
    sizes = [sum(section.nbytes for section in task.sections) for task in target.tasks]
    assert len(sizes) == 4
    assert max(sizes) < 1.1 * min(sizes)
    for name, held in tensors.items():
        chunks = metadata_of(tmp_path / "out").state_dict_metadata[f"model.{name}"].chunks
        assert [chunk.sizes[0] for chunk in chunks] == [len(part) for part in held["value"].chunk(4)], "as FSDP2 cuts"


def test_files_are_as_many_as_asked_for(lm: Trained, tmp_path: Path) -> None:
    assert len(prepare(lm.url, str(tmp_path / "a"), to="dcp").plan.tasks) == 1
    assert len(prepare(lm.url, str(tmp_path / "b"), to="dcp", files="5").plan.tasks) == 5
    assert len(prepare(lm.url, str(tmp_path / "c"), to="dcp", mesh={"dp": 2}).plan.tasks) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": 0}, "number of files"),
        ({"files": "many"}, "number of files"),
        ({"flat": "perhaps"}, "true or false"),
        ({"model": ".."}, "no prefix"),
        ({"model": "optim."}, "prefix of model and optimizer"),
        ({"shards": 3}, "unknown option 'shards'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, lm: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(lm.url, str(tmp_path), to="dcp", **options)


def test_two_things_under_one_key_are_refused(tmp_path: Path) -> None:
    state = {"w": 5}
    catalog, store = make(str(tmp_path / "in"), {"w": {"value": torch.ones(2)}}, state=state)
    with pytest.raises(FitError, match="w: two things"):
        written(catalog, store, str(tmp_path / "out"), model="")


def test_states_that_nobody_can_place_are_refused(tmp_path: Path) -> None:
    catalog, store = make(str(tmp_path / "in"), {"w": {"value": torch.ones(2)}})
    catalog = replace(catalog, tensors={"w": replace(catalog.tensors["w"], undecided="say which")})
    with pytest.raises(FitError, match="optimizer states are those of w"):
        written(catalog, store, str(tmp_path / "out"))


def test_a_program_gives_tensors_the_names_of_a_job(tmp_path: Path) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "hf")
    through = prepare(str(tmp_path / "hf"), str(tmp_path / "logical"), to="dcp", program="hf_llama")
    assert any("--to-spec" in note for note in through.notes)
    convert(str(tmp_path / "hf"), str(tmp_path / "dcp"), to="dcp", to_program="hf_llama", model="", files=2)
    found = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    _load_state_dict(found, FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randint(0, 2, shape).to(dtype)
    catalog, store = make(str(tmp_path / "in"), {"w": {"value": value}})
    written(catalog, store, str(tmp_path / "out"), files=2)
    found = loaded(tmp_path / "out")["model"]["w"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8) if shape else found, value.view(torch.uint8) if shape else value)


@pytest.mark.parametrize(
    "note",
    [
        "text",
        {"kinds": {}, "ties": {}},
        {"step": "3", "kinds": {}, "ties": {}, "aliases": {}},
        {"step": 3, "kinds": {"w": "parameter"}, "ties": {}, "aliases": {}},
        {"step": 3, "kinds": {}, "ties": {"a": 1}, "aliases": {}},
        {"step": 3, "kinds": {}, "ties": {}, "aliases": {"model.gain": "model.norm.weight"}},
    ],
)
def test_a_note_of_ours_that_does_not_fit_is_damage(note: Any, folder: Path) -> None:
    metadata = read_metadata(open_store(str(folder)))
    assert Told.of(metadata, "here").step == STEPS
    with pytest.raises(CorruptError, match="here: what ucp noted"):
        Told.of(replace(metadata, extra={"ucp": note}), "here")
