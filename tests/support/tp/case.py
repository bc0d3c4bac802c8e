"""`TpCase`: one tensor-parallel DeepSpeed job, described by values that fit in a JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from tests.support.case import Case

Launcher = Literal["autotp", "megatron"]

VOCAB = 70
"""Tokens of the Megatron-style model; its embedding has more rows."""

HIDDEN, INNER, HEADS, LAYERS = 48, 74, 6, 2
"""Of AutoTP's models."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpCase:
    """A real job on ``pp * tp * dp`` ranks.

    ``autotp`` is a Hugging Face model that DeepSpeed itself cuts; ``megatron`` a GPT of Megatron's tensor-parallel
    layers in DeepSpeed's pipeline engine. `architecture` and `kv_heads` choose AutoTP's model, `info` is the version
    that the Megatron-style job gives its ``universal_checkpoint_info``; ``None`` is a job that gives none. `frozen`
    freezes the MLP of AutoTP's first layer. `round_robin` only says that DeepSpeed's own gathering calls are not asked,
    which know no parameters of no elements.
    """

    name: str
    launcher: Launcher = "autotp"
    pp: int = 1
    tp: int = 2
    dp: int = 1
    stage: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    grad_accum_fp32: bool = False
    architecture: str = "llama"
    kv_heads: int = 2
    vocab: int = 104
    tied: bool = False
    frozen: bool = False
    info: float | None = 0.2
    steps: int = 2
    more_steps: int = 2
    seed: int = 7
    round_robin: bool = False

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.pp * self.tp * self.dp

    @property
    def data_parallel(self) -> int:
        """Ranks that share one copy of the model."""
        return self.dp

    @property
    def tag(self) -> str:
        """The checkpoint's tag."""
        return f"global_step{self.steps}"

    def plain(self) -> Case:
        """The case as far as DeepSpeed's configuration goes, tensor and pipeline parallelism counted together."""
        return Case(
            name=self.name,
            world=self.world,
            stage=self.stage,
            dtype=self.dtype,
            pipeline_stages=self.pp * self.tp,
            grad_accum_fp32=self.grad_accum_fp32,
        )

    def to_json(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TpCase:
        """The case that `to_json` wrote."""
        return cls(**data)

    def key(self) -> str:
        """A file name that is unique to the case's values."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:10]}"

    def replace(self, **changes: Any) -> TpCase:
        """The case with some values changed."""
        return dataclasses.replace(self, **changes)


CASES: dict[str, TpCase] = {
    case.name: case
    for case in (
        TpCase(name="autotp_z1_fp32_tp2dp1"),
        TpCase(name="autotp_z1_bf16_tp2dp2_tied", dp=2, dtype="bf16", tied=True),
        TpCase(name="autotp_z2_fp32_tp2dp2_uneven", dp=2, stage=2, kv_heads=3, vocab=103),
        TpCase(name="autotp_z2_bf16_tp2dp2_qwen2", dp=2, stage=2, dtype="bf16", architecture="qwen2"),
        TpCase(name="autotp_z3_bf16_tp2dp2", dp=2, stage=3, dtype="bf16"),
        TpCase(name="autotp_z3_fp32_tp2dp1_uneven", stage=3, kv_heads=3),
        TpCase(name="autotp_z1_fp32_tp2dp1_phi3", architecture="phi3"),
        TpCase(name="autotp_z1_fp32_tp4dp1_empty", tp=4, round_robin=True),
        TpCase(name="autotp_z0_fp32_tp2dp1", stage=0),
        TpCase(name="megatron_z0_fp32_pp2tp2dp1", launcher="megatron", pp=2, stage=0),
        TpCase(name="autotp_z2_fp32_tp2dp2_frozen", dp=2, stage=2, frozen=True),
        TpCase(name="autotp_z3_fp32_tp2dp2_frozen", dp=2, stage=3, frozen=True),
        TpCase(name="megatron_z1_fp32_pp2tp2dp1", launcher="megatron", pp=2, tied=True),
        TpCase(name="megatron_z1_bf16_pp2tp2dp2", launcher="megatron", pp=2, dp=2, dtype="bf16", tied=True),
        TpCase(name="megatron_z1_fp32_pp2tp2dp2", launcher="megatron", pp=2, dp=2, tied=True),
        TpCase(name="megatron_z1_fp32_pp1tp2dp2_untied", launcher="megatron", dp=2, info=0.4),
        TpCase(name="megatron_z1_fp32_pp2tp2dp1_silent", launcher="megatron", pp=2, info=None),
        TpCase(
            name="megatron_bf16opt_pp2tp2dp1", launcher="megatron", pp=2, dtype="bf16", grad_accum_fp32=True, tied=True
        ),
    )
}

QUICK = (
    "autotp_z1_bf16_tp2dp2_tied",
    "autotp_z1_fp32_tp2dp1_phi3",
    "autotp_z3_fp32_tp2dp1_uneven",
    "megatron_z1_fp32_pp2tp2dp1",
    "megatron_z1_bf16_pp2tp2dp2",
    "megatron_z1_fp32_pp2tp2dp1_silent",
)
"""Cases of the tests that always run; they are made in one process."""
