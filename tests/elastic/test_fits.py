"""What fits: the first layout that nothing speaks against, and every reason against the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ucp
from tests.support.gloo import spawn
from ucp.catalog import Catalog, Source, Tensor
from ucp.elastic import Batch, Choice, Needs, choose, estimate, keep, prefer
from ucp.errors import UsageError
from ucp.layout import Mesh
from ucp.plan import TensorSpec

_numbers = itertools.count()
VALUES_ONLY = ("value",)
ADAM = ("value", "exp_avg", "exp_avg_sq")


def catalog(*tensors: Tensor) -> Catalog:
    source = Source("test", "1", Mesh({}))
    return Catalog("somewhere", source, {tensor.name: tensor for tensor in tensors}, fragments={})


def tensor(
    shape: tuple[int, ...], *, kind: Any = "parameter", states: Sequence[str] = ADAM, dtype: str = "float32"
) -> Tensor:
    return Tensor(f"{kind} {next(_numbers)}", kind, {state: TensorSpec(shape, dtype) for state in states})


class Fixed:
    """A policy of one's own."""

    def __init__(self, *meshes: dict[str, int]) -> None:
        self.meshes = [Mesh(axes) for axes in meshes]

    def layouts(self, world: int) -> Sequence[Mesh]:
        return self.meshes

    def __str__(self) -> str:
        return "a policy of one's own"


def test_the_first_that_fits_is_taken_and_others_are_spare() -> None:
    choice = choose(keep(tp=2), 7)
    assert choice == Choice(Mesh({"dp": 3, "tp": 2}), spares=1)
    assert (choice.world, str(choice)) == (7, "dp3 tp2 on 7 ranks, 1 spare")


def test_a_layout_that_is_passed_over_is_told_with_the_reason() -> None:
    choice = choose(keep(), 6, batch=Batch(20, 4))
    assert choice.mesh == Mesh({"dp": 6})
    choice = choose(keep(), 6, batch=Batch(5, 4))
    assert (choice.mesh, choice.spares) == (Mesh({"dp": 5}), 1)
    ((mesh, reason),) = choice.refused
    assert mesh == Mesh({"dp": 6})
    assert reason == (
        "5 samples of a step are too few for 1 micro-batch of at most 4 on each of 6 ranks: 1 would be empty"
    )
    assert str(choice) == f"dp5 on 6 ranks, 1 spare; not dp6: {reason}"


def test_a_line_of_the_log_stays_one_with_thousands_of_ranks() -> None:
    held = catalog(*(tensor((1000 + n % 7, 10)) for n in range(3000)))
    choice = choose(keep(), 5000, batch=Batch(1000, 1), needs=Needs(memory=1e9), catalog=held)
    assert (choice.mesh["dp"], len(choice.refused)) == (1000, 4000)
    assert str(choice).endswith("; nor 3997 others down to dp1001")
    assert str(choice).count("; not ") == 3


def test_an_axis_divides_what_it_has_to() -> None:
    needs = Needs(divides={"tp": [12, 64], "pp": [6]})
    choice = choose(prefer({8: {"tp": 8}, 6: {"pp": 2, "tp": 3}, 4: {"pp": 1, "tp": 4}}), 8, needs=needs)
    assert choice.mesh == Mesh({"pp": 1, "tp": 4})
    assert [reason for _, reason in choice.refused] == ["tp=8 does not divide 12", "tp=3 does not divide 64"]


def test_the_error_lists_every_layout_and_all_that_speaks_against_it() -> None:
    policy = Fixed({"dp": 4, "tp": 4}, {"dp": 8}, {"dp": 2, "tp": 3}, {"dp": 8}, {"dp": 1, "tp": 1})
    held = catalog(tensor((1000, 1000)))
    needs = Needs(divides={"tp": [8]}, memory=3_000_000)
    with pytest.raises(UsageError) as caught:
        choose(policy, 8, batch=Batch(6, 2), needs=needs, catalog=held)
    assert caught.value.message.splitlines() == [
        "no layout fits 8 ranks:",
        "  dp4 tp4: takes 16 ranks",
        "  dp8: 6 samples of a step are too few for 1 micro-batch of at most 2 on each of 8 ranks: 2 would be empty",
        "  dp2 tp3: tp=3 does not divide 8",
        "  dp1 tp1: takes about 16 MB per rank, which has 3 MB",
    ]
    assert caught.value.hint


