"""The DeepSpeed jobs that the tests read back: a set that covers stages, widths, dtypes and every save option."""

from __future__ import annotations

from tests.support.case import Case

_ALL = (
    Case(name="z1_fp32_dp2", stage=1, world=2, universal_info=True),
    Case(name="z2_bf16_dp3", stage=2, world=3, dtype="bf16"),
    Case(name="z3_fp32_dp4", stage=3, world=4, groups=3),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}
