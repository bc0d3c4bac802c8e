"""Stock torch jobs load what is written, strictly: state bit for bit, and training goes on as if never interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.converters.dcp import write_jobs
from tests.converters.dcp.write_support import STEPS, Trained, check_resumed
from tests.support.gloo import spawn
from ucp.run.convert import convert

FIRST = ("lm", "fsdp", 2, False, 2)
JOBS = [
    ("lm", "plain", 1, False, 1),
    ("lm", "ddp", 2, False, 3),
    ("lm", "ddp", 2, True, 2),
    ("lm", "fsdp", 3, True, 4),
    ("lm", "fsdp1", 2, False, 3),
    ("lm", "hsdp", 4, False, 2),
    ("unused", "fsdp", 2, False, 2),
    ("stack", "tp", 2, False, 3),
    ("stack", "fsdp+tp", 4, True, 5),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return {kind: Trained(tmp_path_factory.mktemp(kind), kind) for kind in ("lm", "unused", "stack")}


@pytest.mark.parametrize(
    "job",
    [FIRST, *(pytest.param(job, marks=pytest.mark.slow) for job in JOBS)],
    ids=["-".join(map(str, job)) for job in (FIRST, *JOBS)],
)
def test_a_stock_job_goes_on(job: tuple[str, str, int, bool, int], trained: dict[str, Trained], tmp_path: Path) -> None:
    kind, layout, world, flat, files = job
    url = str(tmp_path / "dcp")
    convert(trained[kind].url, url, to="dcp", files=files, flat=flat)
    for result in spawn(write_jobs.resume, world, url, kind, layout, flat, STEPS):
        check_resumed(result, trained[kind])
        # The order of additions differs between layouts after the first forward pass.
        assert result["losses"] == pytest.approx(trained[kind].losses, rel=2e-5)
        if "tp" not in layout:
            assert result["losses"][0] == trained[kind].losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "other"), [("fsdp", "hsdp"), ("hsdp", "fsdp")])
def test_from_a_stock_save_over_ours_to_a_stock_load(layout: str, other: str, tmp_path: Path) -> None:
    """What FSDP2 saved on some ranks is written anew and loaded on others, as if it were the first save."""
    saved, url = str(tmp_path / "saved"), str(tmp_path / "written")
    ranks = {"fsdp": 3, "hsdp": 4}
    first, *_ = spawn(write_jobs.train_and_save, ranks[layout], saved, "lm", layout, STEPS)
    convert(saved, url, to="dcp", files=2)
    for result in spawn(write_jobs.resume, ranks[other], url, "lm", other, False, STEPS):
        assert result["state"].keys() == first["state"].keys()
        assert all(np.array_equal(result["state"][key], value) for key, value in first["state"].items())
        assert result["hyper"] == first["hyper"]
        assert result["losses"] == pytest.approx(first["losses"], rel=2e-5)
