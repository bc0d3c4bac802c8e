"""Make the checkpoint to measure with: a real DeepSpeed run on gloo ranks, kept in a cache folder.

    python -m bench.make --stage 1 [--millions 240] [--ranks 4] [--folder DIR]

The model trains for one step in bfloat16 with float32 masters under AdamW with two parameter groups, and saves with
`engine.save_checkpoint`. At 240M parameters and four ranks this takes about 12 GiB of memory and a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "universal-checkpoint-bench"
REPOSITORY = Path(__file__).resolve().parents[1]
RUN_LIMIT = 1800.0
"""Seconds a run may take before its ranks are killed."""


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint that DeepSpeed saved: `root` is the folder given to ``save_checkpoint``."""

    root: Path
    stage: int
    ranks: int
    layers: int
    parameters: int
    tensors: int
    versions: dict[str, str]

    @property
    def tag(self) -> Path:
        """The folder of the one saved step."""
        return self.root / (self.root / "latest").read_text().strip()

    @property
    def files(self) -> list[Path]:
        """The files of the saved step."""
        return sorted(path for path in self.tag.iterdir() if path.is_file())

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the step."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def shard_bytes(self) -> int:
        """Bytes of the optimizer shards."""
        return sum(path.stat().st_size for path in self.files if "optim_states" in path.name)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state itself: master, exp_avg and exp_avg_sq of every parameter in float32."""
        return 12 * self.parameters

    @property
    def has_working_copy(self) -> bool:
        """Whether low-precision weights lie beside the shards (ZeRO-3 leaves them out)."""
        return self.stage < 3


def made(*, stage: int, millions: float, ranks: int, folder: Path) -> Made:
    """The checkpoint from the cache `folder`, made there first if it is missing."""
    home = folder / f"zero{stage}-{millions:g}m-dp{ranks}"
    if not home.exists():
        words = ["--stage", stage, "--millions", millions, "--ranks", ranks, "--folder", folder]
        command = [sys.executable, "-m", "bench.make", *map(str, words)]
        subprocess.run(command, check=True, cwd=REPOSITORY)
    return Made(home / "ckpt", **json.loads((home / "made.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a DeepSpeed checkpoint to measure with.")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--millions", type=float, default=240)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=CACHE)
    given = parser.parse_args()
    home = given.folder.absolute() / f"zero{given.stage}-{given.millions:g}m-dp{given.ranks}"
    partial = home.with_name(home.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    facts = _train(partial, stage=given.stage, millions=given.millions, ranks=given.ranks)
    (partial / "made.json").write_text(json.dumps(facts, indent=1))
    partial.replace(home)


def _train(home: Path, *, stage: int, millions: float, ranks: int) -> dict[str, Any]:
    from tests.support.deepspeed_job import job_environment

    os.environ.update(job_environment())
    import deepspeed
    import torch

    from bench.model import build_model, layers_for
    from bench.ranks import train_and_save
    from tests.support.engine import prepare_process
    from tests.support.gloo import spawn

    prepare_process()
    layers = layers_for(millions)
    # Forked ranks share this model until they write to it.
    model = build_model(layers, dtype=torch.bfloat16)
    spawn(train_and_save, ranks, model, stage, str(home / "ckpt"), timeout=RUN_LIMIT, method="fork")
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    parameters = list(model.parameters())
    return {
        "stage": stage,
        "ranks": ranks,
        "layers": layers,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
