"""Inspection starts quickly: neither torch nor zarr is loaded, nor rich where nothing is drawn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import REPOSITORY, environment

PROGRAM = """
import sys
from tests.cli.shards import main
try:
    main()
finally:
    print(*[name for name in ("torch", "zarr", "rich", "numpy") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [["info"], ["ls"], ["tree"], ["show", "embed.weight"], ["show", "embed.weight", "--stats"], ["state"]],
    ids=" ".join,
)
def test_inspecting_loads_nothing_heavy(checkpoint, arguments) -> None:
    loaded = modules_loaded(arguments[0], str(checkpoint), *arguments[1:])
    assert not loaded & {"torch", "zarr", "rich"}


def test_planning_loads_nothing_heavy(checkpoint, tmp_path) -> None:
    loaded = modules_loaded("plan", str(checkpoint), str(tmp_path / "new"), "--to", "shards")
    assert not loaded & {"torch", "zarr", "rich"}


def modules_loaded(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=environment(UCP_QUIET="1"),
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())
