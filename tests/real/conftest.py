"""Real checkpoints for the tests below, each made once per test session whatever the number of workers."""

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

from tests.real.moe import moe
from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.deepspeed_job import run_jobs

__all__ = ["moe"]

DeepSpeedCase = Callable[[Case], Path]
DeepSpeedCases = Callable[[Iterable[Case]], dict[str, Path]]


@pytest.fixture(scope="session")
def real_cases_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of this session's generated checkpoints, common to all workers.

    ``UCP_TEST_CASES`` names a folder that outlives the session; entries there are bound to the code that made them.
    """
    kept = os.environ.get("UCP_TEST_CASES")
    if kept:
        folder = Path(kept) / _support_digest()
    else:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "deepspeed-cases"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def deepspeed_cases(real_cases_folder: Path, request: pytest.FixtureRequest) -> DeepSpeedCases:
    """Call with cases to get each one's folder by name.

    The missing ones are made in one process, and with them all that selected tests have as the parameter `opened`:
    DeepSpeed takes longer to start than a case takes.
    """
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    opened = {CASES[call.params["opened"]] for call in calls if call.params.get("opened") in CASES}

    def make(cases: Iterable[Case]) -> dict[str, Path]:
        asked = list(cases)
        whole = all((real_cases_folder / case.key() / "case.json").exists() for case in asked)
        wanted = {real_cases_folder / case.key(): case for case in (asked if whole else {*asked, *opened})}
        _need_packages(wanted.values())
        with contextlib.ExitStack() as locks:
            # One order for all workers, so that two of them never wait for each other.
            for folder in sorted(wanted):
                locks.enter_context(FileLock(f"{folder}.lock"))
            _make_missing(wanted)
        return {case.name: real_cases_folder / case.key() for case in asked}

    return make


@pytest.fixture(scope="session")
def deepspeed_case(deepspeed_cases: DeepSpeedCases) -> DeepSpeedCase:
    """Call with a case to get its folder: ``ckpt/``, ``truth.safetensors`` and ``case.json``."""
    return lambda case: deepspeed_cases([case])[case.name]


@pytest.fixture(scope="session")
def needs_deepspeed() -> None:
    """Skip where DeepSpeed is not installed."""
    _need_module("deepspeed")


def _need_packages(cases: Iterable[Case]) -> None:
    _need_module("deepspeed")
    for case in cases:
        if case.launcher in ("trainer", "accelerate"):
            _need_module("accelerate")
        if case.launcher == "trainer":
            _need_module("transformers")


def _need_module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; this test reads what the real {name} writes (pip install {name})")


def _make_missing(wanted: dict[Path, Case]) -> None:
    missing = {folder: case for folder, case in wanted.items() if not (folder / "case.json").exists()}
    for folder in missing:
        error = folder.with_name(folder.name + ".error")
        if error.exists():
            raise RuntimeError(f"making this case failed before in this session: {error.read_text()}")
    if not missing:
        return
    try:
        run_jobs(missing)
    except Exception as failure:
        for folder in missing:
            if not folder.exists():
                folder.with_name(folder.name + ".error").write_text(str(failure))
        raise


def _support_digest() -> str:
    sources = sorted((Path(__file__).parents[1] / "support").glob("*.py"))
    found = importlib.util.find_spec("deepspeed") is not None
    version = importlib.metadata.version("deepspeed") if found else "none"
    text = version.encode() + b"".join(path.read_bytes() for path in sources)
    return hashlib.sha256(text).hexdigest()[:12]
