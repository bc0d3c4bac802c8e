"""``ucp`` on the test family with a storage that takes its time, so that a run can be watched and interrupted."""

from __future__ import annotations

import sys
import time
from typing import Any

from tests.cli import shards
from ucp.store import LocalStore, Writer

_PAUSE = 0.5
"""Seconds before each object."""

_create = LocalStore.create


def _slow(self: LocalStore, path: str, size: int) -> Writer:
    time.sleep(_PAUSE)
    return _create(self, path, size)


def main() -> None:
    """Install the delay and run."""
    store: Any = LocalStore
    store.create = _slow
    shards.main()


if __name__ == "__main__":
    sys.argv[0] = "ucp"
    main()
