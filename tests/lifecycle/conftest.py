"""Checkpoints that tests may read and copy, but not change."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.lifecycle import made


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks: native checkpoints of steps 2 and 3, ``native-2`` and ``native-3``; 3 as ``universal`` too.

    A parameter is frozen. Beside them ``hf`` and ``dcp``, folders of other libraries.
    """
    folder = tmp_path_factory.mktemp("saved")
    made.save({folder / "native-2": 2, folder / "native-3": 3})
    for step in (2, 3):
        ucp.convert(str(folder / f"native-{step}"), str(folder / f"universal-{step}"))
    made.safetensors(folder / "hf")
    made.dcp(folder / "dcp")
    return folder
