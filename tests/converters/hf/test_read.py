"""What transformers, the Hub's library and PyTorch write is read bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.converters.hf import made
from ucp.checkpoint import Checkpoint
from ucp.converter import converter, read_catalog, read_sharded
from ucp.converters._hf.read import read_catalog as read_hf


@pytest.mark.parametrize("size", ["5GB", made.SMALL])
@pytest.mark.parametrize("name", made.CASES)
def test_saved_models_are_read(name: str, size: str, tmp_path: Path) -> None:
    made.model(name).save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == made.SMALL)
    catalog, found = made.read(tmp_path)
    assert catalog.source.family == "hf"
    assert made.same(found, made.on_disk(tmp_path))
    assert all(tensor.kind == "parameter" for tensor in catalog.tensors.values())


@pytest.mark.parametrize("size", ["5GB", made.SMALL])
def test_torch_files_are_read_and_shared_storages_are_ties(size: str, tmp_path: Path) -> None:
    model = made.model("llama-tied")
    made.save_torch_files(model.state_dict(), tmp_path / "a", size=size)
    model.config.save_pretrained(tmp_path / "a")
    catalog, found = made.read(tmp_path / "a")
    assert (len(list((tmp_path / "a").glob("*.bin"))) > 1) == (size == made.SMALL)
    wanted = dict(model.state_dict())
    if size == "5GB":
        # The Hub's library leaves one of two shared tensors out of the several files, and torch keeps both in one.
        assert catalog.ties == {"lm_head.weight": "model.embed_tokens.weight"} or "lm_head.weight" not in found
    assert made.same(found, {name: wanted[name] for name in found})
    assert found.keys() | {"lm_head.weight"} == wanted.keys()
    assert catalog.checksums


def test_a_file_of_torch_save_keeps_ties_views_and_other_dtypes(tmp_path: Path) -> None:
    base = torch.arange(48, dtype=torch.float16).reshape(6, 8)
    tensors = {
        "a": base,
        "b": base,
        "turned": base.t(),
        "row": base[2],
        "n": torch.tensor([3]),
        "low": torch.ones(3).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    catalog, found = made.read(tmp_path)
    assert catalog.ties == {"b": "a"}
    assert made.same(found, {name: tensor for name, tensor in tensors.items() if name != "b"})
    assert {name: catalog.tensors[name].kind for name in ("a", "n", "low")} == {
        "a": "parameter",
        "n": "buffer",
        "low": "parameter",
    }


def test_eight_bit_floats_and_integers_in_safetensors(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(4, 6).to(torch.float8_e4m3fn),
        "v": torch.randn(5).to(torch.float8_e5m2),
        "w.scale_inv": torch.rand(1),
        "half": torch.randn(3, 3, dtype=torch.float16),
        "ids": torch.arange(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    _, found = made.read(tmp_path)
    assert made.same(found, tensors)


def test_the_variant_that_is_asked_for_is_read(tmp_path: Path) -> None:
    whole, low = made.model("llama"), made.model("llama", dtype=torch.float16, seed=2)
    whole.save_pretrained(tmp_path)
    low.save_pretrained(tmp_path, variant="fp16", max_shard_size=made.SMALL)
    catalog, found = made.read(tmp_path, variant="fp16")
    assert made.same(found, dict(low.state_dict()))
    assert catalog.options == {"variant": "fp16"}
    assert made.same(made.read(tmp_path)[1], dict(whole.state_dict()))


def test_what_lies_beside_the_weights_is_carried(tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path)
    files = {
        "tokenizer.json": b"{}\n",
        "merges.txt": b"a b\n",
        "tokenizer.model": bytes(range(256)),
        "modeling_x.py": b"1/0",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    catalog, _ = made.read(tmp_path)
    assert catalog.state["files"] == files
    assert catalog.step == 3
    assert catalog.state["hf_config"]["model_type"] == "llama"
    assert catalog.state["generation_config"]["bos_token_id"] == 0
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= catalog.objects.keys()


def test_files_that_are_too_large_are_told(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with (tmp_path / "vocab.txt").open("wb") as file:
        file.truncate((64 << 20) + 1)
    catalog, _ = made.read(tmp_path)
    assert "files" not in catalog.state
    assert any("vocab.txt" in note for note in catalog.notes)


def test_other_weights_beside_are_told(tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    catalog, _ = made.read(tmp_path)
    assert [note for note in catalog.notes if note.startswith("pytorch_model.bin")]


@pytest.mark.parametrize(("name", "program"), [("llama", "hf_llama"), ("mixtral", "hf_mixtral"), ("gpt2", "hf_gpt2")])
def test_the_configuration_tells_the_program(name: str, program: str, tmp_path: Path) -> None:
    made.model(name).save_pretrained(tmp_path)
    sharded, _ = read_sharded(str(tmp_path))
    assert sharded.program == program
    assert sharded.config["layers"] == 3
    assert sharded.flags.get("in_memory") in (None, False)
    made.edit(tmp_path / "config.json", model_type="something-else")
    sharded, _ = read_sharded(str(tmp_path))
    assert sharded.program is None


def test_names_of_a_module_in_memory_are_recognised(tmp_path: Path) -> None:
    model = made.model("mixtral")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    model.config.save_pretrained(tmp_path)
    sharded, _ = read_sharded(str(tmp_path))
    assert sharded.flags["in_memory"] is True


def test_a_slice_reads_its_bytes(tmp_path: Path) -> None:
    weight = torch.randn(512, 64)
    save_file({"a": torch.ones(1000), "w": weight, "z": torch.ones(1000)}, tmp_path / "model.safetensors")
    store = made.Counting(str(tmp_path))
    ckpt = Checkpoint(read_hf(store), store)
    store.count.clear()
    assert torch.equal(ckpt["w"]["value"][64:128], weight[64:128])
    assert sum(store.count.values()) == weight.nbytes // 8


def test_a_slice_of_a_torch_file_reads_its_bytes(tmp_path: Path) -> None:
    weight = torch.randn(512, 1024)
    torch.save({"a": torch.ones(300_000), "w": weight}, tmp_path / "pytorch_model.bin")
    store = made.Counting(str(tmp_path))
    catalog = read_hf(store)
    assert sum(store.count.values()) < 200_000
    store.count.clear()
    assert torch.equal(Checkpoint(catalog, store)["w"]["value"][448:], weight[448:])
    assert sum(store.count.values()) == weight.nbytes // 8


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    made.model("llama").save_pretrained(tmp_path)
    catalog, _ = read_catalog(str(tmp_path / "model.safetensors"))
    assert catalog.source.family == "hf"
    assert len(catalog.tensors) == len(made.on_disk(tmp_path))


def test_other_folders_are_none_of_this_family(tmp_path: Path) -> None:
    from ucp.store import open_store

    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert not converter("hf").detect(open_store(str(tmp_path)))
    assert converter("safetensors").detect(open_store(str(tmp_path)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied"])
def test_the_optimizer_beside_the_weights_is_read(name: str, tmp_path: Path) -> None:
    """As Trainer files it, in two groups; the files of weights do not keep the order that its numbers have."""
    model = made.model(name)
    decayed = {id(p) for p in model.parameters() if p.dim() > 1}
    groups = [[p for p in model.parameters() if (id(p) in decayed) == first] for first in (True, False)]
    settings = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(settings, lr=1e-3)
    for step in range(2):
        model((made.IDS + step) % 40, labels=made.IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path, max_shard_size=made.SMALL)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    catalog, store = read_catalog(str(tmp_path))
    assert (catalog.source.family, catalog.step) == ("hf", 2)
    assert not [tensor.name for tensor in catalog.tensors.values() if tensor.undecided]
    for parameter_name, parameter in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            found = made.value(catalog, store, parameter_name, state)
            assert torch.equal(found, optimizer.state[parameter][state]), (parameter_name, state)
    assert [group.options["weight_decay"] for group in catalog.param_groups] == [0.1, 0.0]
    (left,) = converter("hf").target(catalog, store).notes
    assert "exp_avg exp_avg_sq" in left
