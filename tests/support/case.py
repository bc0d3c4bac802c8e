"""`Case`: one DeepSpeed training job, described by values that fit in a JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adamw_fused", "sgd", "lion", "adafactor"]
Launcher = Literal["engine", "pipeline", "trainer", "accelerate"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A real DeepSpeed job: what is trained, under which layout, and how it is saved.

    `world` counts ranks; with ``launcher="pipeline"`` the data-parallel degree is ``world // pipeline_stages``.
    `groups` is the number of optimizer parameter groups (1, 2 or 3), each with its own hyper-parameters.
    `loss_scale_power` is the first fp16 loss scale's exponent; a large one makes the first steps overflow: skipped.
    `grad_accum_fp32` with bf16 and stage 1 selects DeepSpeed's ``BF16_Optimizer``.
    """

    name: str
    world: int = 2
    stage: int = 1
    dtype: Precision = "fp32"
    optimizer: OptimizerName = "adamw"
    launcher: Launcher = "engine"
    pipeline_stages: int = 1
    groups: int = 2
    tied: bool = True
    frozen: bool = True
    unused: bool = False
    scheduler: bool = True
    grad_accum_fp32: bool = False
    round_robin: bool = False
    parameter_alignment: bool = False
    elastic: bool = False
    sub_group_size: int | None = None
    exclude_frozen: bool = False
    gather_16bit: bool = False
    loss_scale_power: int = 8
    universal_info: bool = False
    rich_client_state: bool = True
    steps: int = 3
    more_steps: int = 3
    seed: int = 7

    @property
    def data_parallel(self) -> int:
        """Number of ranks that share one copy of the model."""
        return self.world // self.pipeline_stages

    @property
    def root(self) -> str:
        """The save root, relative to the job's folder."""
        return f"ckpt/checkpoint-{self.steps}" if self.launcher == "trainer" else "ckpt"

    @property
    def tag(self) -> str:
        """The checkpoint's tag (the folder's name under the save root)."""
        return "pytorch_model" if self.launcher == "accelerate" else f"global_step{self.steps}"

    def to_json(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """The case that `to_json` wrote."""
        return cls(**data)

    def key(self) -> str:
        """A file name that is unique to the case's values."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:10]}"

    def replace(self, **changes: Any) -> Case:
        """The case with some values changed."""
        return dataclasses.replace(self, **changes)
