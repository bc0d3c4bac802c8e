"""`MoeCase`: one DeepSpeed job with native mixture-of-experts layers, as values that fit in a JSON file."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoeCase:
    """A real job whose MoE layers spread their experts over ranks.

    `experts` and `ep` have the number of experts and the expert-parallel degree of each MoE layer. `residual` layers
    have an ordinary expert beside the routed ones; `data_first` is DeepSpeed's "D + E" order of ranks;
    `frozen_expert` freezes a tensor of every expert; `buffers` gives experts a persistent buffer; `tied` makes the
    second layer's experts those of the first. With `auto`, DeepSpeed's AutoEP makes the layers; with several `stages`
    it is a pipeline.
    """

    name: str
    world: int = 2
    stage: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    experts: tuple[int, ...] = (4, 4)
    ep: tuple[int, ...] = (2, 2)
    residual: bool = False
    data_first: bool = False
    round_robin: bool = False
    elastic: bool = False
    grad_accum_fp32: bool = False
    frozen_expert: bool = False
    buffers: bool = False
    tied: bool = False
    auto: bool = False
    stages: int = 1
    optimizer: Literal["adamw", "adamw_fused"] = "adamw"
    split: int | None = None
    steps: int = 3
    more_steps: int = 3
    seed: int = 7

    @property
    def data_parallel(self) -> int:
        """Number of ranks that hold the same stage."""
        return self.world // self.stages

    @property
    def tag(self) -> str:
        """Name of the folder under the save root."""
        return f"global_step{self.steps}"

    def to_json(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MoeCase:
        """The case that `to_json` wrote."""
        return cls(**{**data, "experts": tuple(data["experts"]), "ep": tuple(data["ep"])})

    def replace(self, **changes: Any) -> MoeCase:
        """The case with some values changed."""
        return dataclasses.replace(self, **changes)


CASES = {
    case.name: case
    for case in (
        MoeCase(name="z1_fp32_ep2dp2"),
        MoeCase(name="z1_bf16_ep2dp4", world=4, dtype="bf16"),
        MoeCase(name="z2_bf16_ep2dp4_residual", world=4, stage=2, dtype="bf16", residual=True, buffers=True),
        MoeCase(name="z2_fp32_ep4dp4", world=4, stage=2, ep=(4, 4), experts=(4, 8), frozen_expert=True),
        MoeCase(name="z1_bf16opt_ep2dp4", world=4, dtype="bf16", grad_accum_fp32=True),
        MoeCase(name="z1_fp32_ep1dp2", ep=(1, 1), experts=(3, 2)),
        MoeCase(name="z1_bf16_ep2ep4dp4", world=4, dtype="bf16", ep=(2, 4), experts=(6, 4)),
        MoeCase(name="z1_bf16_ep2dp4_data_first", world=4, dtype="bf16", data_first=True),
        MoeCase(name="z2_bf16_ep2dp4_rr", world=4, stage=2, dtype="bf16", round_robin=True),
        MoeCase(name="z1_fp32_ep2dp4_elastic", world=4, elastic=True),
        MoeCase(name="z1_fp32_ep2dp2_split", split=900, frozen_expert=True),
        MoeCase(name="z1_fp16_ep2dp2", dtype="fp16", tied=True),
        MoeCase(name="auto_z1_fp32_ep2dp2", auto=True),
        MoeCase(name="auto_z2_bf16_ep2dp4", auto=True, stage=2, world=4, dtype="bf16", experts=(4, 6)),
        MoeCase(name="auto_z3_bf16_ep2dp4", auto=True, stage=3, world=4, dtype="bf16", experts=(4, 6)),
        MoeCase(name="auto_z3_fp32_ep4dp4", auto=True, stage=3, world=4, ep=(4, 4), experts=(4, 8)),
        MoeCase(name="auto_z1_bf16opt_ep1dp2", auto=True, dtype="bf16", grad_accum_fp32=True, ep=(1, 1)),
        MoeCase(name="z1_bf16_pp2dp2", world=4, stages=2, dtype="bf16", experts=(4, 2, 6), ep=(2, 2, 2)),
        MoeCase(name="auto_z2_fp32_ep2dp2_frozen", auto=True, stage=2, frozen_expert=True),
        MoeCase(name="auto_z0_fp32_ep2dp2", auto=True, stage=0),
        MoeCase(name="z0_fp32_ep2dp4", stage=0, world=4),
        MoeCase(name="z0_bf16_ep2ep4dp4", stage=0, world=4, dtype="bf16", ep=(2, 4), experts=(2, 4)),
        MoeCase(name="z0_fp32_ep2dp2_data_first", stage=0, data_first=True, residual=True),
    )
}
