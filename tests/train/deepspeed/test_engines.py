"""Live DeepSpeed engines save through ucp, and engines of other stages and numbers of ranks go on from there.

Values (fp32 masters), moments, the module's low-precision weights, frozen parameters, buffers, steps, counters,
schedule and loss scale must be equal bit for bit; the losses that follow are those of the job that was never
interrupted, up to the order in which floating-point numbers are added.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.deepspeed.moves import At, check_moves

pytestmark = pytest.mark.usefixtures("needs_deepspeed")

Z0, Z1, Z2, Z3 = At("z0", 2), At("z1", 2), At("z2", 2), At("z3", 2)
SUB_GROUPS, BF16_OPTIMIZER = At("z3-sub-groups", 2), At("bf16-optimizer", 2)


def test_stages_and_ranks_change(tmp_path: Path) -> None:
    check_moves("bf16", {Z1: [At("z3", 3)], At("z3-sub-groups", 3): [Z2]}, tmp_path)


@pytest.mark.slow
def test_bf16(tmp_path: Path) -> None:
    """Every way in which DeepSpeed keeps masters beside bf16 weights, as source and as target."""
    moves = {
        Z0: [Z1, Z3],
        Z1: [Z0, BF16_OPTIMIZER],
        At("bf16-optimizer", 3): [At("z1-round-robin", 2), SUB_GROUPS],
        SUB_GROUPS: [At("z1-aligned", 2)],
        At("z1-round-robin", 3): [BF16_OPTIMIZER],
    }
    check_moves("bf16", moves, tmp_path)


@pytest.mark.slow
def test_fp32(tmp_path: Path) -> None:
    moves = {Z0: [At("z3", 3)], At("z1-aligned", 3): [Z0], At("z3", 3): [Z2, SUB_GROUPS]}
    check_moves("fp32", moves, tmp_path)


@pytest.mark.slow
def test_fp16_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    """The first steps overflow and are skipped; later on the scale grows just when it would have."""
    check_moves("fp16", {Z2: [Z1, Z3], Z3: [At("z2", 3)]}, tmp_path, loss_scale_power=18)


@pytest.mark.slow
def test_fp16_without_zero(tmp_path: Path) -> None:
    """Only the first loss is comparable.

    In a step after which the loss scale grows, the unpartitioned wrappers divide the gradients by the new scale
    (deepspeed/runtime/fp16/unfused_optimizer.py, step).
    """
    check_moves("fp16", {Z2: [Z0], Z0: [Z1]}, tmp_path, losses=1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_fused", "lion", "sgd"])
def test_other_optimizers(optimizer: str, tmp_path: Path) -> None:
    """FusedAdam has a wrapper of its own without ZeRO; the others keep one moment, under their own names."""
    moves = {Z0: [Z3], Z3: [At("z1", 3)]}
    check_moves("bf16", moves, tmp_path, optimizer=optimizer, groups=3 if optimizer == "sgd" else 2)


@pytest.mark.slow
def test_models_without_anything_special(tmp_path: Path) -> None:
    moves = {Z1: [Z3], Z3: [At("z2", 3)]}
    check_moves("fp32", moves, tmp_path, groups=1, tied=False, frozen=False, scheduler=False, unused=True)
