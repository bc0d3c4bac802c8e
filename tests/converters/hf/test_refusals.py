"""Folders that contradict themselves, are damaged or are not what they look like are refused, and told apart."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters.hf import made
from ucp.converter import converter, find_converter, read_catalog
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UcpError, UsageError
from ucp.run.convert import prepare
from ucp.store import open_store

Damage = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in several files."""
    made.model("llama").save_pretrained(tmp_path / "model", max_shard_size=made.SMALL)
    return tmp_path / "model"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def remap(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    document = json.loads((folder / INDEX).read_text())
    change(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change the header of a safetensors file, whose data stays where it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    document = json.loads(raw[8 : 8 + length])
    change(document)
    text = json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_tensor(document: dict[str, dict[str, object]]) -> dict[str, object]:
    return next(entry for name, entry in document.items() if name != "__metadata__")


def elsewhere(weights: dict[str, str]) -> None:
    name = "model.norm.weight"
    weights[name] = next(file for file in weights.values() if file != weights[name])


def unnamed(weights: dict[str, str]) -> None:
    del weights["model.norm.weight"]


def invented(weights: dict[str, str]) -> None:
    weights["model.invented.weight"] = weights["model.norm.weight"]


def outside(weights: dict[str, str]) -> None:
    weights["model.norm.weight"] = "../elsewhere.safetensors"


def twice(folder: Path) -> None:
    """The same tensor in two files: those of two saves, for one."""
    source = load_file(parts(folder)[0])
    name = next(iter(source))
    rewrite(parts(folder)[1], lambda tensors: tensors.update({name: source[name]}))


CASES: dict[str, tuple[Damage, type[UcpError], str]] = {
    "a tensor in another file": (
        lambda f: remap(f, elsewhere),
        CorruptError,
        r"model\.norm\.weight is in .* and not in",
    ),
    "a tensor that the index does not name": (lambda f: remap(f, unnamed), CorruptError, r"which it does not name"),
    "a tensor that no file holds": (lambda f: remap(f, invented), CorruptError, r"model\.invented\.weight is not in"),
    "a file outside the folder": (lambda f: remap(f, outside), CorruptError, r"no name of a file beside it"),
    "a tensor in two files": (twice, CorruptError, r"is in two files"),
    "a file that is missing": (lambda f: parts(f)[2].unlink(), NotFoundError, r"model-00003-of"),
    "no index": (lambda f: (f / INDEX).unlink(), NotFoundError, r"the index that names them is missing"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), CorruptError, r"not JSON"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), CorruptError, r"not an object"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), CorruptError, r"no weight_map"),
    "an index with a name twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        CorruptError,
        r"'a' twice",
    ),
    "a configuration that is no JSON": (
        lambda f: (f / "config.json").write_text("nope"),
        CorruptError,
        r"config\.json",
    ),
    "a truncated file": (
        lambda f: parts(f)[0].write_bytes(parts(f)[0].read_bytes()[:-5]),
        CorruptError,
        r"its tensors end at byte",
    ),
    "bytes after the end": (
        lambda f: parts(f)[0].write_bytes(parts(f)[0].read_bytes() + b"more"),
        CorruptError,
        r"its tensors end at byte",
    ),
    "a shape that lies": (
        lambda f: header(parts(f)[0], lambda h: first_tensor(h).update(shape=[1, 2])),
        CorruptError,
        r"of shape \[1, 2\]",
    ),
    "a dtype that lies": (
        lambda f: header(parts(f)[0], lambda h: first_tensor(h).update(dtype="F64")),
        CorruptError,
        r"bytes and not",
    ),
    "a dtype that is none": (
        lambda f: header(parts(f)[0], lambda h: first_tensor(h).update(dtype="F3")),
        FitError,
        r"dtype 'F3'",
    ),
    "a hole between tensors": (
        lambda f: header(parts(f)[1], lambda h: h.pop(sorted(h)[1])),
        CorruptError,
        r"where the one before ends|its tensors end at byte",
    ),
    "a Git LFS pointer": (
        lambda f: parts(f)[0].write_text("version https://git-lfs.github.com/spec/v1\n"),
        CorruptError,
        r"header claims",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_folders_are_refused(name: str, folder: Path) -> None:
    damage, error, said = CASES[name]
    assert find_converter(str(folder))[0].family == "hf"
    damage(folder)
    with pytest.raises(error, match=said) as failed:
        read_catalog(str(folder), family="hf")
    assert str(folder) in str(failed.value)
    assert failed.value.hint


def test_a_folder_without_its_index_is_still_told_as_ours(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert find_converter(str(folder))[0].family == "hf"


def test_torch_files_that_contradict_their_index(tmp_path: Path) -> None:
    made.save_torch_files(made.model("gpt2").state_dict(), tmp_path / "m", size=made.SMALL)
    index = tmp_path / "m" / "pytorch_model.bin.index.json"
    document = json.loads(index.read_text())
    name = "transformer.ln_f.weight"
    document["weight_map"][name] = next(f for f in document["weight_map"].values() if f != document["weight_map"][name])
    index.write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=r"transformer\.ln_f\.weight is in"):
        made.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "list"),
        ({"model": {"w": torch.ones(2)}}, "'model'"),
        ({"w": torch.ones(2), "step": 3}, "'step'"),
    ],
)
def test_files_of_torch_save_that_are_no_weights(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(FitError, match=said):
        made.read(tmp_path)


def test_a_file_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": torch.ones(2), "x": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UcpError):
        made.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[:-100])
    with pytest.raises(CorruptError, match=r"pytorch_model\.bin"):
        made.read(tmp_path)


