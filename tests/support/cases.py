"""The DeepSpeed jobs that the tests read back: a set that covers stages, widths, dtypes and every save option."""

from __future__ import annotations

from tests.support.case import Case

_STAGE_0 = (
    Case(name="z0_fp32_dp2", stage=0),
    Case(name="z0_fp32_dp3_sgd", stage=0, world=3, optimizer="sgd", groups=3),
    Case(name="z0_fp32_dp2_adafactor", stage=0, optimizer="adafactor"),
    Case(name="z0_fp32_dp2_fused", stage=0, optimizer="adamw_fused"),
    Case(name="z0_bf16_dp2", stage=0, dtype="bf16"),
    Case(name="z0_bf16_dp4_fused", stage=0, world=4, dtype="bf16", optimizer="adamw_fused"),
    Case(name="z0_fp16_dp3", stage=0, world=3, dtype="fp16", unused=True),
)

_STAGE_1 = (
    Case(name="z1_fp32_dp2", stage=1, universal_info=True),
    Case(name="z1_bf16_dp4", stage=1, world=4, dtype="bf16", groups=3),
    Case(name="z1_fp16_dp3", stage=1, world=3, dtype="fp16"),
    Case(name="z1_bf16opt_dp2", stage=1, dtype="bf16", grad_accum_fp32=True, universal_info=True),
    Case(name="z1_bf16opt_dp3", stage=1, world=3, dtype="bf16", grad_accum_fp32=True, tied=False),
    Case(name="z1_fp32_dp3_elastic", stage=1, world=3, elastic=True),
    Case(name="z1_bf16_dp3_rr", stage=1, world=3, dtype="bf16", round_robin=True),
    Case(name="z1_bf16_dp3_aligned", stage=1, world=3, dtype="bf16", parameter_alignment=True),
    Case(name="z1_fp32_dp3_sgd", stage=1, world=3, optimizer="sgd"),
    Case(name="z1_fp32_dp2_adafactor", stage=1, optimizer="adafactor"),
    Case(name="z1_bf16_dp2_fused", stage=1, dtype="bf16", optimizer="adamw_fused"),
    Case(
        name="z1_bf16_dp2_plain",
        stage=1,
        dtype="bf16",
        groups=1,
        tied=False,
        frozen=False,
        scheduler=False,
        rich_client_state=False,
    ),
)

_STAGE_2 = (
    Case(name="z2_bf16_dp3", stage=2, world=3, dtype="bf16"),
    Case(name="z2_fp32_dp4", stage=2, world=4, universal_info=True, exclude_frozen=True),
    Case(name="z2_fp16_dp2", stage=2, dtype="fp16", loss_scale_power=18, steps=5),
    Case(name="z2_bf16_dp4_rr", stage=2, world=4, dtype="bf16", round_robin=True, universal_info=True),
    Case(name="z2_fp32_dp3_rr", stage=2, world=3, round_robin=True, groups=3),
    Case(name="z2_fp32_dp4_aligned_rr", stage=2, world=4, round_robin=True, parameter_alignment=True),
    Case(name="z2_fp32_dp2_unused", stage=2, unused=True, tied=False),
    Case(name="z2_bf16_dp2_lion", stage=2, dtype="bf16", optimizer="lion"),
)

_STAGE_3 = (
    Case(name="z3_fp32_dp4", stage=3, world=4, groups=3, universal_info=True),
    Case(name="z3_fp32_dp2", stage=3, groups=1),
    Case(name="z3_bf16_dp2", stage=3, dtype="bf16", unused=True),
    Case(name="z3_fp16_dp3", stage=3, world=3, dtype="fp16"),
    Case(name="z3_bf16_dp3_subgroup", stage=3, world=3, dtype="bf16", sub_group_size=1500, universal_info=True),
    Case(name="z3_bf16_dp2_exclfrozen", stage=3, dtype="bf16", exclude_frozen=True),
    Case(name="z3_bf16_dp2_gather16", stage=3, dtype="bf16", gather_16bit=True, tied=False),
    Case(name="z3_fp32_dp3_sgd", stage=3, world=3, optimizer="sgd"),
    Case(name="z3_bf16_dp2_lion", stage=3, dtype="bf16", optimizer="lion", groups=1),
    Case(name="z3_bf16_dp2_plain", stage=3, dtype="bf16", groups=1, tied=False, frozen=False, rich_client_state=False),
)

_PIPELINE = tuple(
    case.replace(launcher="pipeline", pipeline_stages=2, scheduler=False, frozen=False)
    for case in (
        Case(name="pp2_z1_bf16_dp2", stage=1, world=4, dtype="bf16", universal_info=True),
        Case(name="pp2_z1_fp32_dp2_untied", stage=1, world=4, tied=False),
        Case(name="pp2_z1_bf16opt_dp1", stage=1, world=2, dtype="bf16", grad_accum_fp32=True),
        Case(name="pp2_z0_fp32_dp1", stage=0, world=2),
        Case(name="pp2_z0_bf16_dp1_untied", stage=0, world=2, dtype="bf16", tied=False),
    )
)

_WRAPPED = (
    Case(name="trainer_z2_bf16_dp2", launcher="trainer", stage=2, dtype="bf16"),
    Case(name="trainer_z3_fp32_dp3", launcher="trainer", stage=3, world=3),
    Case(name="accelerate_z1_bf16_dp2", launcher="accelerate", stage=1, dtype="bf16"),
    Case(name="accelerate_z3_fp32_dp2", launcher="accelerate", stage=3),
)

CASES: dict[str, Case] = {
    case.name: case for case in (*_STAGE_0, *_STAGE_1, *_STAGE_2, *_STAGE_3, *_PIPELINE, *_WRAPPED)
}
