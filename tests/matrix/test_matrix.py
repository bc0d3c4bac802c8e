"""Every source into every target: what the page says is what comes of it, and whatever comes is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.outcome import outcome
from tests.matrix.page import expected
from tests.matrix.sources import ROWS, Source
from tests.matrix.targets import COLUMNS, Target

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", COLUMNS, ids=lambda target: target.label)
@pytest.mark.parametrize("source", ROWS, ids=lambda source: source.label)
def test_cell(source: Source, target: Target, sources_folder: Path, tmp_path: Path) -> None:
    found = outcome(source, target, sources_folder, tmp_path / "there")
    assert found == expected()[source.label, target.label]
