"""What we write is what ``save_pretrained`` writes, and ``from_pretrained`` takes it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tests.converters.hf import made
from tests.programs.hf import models
from ucp.converter import read_catalog
from ucp.errors import ConflictError, FitError, UsageError
from ucp.run.convert import convert, prepare


@pytest.mark.parametrize("name", made.CASES)
def test_one_file_is_byte_for_byte_theirs(name: str, tmp_path: Path) -> None:
    model = made.model(name)
    model.save_pretrained(tmp_path / "many", max_shard_size=made.SMALL)
    model.save_pretrained(tmp_path / "one")
    written = made.to_hf(tmp_path / "many", tmp_path / "written")
    assert made.names(written) == made.names(tmp_path / "one")
    for file in made.names(written):
        ours, theirs = ((folder / file).read_bytes() for folder in (written, tmp_path / "one"))
        assert ours == theirs, file


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", made.CASES)
def test_from_pretrained_takes_other_sizes_of_files(name: str, through: bool, tmp_path: Path) -> None:
    model = made.model(name)
    source = tmp_path / "source"
    model.save_pretrained(source)
    if through:
        convert(str(source), str(tmp_path / "universal"), to="universal")
        source = tmp_path / "universal"
    written = made.to_hf(source, tmp_path / "written", shard_bytes="7KB")
    back = made.loaded(name, written)
    assert made.same(back.state_dict(), model.state_dict())
    theirs = made.loaded(name, tmp_path / "source")
    assert torch.equal(made.logits(back), made.logits(theirs))
    assert made.same(made.read(written)[1], made.on_disk(tmp_path / "source"))
    assert json.loads((written / "config.json").read_text()) == json.loads(
        (tmp_path / "source" / "config.json").read_text()
    )


def test_files_are_cut_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    source = tmp_path / "source"
    # torch keeps the order of the module's tensors, in which transformers deals them out.
    made.save_torch_files(model.state_dict(), source)
    for file in ("config.json", "generation_config.json"):
        (source / file).write_bytes((tmp_path / "theirs" / file).read_bytes())
    written = made.to_hf(source, tmp_path / "written", shard_bytes="9KB")
    assert made.names(written) == made.names(tmp_path / "theirs")
    for file in made.names(written):
        assert (written / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file


@pytest.mark.parametrize("name", made.CASES)
def test_logical_names_become_those_of_the_files(name: str, tmp_path: Path) -> None:
    model = made.model(name)
    model.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "universal"), to="universal", program="auto")
    assert "embed.weight" in read_catalog(str(tmp_path / "universal"))[0].tensors
    written = made.to_hf(tmp_path / "universal", tmp_path / "written")
    assert (written / "model.safetensors").read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()
    assert made.same(made.loaded(name, written).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-neox"])
def test_names_in_memory_become_those_of_the_files(name: str, tmp_path: Path) -> None:
    model = made.model(name)
    model.save_pretrained(tmp_path / "theirs")
    source = tmp_path / "source"
    made.save_torch_files(model.state_dict(), source)
    (source / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    written = made.to_hf(source, tmp_path / "written")
    assert made.same(made.on_disk(written), made.on_disk(tmp_path / "theirs"))
    assert made.same(made.loaded(name, written).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "bf16"])
def test_a_narrower_dtype_is_a_loss_and_what_torch_rounds(dtype: str, tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path / "source")
    conversion = prepare(str(tmp_path / "source"), str(tmp_path / "refused"), to="hf", dtype=dtype, lossy=True)
    (loss,) = conversion.target.losses
    assert "float32 to" in loss
    with pytest.raises(FitError):
        prepare(str(tmp_path / "source"), str(tmp_path / "refused"), to="hf", dtype=dtype)
    written = made.to_hf(tmp_path / "source", tmp_path / "written", dtype=dtype, lossy=True)
    rounded = model.to(getattr(torch, {"bf16": "bfloat16"}.get(dtype, dtype)))
    back = made.loaded("llama", written)
    assert made.same(back.state_dict(), rounded.state_dict())
    assert json.loads((written / "config.json").read_text())["dtype"] == {"bf16": "bfloat16"}.get(dtype, dtype)


def test_a_wider_dtype_is_none(tmp_path: Path) -> None:
    model = made.model("llama-tied")
    model.save_pretrained(tmp_path / "source")
    conversion = prepare(str(tmp_path / "source"), str(tmp_path / "written"), to="hf", dtype="float32")
    assert not conversion.target.losses
    written = made.to_hf(tmp_path / "source", tmp_path / "written", dtype="float32")
    assert made.same(made.loaded("llama-tied", written).state_dict(), model.float().state_dict())


def test_integers_and_eight_bit_floats_are_not_cast(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4), "ids": torch.arange(4), "q": torch.ones(4).to(torch.float8_e4m3fn)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    written = made.to_hf(tmp_path / "source", tmp_path / "written", dtype="bfloat16", lossy=True)
    assert made.same(made.on_disk(written), {**tensors, "w": tensors["w"].bfloat16()})


def test_a_tied_head_is_compared_and_left_out(tmp_path: Path) -> None:
    model = made.model("llama-tied")
    source = tmp_path / "source"
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(source)
    written = made.to_hf(source, tmp_path / "written")
    assert "lm_head.weight" not in made.on_disk(written)
    assert made.same(made.loaded("llama-tied", written).state_dict(), model.state_dict())
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConflictError, match=r"embed_tokens\.weight"):
        made.to_hf(source, tmp_path / "other")
    assert not (tmp_path / "other" / "config.json").exists()


def test_tied_storages_of_an_untied_model_are_written_twice(tmp_path: Path) -> None:
    model = made.model("llama")
    tensors = dict(model.state_dict())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "source").mkdir()
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "source")
    written = made.to_hf(tmp_path / "source", tmp_path / "written")
    assert made.same(made.on_disk(written), tensors)
    made.loaded("llama", written)


OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}),
    "bert": ("BertForMaskedLM", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "gemma2": ("Gemma2ForCausalLM", {**models.DENSE, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", {**models.DENSE, "pad_token_id": 0}),
    "opt": ("OPTForCausalLM", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}),
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_models_without_a_program_come_back(name: str, told: bool, tmp_path: Path) -> None:
    """With the tensors that they share, whether the configuration tells of that or not."""
    cls = getattr(transformers, OTHERS[name][0])
    model = cls(cls.config_class(vocab_size=40, **{k: v for k, v in OTHERS[name][1].items() if k != "vocab_size"}))
    source = tmp_path / "source"
    source.mkdir()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    model.config.save_pretrained(source)
    if not told:
        made.edit(source / "config.json", tie_word_embeddings=None)
    written = made.to_hf(source, tmp_path / "written")
    back, info = cls.from_pretrained(written, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert made.same(back.state_dict(), model.state_dict())


def test_small_files_are_carried(tmp_path: Path) -> None:
    made.model("llama").save_pretrained(tmp_path / "source")
    files = {"tokenizer.json": b'{"a": 1}', "tokenizer.model": bytes(range(256)), "README.md": b"# hello\n"}
    for name, data in files.items():
        (tmp_path / "source" / name).write_bytes(data)
    convert(str(tmp_path / "source"), str(tmp_path / "universal"), to="universal")
    written = made.to_hf(tmp_path / "universal", tmp_path / "written")
    assert {name: (written / name).read_bytes() for name in files} == files
    assert (written / "generation_config.json").exists()


def test_the_configuration_is_put_last(tmp_path: Path) -> None:
    made.model("llama").save_pretrained(tmp_path / "source", max_shard_size=made.SMALL)
    target = prepare(str(tmp_path / "source"), str(tmp_path / "written"), to="hf", shard_bytes=made.SMALL).target
    assert target.root == "config.json"
    assert [path for path, _ in target.finish({})][-2:] == ["model.safetensors.index.json", "config.json"]


def test_without_a_configuration_one_is_asked_for(tmp_path: Path) -> None:
    model = made.model("llama")
    (tmp_path / "source").mkdir()
    save_file(dict(model.state_dict()), tmp_path / "source" / "model.safetensors")
    with pytest.raises(UsageError, match=r"config\.json") as failed:
        made.to_hf(tmp_path / "source", tmp_path / "written")
    assert "config=" in (failed.value.hint or "")
    model.config.save_pretrained(tmp_path / "config")
    written = made.to_hf(tmp_path / "source", tmp_path / "written", config=str(tmp_path / "config" / "config.json"))
    assert made.same(made.loaded("llama", written).state_dict(), model.state_dict())
    (tmp_path / "config" / "tokenizer.json").write_text("{}")
    folder = made.to_hf(tmp_path / "source", tmp_path / "folder", config=str(tmp_path / "config"))
    assert made.names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    with pytest.raises(UsageError, match="config="):
        made.to_hf(tmp_path / "source", tmp_path / "other", config=str(tmp_path / "none.json"))


def test_the_configuration_says_the_dtype_that_is_written(tmp_path: Path) -> None:
    model = made.model("llama")
    model.save_pretrained(tmp_path / "source")
    made.edit(tmp_path / "source" / "config.json", dtype="bfloat16")
    conversion = prepare(str(tmp_path / "source"), str(tmp_path / "written"), to="hf")
    assert any("bfloat16" in note for note in conversion.notes)
    written = made.to_hf(tmp_path / "source", tmp_path / "written")
    assert made.same(made.loaded("llama", written).state_dict(), model.state_dict())


def test_a_few_wider_tensors_do_not_change_the_dtype(tmp_path: Path) -> None:
    model = made.model("llama-tied")
    model.save_pretrained(tmp_path / "source")
    tensors = made.on_disk(tmp_path / "source")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    written = made.to_hf(tmp_path / "source", tmp_path / "written")
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
    assert made.same(made.on_disk(written), tensors)


def test_the_header_says_that_torch_wrote_it(tmp_path: Path) -> None:
    made.model("llama").save_pretrained(tmp_path / "source")
    written = made.to_hf(tmp_path / "source", tmp_path / "written")
    with safe_open(written / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_bytes": "much"}, "shard_bytes"),
        ({"shard_bytes": "0"}, "shard_bytes"),
        ({"dtype": "int8"}, "int8"),
        ({"size": 3}, "unknown option 'size'"),
    ],
)
def test_options_that_are_none(options: dict[str, object], said: str, tmp_path: Path) -> None:
    made.model("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match=said):
        made.to_hf(tmp_path / "source", tmp_path / "written", **options)


def test_a_carried_file_with_a_path_for_a_name_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from ucp.converter import converter, read_catalog

    made.model("llama").save_pretrained(tmp_path)
    catalog, store = read_catalog(str(tmp_path))
    for name in ("../x.json", "model.safetensors", ".hidden.json", 3):
        hostile = replace(catalog, state={**catalog.state, "files": {name: b"x"}})
        with pytest.raises(FitError):
            list(converter("hf").target(hostile, store).finish({}))


def test_a_configuration_of_another_model_is_told(tmp_path: Path) -> None:
    """from_pretrained makes up what it misses."""
    model = made.model("llama")
    model.save_pretrained(tmp_path / "source")
    assert not prepare(str(tmp_path / "source"), str(tmp_path / "there"), to="hf").notes
    held = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    made.save_torch_files(held, tmp_path / "less")
    config = str(tmp_path / "source" / "config.json")
    notes = prepare(str(tmp_path / "less"), str(tmp_path / "there"), to="hf", config=config).notes
    assert any("do not quite fit" in note and "model.norm.weight" in note for note in notes)
    made.edit(tmp_path / "source" / "config.json", hidden_size=4096)
    notes = prepare(str(tmp_path / "source"), str(tmp_path / "there"), to="hf").notes
    assert any("do not quite fit" in note and "4096" in note for note in notes)
