"""The sizes and flags read from config.json are those of the module that the configuration makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.programs.hf.models import CASES, config, model_class
from ucp.converters._programs import PROGRAMS, from_config
from ucp.errors import FitError


def written(name: str, folder: Path) -> dict:
    """The config.json that transformers writes for a case."""
    config(CASES[name]).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_config_gives_program_and_sizes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    known = from_config(written(name, tmp_path), in_memory=True)
    assert known.program == case.program
    module = model_class(case)(config(case))
    assert (known.sizes["vocab"], known.sizes["hidden"]) == module.get_input_embeddings().weight.shape
    assert known.flags["tied"] == (module.get_output_embeddings().weight is module.get_input_embeddings().weight)
    assert known.flags.get("in_memory", True)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_defaults_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """A file without a key means the library's default; what is read must not depend on the key being written."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    default.save_pretrained(tmp_path)
    full = json.loads((tmp_path / "config.json").read_text())
    sparse = {
        key: value for key, value in full.items() if key not in ("tie_word_embeddings", "attention_bias", "mlp_bias")
    }
    assert from_config(full).flags == from_config(sparse).flags


def test_an_unknown_model_leads_to_the_cookbook() -> None:
    with pytest.raises(FitError, match="no program is shipped for model_type 'bloom'") as raised:
        from_config({"model_type": "bloom"})
    assert "cookbook" in str(raised.value.hint)
