"""Where `just servers` puts what pip cannot install into the environment of the tests."""

from __future__ import annotations

import os
from pathlib import Path

RECIPE = "run `just servers`"


def servers_folder() -> Path:
    """``$UCP_TEST_SERVERS``, or ``.ci/servers`` in the repository."""
    chosen = os.environ.get("UCP_TEST_SERVERS")
    return Path(chosen) if chosen else Path(__file__).parents[2] / ".ci" / "servers"


def missing_file(*names: str) -> str:
    """The first of some files below the folder that is not there; "" if all are."""
    absent = [name for name in names if not (servers_folder() / name).exists()]
    return f"{absent[0]} is not installed: {RECIPE}" if absent else ""