def test_all_reasons_against_one_layout_are_told() -> None:
    held, needs = catalog(tensor((1000, 1000))), Needs(divides={"tp": [8]}, memory=5)
    with pytest.raises(UsageError) as caught:
        choose(Fixed({"dp": 3, "tp": 3}), 8, batch=Batch(2, 2), needs=needs, catalog=held)
    (line,) = caught.value.message.splitlines()[1:]
    told = line.removeprefix("  dp3 tp3: ").split("; ")
    assert [reason.split()[0] for reason in told] == ["takes", "tp=3", "2", "takes"]


@pytest.mark.parametrize("policy", [keep(tp=8), prefer({8: {"dp": 8}})], ids=str)
def test_too_few_ranks_for_anything(policy: Any) -> None:
    with pytest.raises(UsageError, match=r"no layout fits 7 ranks:\n  .*: takes 8 ranks\n"):
        choose(policy, 7)


def test_a_policy_without_layouts_is_named() -> None:
    with pytest.raises(UsageError, match=r"no layout fits 1 rank:\n  a policy of one's own gives none\n"):
        choose(Fixed(), 1)


def test_no_world_no_layout() -> None:
    with pytest.raises(UsageError, match="0 ranks"):
        choose(keep(), 0)


def test_axes_of_unknown_names_need_to_be_told_apart() -> None:
    policy = Fixed({"dp": 2, "expert": 2})
    assert choose(policy, 4).mesh["expert"] == 2, "without a batch it does not matter"
    with pytest.raises(UsageError, match="axis 'expert'"):
        choose(policy, 4, batch=Batch(4, 1))
    with pytest.raises(UsageError, match="too few"):
        choose(policy, 4, batch=Batch(3, 1), needs=Needs(data=("dp", "expert")))
    assert choose(policy, 4, batch=Batch(2, 1), needs=Needs(data=("dp",))).spares == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"values": "dp"}, "values='dp'"),
        ({"gradients": "dp"}, "gradients='dp'"),
        ({"states": "tp"}, "states='tp'"),
        ({"data": "dp"}, "data='dp'"),
        ({"divides": {"tp": 12}}, "divides 'tp': 12"),
        ({"divides": {"tp": "12"}}, "divides 'tp': '12'"),
        ({"divides": {"tp": [1.5]}}, r"divides 'tp': \[1\.5\]"),
    ],
    ids=str,
)
def test_needs_refuse(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Needs(**options)


def test_memory_decides_where_a_checkpoint_tells() -> None:
    held = catalog(tensor((1000, 1000)))  # 4 MB each: value, gradient and two states
    needs = Needs(memory=4_000_000)
    policy = Fixed({"dp": 2}, {"dp": 4})
    choice = choose(policy, 4, needs=needs, catalog=held)
    assert (choice.mesh, choice.estimate) == (Mesh({"dp": 4}), 4_000_000)
    assert str(choice) == (
        "dp4 on 4 ranks, about 4 MB of state per rank; not dp2: takes about 8 MB per rank, which has 4 MB"
    )
    assert choose(policy, 4, needs=needs) == Choice(Mesh({"dp": 2}), spares=2), "nothing to go on from tells nothing"


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Needs(), 16 // 8),
        (Needs(values=()), 16),  # DDP
        (Needs(values=("tp",)), 16 // 2),  # DDP and tensor parallelism
        (Needs(values=("tp",), states=("tp", "dp")), 4 // 2 + 4 // 2 + 8 // 8),  # ZeRO-1
        (Needs(values=("tp",), gradients=("dp", "tp"), states=("dp", "tp")), 4 // 2 + 4 / 8 + 8 // 8),  # ZeRO-2
    ],
    ids=["FSDP", "DDP", "TP", "ZeRO-1", "ZeRO-2"],
)
def test_what_is_divided_by_what(needs: Needs, expected: float) -> None:
    held = catalog(tensor((1 << 10, 1 << 10)))
    assert estimate(held, Mesh({"dp": 4, "tp": 2}), needs) == expected * (1 << 20)


def test_kinds_of_tensors_count_as_what_they_are() -> None:
    mesh = Mesh({"pp": 2, "dp": 4})
    assert estimate(catalog(tensor((80,), kind="frozen", states=VALUES_ONLY)), mesh) == 80 * 4 // 4, "no gradient"
    buffers = catalog(*(tensor((80,), kind="buffer", states=VALUES_ONLY) for _ in range(9)))
    assert estimate(buffers, mesh) == 10 * 80 * 4 // 2, "not sharded, and one more on one of two stages"
    assert estimate(catalog(tensor((80,), states=VALUES_ONLY, dtype="bfloat16")), mesh) == 2 * 80 * 2 // 4
    assert estimate(catalog(tensor((9,), states=VALUES_ONLY)), mesh) == 2 * 3 * 4, "rounded up to whole elements"
    assert estimate(catalog(tensor(()), tensor((0, 4))), mesh) == 4 * 4


def test_rows_are_not_cut_and_zero_cuts_them() -> None:
    held, mesh = catalog(tensor((3, 1000))), Mesh({"dp": 8})
    assert estimate(held, mesh) == 16 * 1000
    assert estimate(held, mesh, Needs(rows=False)) == 16 * 375


def test_what_tensor_parallelism_does_not_cut_is_whole() -> None:
    assert estimate(catalog(tensor((80,))), Mesh({"dp": 2, "tp": 4})) == 16 * 40


def test_a_stage_that_has_the_largest_tensor_has_its_layers_too() -> None:
    held = catalog(tensor((1000, 10)), *(tensor((10, 10)) for _ in range(8)))
    assert estimate(held, Mesh({"pp": 4})) == 16 * (1000 * 10 + 2 * 10 * 10)


@given(
    st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.booleans(),
)
@example(shapes=[[5]], dp=1, tp=1, pp=3, rows=True)
def test_ranks_together_hold_everything(shapes: list[list[int]], dp: int, tp: int, pp: int, rows: bool) -> None:
    held = catalog(*(Tensor(str(n), "parameter", _adam(tuple(shape))) for n, shape in enumerate(shapes)))
    mesh = Mesh({"pp": pp, "dp": dp, "tp": tp})
    found = estimate(held, mesh, Needs(rows=rows))
    assert held.nbytes * 4 // 3 <= found * mesh.size, "and gradients"
    assert found <= held.nbytes * 4 // 3


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_no_rank_holds_more_than_is_estimated(first: int, second: int, dp: int, tp: int) -> None:
    """However tensor parallelism cuts the matrix before FSDP2 cuts its rows, in chunks as `torch.chunk` makes them."""
    found = estimate(catalog(tensor((first, second))), Mesh({"dp": dp, "tp": tp}))
    matrix = torch.empty(first, second)
    for dim in (0, 1):
        part = matrix.chunk(tp, dim)[0].chunk(dp)[0]
        assert 4 * part.nbytes <= found


def _adam(shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {state: TensorSpec(shape, "float32") for state in ADAM}


def test_the_estimate_of_a_real_checkpoint_is_what_the_job_holds(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    ucp.save((model, optimizer), str(tmp_path / "saved"))
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [state for states in optimizer.state.values() for state in states.values() if state.ndim]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    found = ucp.open(str(tmp_path / "saved")).catalog
    assert estimate(found, Mesh({})) == sum(one.nbytes for one in held) + buffers
    assert estimate(found, Mesh({"dp": 4})) == sum(one.nbytes for one in held) // 4 + buffers


class Wide(torch.nn.Module):
    """Numbers of rows that few numbers of ranks divide, and what tensor parallelism leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(33)
        self.up, self.down = torch.nn.Linear(33, 22), torch.nn.Linear(22, 5)
        self.register_buffer("table", torch.ones(7))

    def forward(self, given: Any) -> Any:
        return self.down(torch.relu(self.up(self.norm(given))))


def really_held(rank: int, world: int, url: str, kind: str) -> int:
    """Bytes that a rank has after a step; the job is saved."""
    torch.manual_seed(1)
    axes = {"dp": world // 2, "tp": 2} if kind == "tp" else {"dp": world}
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model: torch.nn.Module = Wide()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        if kind == "tp":
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 33)).sum().backward()
    optimizer.step()
    ucp.save((model, optimizer), url)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
    held += [state for states in optimizer.state.values() for state in states.values() if state.ndim]
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in held)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "needs"), [("fsdp", Needs()), ("tp", Needs()), ("ddp", Needs(values=()))])
def test_no_rank_of_a_real_job_holds_more_than_is_estimated(tmp_path: Path, kind: str, needs: Needs) -> None:
    url = str(tmp_path / "saved")
    held = max(spawn(really_held, 4, url, kind))
    found = estimate(ucp.open(url).catalog, Mesh({"dp": 2, "tp": 2} if kind == "tp" else {"dp": 4}), needs)
    assert held <= found <= 1.3 * held
