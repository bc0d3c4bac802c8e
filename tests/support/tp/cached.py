"""Tensor-parallel cases for tests, each made once per session whatever the number of workers.

``UCP_TEST_CASES`` names a folder that outlives the session, as for the other cases.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.tp.case import CASES, QUICK, TpCase
from tests.support.tp.job import run_jobs

TpFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def tp_folder(tmp_path_factory: pytest.TempPathFactory) -> TpFolder:
    """Call with a case's name to get its folder: ``ckpt/``, ``truth.safetensors`` and ``case.json``."""
    kept = os.environ.get("UCP_TEST_CASES")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root = Path(kept) / f"tp-{_digest()}" if kept else shared / "tp-cases"
    root.mkdir(parents=True, exist_ok=True)

    def make(cases: Iterable[TpCase]) -> None:
        wanted = {root / case.key(): case for case in cases}
        _need("deepspeed")
        if any(case.launcher == "autotp" for case in wanted.values()):
            _need("transformers")
        with contextlib.ExitStack() as locks:
            # One order for all workers, so that two of them never wait for each other.
            for folder in sorted(wanted):
                locks.enter_context(FileLock(f"{folder}.lock"))
            missing = {folder: case for folder, case in wanted.items() if not (folder / "case.json").exists()}
            if missing:
                run_jobs(missing)

    def folder(name: str) -> Path:
        make(CASES[other] for other in (QUICK if name in QUICK else (name,)))
        return root / CASES[name].key()

    return folder


def _need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; this test reads what the real {name} writes (pip install {name})")


def _digest() -> str:
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), *(here.parent / f"{name}.py" for name in ("engine", "truth", "model"))]
    found = importlib.util.find_spec("deepspeed") is not None
    version = importlib.metadata.version("deepspeed") if found else "none"
    return hashlib.sha256(version.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
