"""What jobs of these tests leave in the memory of the machine goes with their folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ucp.elastic.options import shared_memory
from ucp.elastic.world import job_name


@pytest.fixture(autouse=True)
def nothing_left_in_memory(tmp_path: Path) -> Iterator[None]:
    """A job that failed leaves its folder for its next start, which never comes here."""
    yield
    theirs = Path(shared_memory(), f"ucp-{os.geteuid()}")
    left: list[str] = []
    with suppress(FileNotFoundError):  # also where the job of another test ends now
        left = os.listdir(theirs)
    for folder, _, _ in os.walk(tmp_path) if left else ():
        for name in left:  # of a run at a URL that was never written to, there is no folder
            if name in (job_name(folder), job_name(f"{folder}/{name.rpartition('-')[0]}")):
                shutil.rmtree(theirs / name, ignore_errors=True)
