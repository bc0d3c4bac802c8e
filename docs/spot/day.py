"""A day of a job on spot instances, on one machine: ``python docs/spot/day.py FOLDER``.

Four nodes train, each of them an agent of torchrun. Two are taken away without notice, one after the other, and come
back; what that made of the number of ranks and of the loss is in ``FOLDER/picture.svg``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ucp.demo.elastic.cluster import Cluster
from ucp.demo.elastic.picture import Done, Story, picture

TRAIN = str(Path(__file__).with_name("train.py"))
NODES = {"a": 1, "b": 1, "c": 1, "d": 1}
TAKEN, BACK = "killed, its memory lost", "back"
EVENTS = ((25, TAKEN, "d"), (50, TAKEN, "c"), (75, BACK, "c"), (100, BACK, "d"))
"""After which step what happens."""
LAST, PATIENCE = 150, 600.0


def main(folder: Path) -> None:
    """Run the day, and draw it."""
    log, marks = folder / "log", []
    with Cluster(folder, [TRAIN, str(folder / "checkpoints"), str(log)], nodes=NODES) as cluster:
        for name in NODES:
            cluster.start(name)
        for step, what, name in EVENTS:
            cluster.wait(lambda step=step: reached(log) >= step, seconds=PATIENCE, what=f"step {step}")
            told = f"node {name} is {what}"
            marks.append((time.time(), told))
            sys.stdout.write(f"step {reached(log)}: {told}\n")
            sys.stdout.flush()
            (cluster.start if what == BACK else cluster.kill_node)(name)
        cluster.wait(lambda: reached(log) >= LAST, seconds=PATIENCE, what="the end")
    (folder / "picture.svg").write_text(picture(story(lines(log), marks), "A job on spot instances"))
    sys.stdout.write(f"done: {folder / 'picture.svg'}\n")


def lines(log: Path) -> list[dict[str, Any]]:
    """What rank 0 wrote down, a step at a time."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def reached(log: Path) -> int:
    """The newest step."""
    return max((line["step"] for line in lines(log)), default=0)


def story(done: list[dict[str, Any]], marks: list[tuple[float, str]]) -> Story:
    """For the picture; a step counts as its last epoch did it."""
    begun = done[0]["time"]
    last = {line["step"]: line["epoch"] for line in done}
    epochs = sorted({line["epoch"] for line in done})
    stretches = [[line for line in done if line["epoch"] == epoch] for epoch in epochs]
    return Story(
        worlds=[
            (one[0]["time"] - begun, one[-1]["time"] - begun, one[0]["ranks"], f"dp={one[0]['ranks']}")
            for one in stretches
        ],
        steps=[
            Done(line["time"] - begun, line["step"], line["loss"], last[line["step"]] == line["epoch"]) for line in done
        ],
        marks=[(moment - begun, what) for moment, what in marks],
        undisturbed=[],
    )


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if given.exists():
        sys.exit(f"{given} is there already: a day needs a new folder")
    main(given)
