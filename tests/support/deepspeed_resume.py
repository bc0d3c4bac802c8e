"""Load a checkpoint with stock DeepSpeed under another layout: what state arrives, and which losses follow.

A test describes resumes as `Resume` values and calls `resume`; every one runs in a fresh process with real ranks.
The target's model is initialised from another seed than the source's, so whatever was not loaded shows.
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

OTHER_SEED = 4242


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """One load by stock DeepSpeed.

    `case` is the target: its layout, dtype and optimizer (see `target`).  `root` is the save root, that is the folder
    around the tag's folder; `tag` None takes the one named in ``latest`` (``latest_universal`` with `universal`).
    `reset_groups` sets each optimizer group's hyper-parameters from the given list after loading, which a ZeRO-3 job
    needs because DeepSpeed hands every group those of the first one (runtime/zero/stage3.py).
    `separate_steps` gives every optimizer state its own copy of the step count after loading: DeepSpeed's universal
    ZeRO-3 loader hands one tensor to all sub-groups, so torch's optimizers, which count in place, count it several
    times per step.
    `module_state` loads this file of named tensors into the module (not strictly) before DeepSpeed loads: its universal
    loader restores neither buffers nor frozen parameters.  `finish` names a function (``package.module:name``) to call
    with the engine and `root` right after loading.  `weights_only` loads without optimizer states.
    """

    case: Case
    root: str
    tag: str | None = None
    universal: bool = True
    first_step: int
    steps: int = 3
    reset_groups: list[dict[str, Any]] | None = None
    separate_steps: bool = False
    module_state: str | None = None
    finish: str | None = None
    weights_only: bool = False

    def to_json(self) -> dict[str, Any]:
        """The resume as a JSON object."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "case": self.case.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Resume:
        """The resume that `to_json` wrote."""
        return cls(**{**data, "case": Case.from_json(data["case"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Resumed:
    """What stock DeepSpeed made of a checkpoint.

    `record` has the keys of a job's ``case.json`` (global_steps, lrs, groups, steps, loss_scale, ...) as they were
    right after loading, and ``losses`` of the steps that followed; ``client_state`` is what DeepSpeed handed back, each
    value as its repr.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        """Losses of the steps after loading."""
        losses: list[float] = self.record["losses"]
        return losses

    def state(self) -> dict[str, Any]:
        """Every tensor right after loading, under the keys of ``truth.safetensors``."""
        from safetensors.torch import load_file

        return load_file(str(self.folder / "state.safetensors"))


def target(source: Case, **changes: Any) -> Case:
    """The source's job under another layout; saving options that would fix the reader's layout are dropped."""
    plain: dict[str, Any] = {"grad_accum_fp32": False, "elastic": False, "round_robin": False, "seed": OTHER_SEED}
    return source.replace(**{**plain, "parameter_alignment": False, **changes})


def resume(resumes: Sequence[Resume], out: Path, *, timeout: float | None = None) -> list[Resumed]:
    """Run the resumes one after another in one fresh process; results under ``out/0``, ``out/1``, ...

    RuntimeError with DeepSpeed's traceback if any fails.
    """
    folders = [out / str(i) for i in range(len(resumes))]
    listing = [{"resume": r.to_json(), "out": str(folder)} for r, folder in zip(resumes, folders, strict=True)]
    run_module(__name__, json.dumps(listing), timeout=timeout or 60.0 + RUN_LIMIT * len(resumes))
    return [Resumed(folder, read_result(folder)) for folder in folders]


def main(argv: list[str]) -> None:
    """Run the resumes listed in the file named by the first argument (``-`` is standard input)."""
    os.environ.update(job_environment())
    text = sys.stdin.read() if argv[1] == "-" else Path(argv[1]).read_text()
    from tests.support import deepspeed_ranks

    for item in json.loads(text):
        folder = Path(item["out"])
        folder.mkdir(parents=True)
        deepspeed_ranks.run_resume(Resume.from_json(item["resume"]), folder, timeout=RUN_LIMIT)


if __name__ == "__main__":
    main(sys.argv)
