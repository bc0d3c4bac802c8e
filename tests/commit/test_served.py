"""The same on real servers: a writer killed at every change leaves the old or the new checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import Endpoint
from tests.servers.fixtures import served

__all__ = ["served"]

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
_MINUTES = 20


@pytest.mark.parametrize("story", ["convert", "convert --overwrite", "save over", "save universal over", "cp"])
@pytest.mark.parametrize("server", ["moto", "ceph"])
def test_at_every_change(served: Callable[[str], Endpoint], server: str, story: str) -> None:
    endpoint = served(server)
    name = story.replace(" ", "").replace("--", "-")
    command = [sys.executable, "-m", "tests.commit.served", server, endpoint.url(f"crashes/{name}"), story]
    ended = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **endpoint.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 * _MINUTES,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert f"{story} on {server}:" in ended.stdout
