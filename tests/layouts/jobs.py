"""Jobs of several ranks that save and go on: each in processes of its own, all its actions in one group."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BEFORE, AFTER = 8, 8
"""Steps until the checkpoint, and from it on."""


class Action(NamedTuple):
    """Begin anew, or go on from `source`; save to `save` when loaded or trained `BEFORE` steps; then train `AFTER`."""

    source: str
    save: str


def run(layout: str, actions: Sequence[Action], *, timeout: float = 300) -> list[dict[str, Any]]:
    """What the job in `layout` tells of each action: its losses."""
    made = subprocess.run(
        [sys.executable, "-m", "tests.layouts.jobs", layout, json.dumps(actions)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if made.returncode:
        raise RuntimeError(f"{layout}: {made.stderr[-6000:]}")
    found: list[dict[str, Any]] = json.loads(made.stdout.splitlines()[-1])
    return found


def _rank(rank: int, world: int, layout: str, actions: list[list[str]]) -> list[dict[str, Any]]:
    from tests.layouts.layouts import LAYOUTS

    return [_act(LAYOUTS[layout].make, Action(*action)) for action in actions]


def _act(make: Any, action: Action) -> dict[str, Any]:
    import ucp

    job = make(5 if not action.source else 77)
    told: dict[str, Any] = {"before": []}
    if action.source:
        ucp.load(job.state, action.source)
    else:
        told["before"] = [job.step(number) for number in range(BEFORE)]
    ucp.save(job.state, action.save, step=BEFORE)
    told["after"] = [job.step(BEFORE + number) for number in range(AFTER)]
    return told


def _main(layout: str, actions: str) -> None:
    from tests.layouts.layouts import LAYOUTS
    from tests.support.gloo import preload, spawn

    preload()
    if LAYOUTS[layout].needs_deepspeed:
        from tests.support.engine import prepare_process

        prepare_process()
    told = spawn(_rank, LAYOUTS[layout].world, layout, json.loads(actions), timeout=560, method="fork")
    print(json.dumps(told[0]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
