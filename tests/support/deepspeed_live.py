"""Live DeepSpeed engines that save and load through ucp: jobs written as lists of actions, run on forked gloo ranks.

    run([Live(case, actions=[["train", 3], ["save", url], ["state", "saved"], ["train", 3]]), ...], out)

DeepSpeed is imported once for all jobs. Every job leaves a `Lived`: its losses, reports and records, and, for each
``state`` action, every tensor of the engine as `tests.support.truth` gathers them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.case import Case
from tests.support.deepspeed_job import RUN_LIMIT, job_environment, read_result, run_module


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A job: an engine built as `case` says, with `config` over its DeepSpeed configuration, and what is done with it.

    Actions are lists of a name and arguments, see `tests.support.deepspeed_live_ranks`. With ``fsdp2`` the model runs
    under FSDP2 in place of DeepSpeed; actions are then ``train``, ``at``, ``save``, ``load`` and ``state``.
    """

    case: Case
    actions: list[list[Any]]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    fsdp2: bool = False

    def to_json(self) -> dict[str, Any]:
        """The job as a JSON object."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "case": self.case.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Live:
        """The job that `to_json` wrote."""
        return cls(**{**data, "case": Case.from_json(data["case"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Lived:
    """What a job left: `record` has ``losses``, ``reports`` and ``records``, one of these per ``state`` action."""

    folder: Path
    record: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        """Losses of all steps."""
        losses: list[float] = self.record["losses"]
        return losses

    def state(self, name: str) -> dict[str, Any]:
        """Every tensor at the ``state`` action of this name."""
        from safetensors.torch import load_file

        return load_file(str(self.folder / f"{name}.safetensors"))

    def told(self, name: str) -> dict[str, Any]:
        """What is no tensor, at the ``state`` action of this name."""
        told: dict[str, Any] = self.record["records"][name]
        return told


def run(jobs: Sequence[Live], out: Path, *, timeout: float | None = None) -> list[Lived]:
    """Run the jobs one after another in one fresh process; RuntimeError with a rank's traceback if any fails."""
    folders = [out / str(number) for number in range(len(jobs))]
    listing = [{"job": job.to_json(), "out": str(folder)} for job, folder in zip(jobs, folders, strict=True)]
    run_module(__name__, json.dumps(listing), timeout=timeout or 60.0 + RUN_LIMIT * len(jobs))
    return [Lived(folder, read_result(folder)) for folder in folders]


def main(argv: list[str]) -> None:
    """Run the jobs listed in the file named by the first argument (``-`` is standard input)."""
    os.environ.update(job_environment())
    text = sys.stdin.read() if argv[1] == "-" else Path(argv[1]).read_text()
    from tests.support import deepspeed_live_ranks

    for item in json.loads(text):
        folder = Path(item["out"])
        folder.mkdir(parents=True)
        deepspeed_live_ranks.run(Live.from_json(item["job"]), folder, timeout=RUN_LIMIT)


if __name__ == "__main__":
    main(sys.argv)
