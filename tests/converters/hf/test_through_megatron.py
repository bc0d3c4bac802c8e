"""Every model there and back through Megatron-Core's layout at other ranks: the folder of save_pretrained returns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.converters.hf import made
from ucp.converter import Layout
from ucp.layout import Mesh
from ucp.run.convert import convert


@pytest.mark.parametrize("mesh", [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 3}], ids=str)
@pytest.mark.parametrize("name", made.CASES)
def test_models_return_from_megatron(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    source = tmp_path / "source"
    made.model(name).save_pretrained(source)
    convert(str(source), str(tmp_path / "megatron"), to="megatron", layout=Layout(Mesh(mesh)))
    written = made.to_hf(tmp_path / "megatron", tmp_path / "written", config=str(source))
    assert made.names(written) == made.names(source)
    for file in made.names(source):
        assert (written / file).read_bytes() == (source / file).read_bytes(), file