def test_a_variant_that_is_not_there(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="fp16"):
        read_catalog(str(folder), variant="fp16")


def test_options_that_are_none(folder: Path) -> None:
    with pytest.raises(UsageError, match="'tag'"):
        read_catalog(str(folder), tag="x")


def test_a_flipped_bit_is_found_and_what_was_written_is_no_model(tmp_path: Path) -> None:
    """Its one file is whole; that the source is damaged is found after it was written."""
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"w": torch.zeros(10_000)}, source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    raw = bytearray((source / "pytorch_model.bin").read_bytes())
    raw[20_000] ^= 1
    (source / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(CorruptError):
        made.to_hf(source, tmp_path / "written")
    assert (tmp_path / "written" / "model.safetensors").exists()
    assert not converter("hf").detect(open_store(str(tmp_path / "written")))
    assert not converter("safetensors").detect(open_store(str(tmp_path / "written")))


def test_tensors_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    from ucp.run.convert import convert

    made.model("llama").save_pretrained(tmp_path / "llama")
    made.model("mixtral").save_pretrained(tmp_path / "mixtral")
    convert(str(tmp_path / "llama"), str(tmp_path / "u"), to="universal", program="hf_llama")
    with pytest.raises(FitError):
        prepare(str(tmp_path / "u"), str(tmp_path / "w"), to="hf", config=str(tmp_path / "mixtral" / "config.json"))
    made.edit(tmp_path / "mixtral" / "config.json", model_type="unheard-of")
    with pytest.raises(FitError, match="unheard-of"):
        prepare(str(tmp_path / "u"), str(tmp_path / "w"), to="hf", config=str(tmp_path / "mixtral" / "config.json"))


def test_a_tied_head_of_another_shape(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(5, 2)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    with pytest.raises(FitError, match="ties"):
        made.to_hf(tmp_path / "source", tmp_path / "written")


def test_a_mesh_is_refused(tmp_path: Path) -> None:
    from ucp.converter import Layout
    from ucp.layout import Mesh

    made.model("llama").save_pretrained(tmp_path)
    catalog, store = read_catalog(str(tmp_path))
    with pytest.raises(UsageError, match="whole tensors"):
        converter("hf").target(catalog, store, layout=Layout(Mesh({"tp": 2})))


def test_shards_of_one_tensor_that_differ(tmp_path: Path) -> None:
    def shard(rank: int, tensor: torch.Tensor, start: list[int]) -> None:
        told = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": start}}), "DCP_VERSION": "1.0", "format": "pt"}
        save_file({"w": tensor}, tmp_path / f"shard-{rank:05d}-model-00001-of-00001.safetensors", told)

    shard(1, torch.ones(2, 3), [0, 0])
    shard(2, torch.ones(2, 3), [2, 0])
    catalog, _ = made.read(tmp_path, ranks=2)
    assert catalog.tensors["w"].states["value"].shape == (4, 3)
    shard(2, torch.ones(2, 3), [1, 0])
    with pytest.raises(FitError, match=r"overlap|twice"):
        made.read(tmp_path, ranks=2)
    shard(2, torch.ones(2, 3), [3, 0])
    with pytest.raises(FitError, match=r"in no fragment|fragments hold"):
        made.read(tmp_path, ranks=2)
    shard(2, torch.ones(2, 3).half(), [2, 0])
    with pytest.raises(ConflictError, match="float16"):
        made.read(tmp_path, ranks=2)
    shard(2, torch.ones(2), [2])
    with pytest.raises(ConflictError):
        made.read(tmp_path, ranks=2)
    for start in ([2], [2, -1], ["2", 0], None):
        shard(2, torch.ones(2, 3), start)  # type: ignore[arg-type]
        with pytest.raises(CorruptError, match="saved_offsets"):
            made.read(tmp_path, ranks=2)


def test_many_names_of_which_one_is_twice(folder: Path) -> None:
    names = ",".join(f'"{number}": ""' for number in range(200_000))
    (folder / INDEX).write_text(f'{{"weight_map": {{{names}, "199999": ""}}}}')
    with pytest.raises(CorruptError, match="'199999' twice"):
        read_catalog(str(folder))
