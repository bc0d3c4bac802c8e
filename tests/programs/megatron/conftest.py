"""Megatron-Core's models, run once per test session whatever the number of workers."""

from __future__ import annotations

import os
import pickle

import pytest
from filelock import FileLock

from tests.programs.megatron.models import GRIDS
from tests.support.megatron import Family, make_families


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Every model by name, as each of its grids holds it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "megatron"
    done = folder / "families.pickle"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir()
            done.write_bytes(pickle.dumps(make_families(GRIDS, folder)))
        families: dict[str, Family] = pickle.loads(done.read_bytes())
    return families
