"""Real training jobs of Megatron-Core, each run once per test session whatever the number of workers."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from tests.converters.megatron.read_jobs import JOBS, SLOW_JOBS
from tests.support import megatron_cpu, megatron_trained
from tests.support.megatron_trained import Job, Trained, train

ByName = dict[str, Trained]


def _digest(jobs: Sequence[Job]) -> str:
    """Checkpoints that outlive the session are bound to the code that made them."""
    code = (Path(str(module.__file__)).read_bytes() for module in (megatron_trained, megatron_cpu))
    ranks = sorted(Path(str(megatron_trained.__file__)).parent.glob("megatron*_ranks.py"))
    held = [repr(jobs).encode(), *code, *(path.read_bytes() for path in ranks)]
    return hashlib.sha256(b"\0".join(held)).hexdigest()[:16]


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Job], str], ByName]:
    """Runs jobs, all in one process, unless another worker has done so."""
    base = tmp_path_factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept = os.environ.get("UCP_TEST_CASES")

    def run(jobs: Sequence[Job], name: str) -> ByName:
        folder = Path(kept) / f"megatron-{_digest(jobs)}" if kept else home / f"megatron-{name}"
        done = folder / "done.pickle"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                done.write_bytes(pickle.dumps(train(jobs, folder)))
            found: ByName = pickle.loads(done.read_bytes())
        return found

    return run


@pytest.fixture(scope="session")
def trained(training: Callable[[Sequence[Job], str], ByName]) -> ByName:
    """The jobs of `JOBS` by name."""
    return training(JOBS, "trained")


@pytest.fixture(scope="session")
def trained_long(training: Callable[[Sequence[Job], str], ByName]) -> ByName:
    """The jobs of `SLOW_JOBS` by name."""
    return training(SLOW_JOBS, "trained-long")
