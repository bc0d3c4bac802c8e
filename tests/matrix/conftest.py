"""The sources of the matrix, made once per test session whatever the number of workers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.matrix import sources


@pytest.fixture(scope="session")
def sources_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all sources."""
    for name in ("deepspeed", "transformers", "accelerate", "lightning", "megatron"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; the matrix reads what the real {name} writes")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "matrix-sources"
    with FileLock(f"{folder}.lock"):
        done = folder / "done"
        if not done.exists():
            assert not folder.exists(), "making the sources failed before in this session"
            folder.mkdir()
            sources.make(folder)
            done.touch()
    return folder
