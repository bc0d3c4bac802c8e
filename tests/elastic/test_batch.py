"""The global batch: shared out whole, evenly, and with the gradient of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.gloo import spawn
from ucp.elastic import Batch, seat
from ucp.errors import UsageError
from ucp.layout import Mesh

batches = st.builds(Batch, st.integers(1, 200), st.integers(1, 20))


@given(batches, st.integers(1, 40))
def test_every_sample_is_in_one_micro_batch_and_they_are_even(batch: Batch, ranks: int) -> None:
    if batch.problem(ranks) is not None:
        with pytest.raises(UsageError, match="would be empty"):
            batch.shares(ranks)
        assert ranks * batch.count(ranks) > batch.samples
        return
    shares = batch.shares(ranks)
    assert [number for share in shares for part in share for number in part] == list(range(batch.samples))
    assert {len(share) for share in shares} == {batch.count(ranks)}, "collectives within a step need as many everywhere"
    sizes = {len(part) for share in shares for part in share}
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= min(sizes) <= max(sizes) <= batch.micro
    assert shares == tuple(batch.share(rank, ranks) for rank in range(ranks))


@given(batches, st.integers(1, 40))
def test_no_more_micro_batches_than_needed(batch: Batch, ranks: int) -> None:
    assert (batch.count(ranks) - 1) * ranks * batch.micro < batch.samples <= batch.count(ranks) * ranks * batch.micro


@given(batches)
def test_one_rank_always_fits(batch: Batch) -> None:
    assert batch.problem(1) is None


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
@pytest.mark.parametrize("name", ["samples", "micro"])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}={value!r}"):
        Batch(**{"samples": 4, "micro": 2, name: value})


@pytest.mark.parametrize(("rank", "ranks"), [(3, 3), (-1, 3), (0, 0)])
def test_a_rank_is_one_of_the_ranks(rank: int, ranks: int) -> None:
    with pytest.raises(UsageError, match=f"rank {rank} of {ranks}"):
        Batch(8, 2).share(rank, ranks)


def module() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 5, dtype=torch.float64, generator=made)
    return inputs, torch.randint(0, 3, (count,), generator=made)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for grad in found if grad is not None]


def whole(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean loss over all samples at once, and its gradients."""
    model, (inputs, labels) = module(), samples(count)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss.detach(), gradients(model)


def accumulate(model: nn.Module, batch: Batch, rank: int, ranks: int) -> torch.Tensor:
    """What a rank does in a step: it adds up gradients of weighted mean losses; their sum is what it returns."""
    inputs, labels = samples(batch.samples)
    total = torch.zeros((), dtype=torch.float64)
    for part in batch.share(rank, ranks):
        cut = slice(part.start, part.stop)
        loss = nn.functional.cross_entropy(model(inputs[cut]), labels[cut]) * batch.weight(len(part), ranks)
        loss.backward()
        total += loss.detach()
    return total


def check(loss: torch.Tensor, grads: list[torch.Tensor], count: int) -> None:
    told, expected = whole(count)
    torch.testing.assert_close(loss, told, rtol=1e-12, atol=1e-14)
    assert len(grads) == len(expected) == 6
    for found, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(batch=st.builds(Batch, st.integers(1, 40), st.integers(1, 6)), ranks=st.integers(1, 9))
def test_averaged_over_ranks_it_is_the_gradient_of_the_whole_batch(batch: Batch, ranks: int) -> None:
    if batch.problem(ranks) is not None:
        return
    models = [copy.deepcopy(module()) for _ in range(ranks)]
    losses = [accumulate(model, batch, rank, ranks) for rank, model in enumerate(models)]
    each = zip(*(gradients(model) for model in models), strict=True)
    check(sum(losses, torch.tensor(0.0)) / ranks, [torch.stack(grads).mean(0) for grads in each], batch.samples)


@pytest.mark.parametrize("batch", [Batch(64, 4), Batch(30, 2), Batch(7, 3), Batch(23, 2)], ids=str)
def test_seven_ranks_share_what_seven_does_not_divide(batch: Batch) -> None:
    models = [module() for _ in range(7)]
    losses = [accumulate(model, batch, rank, 7) for rank, model in enumerate(models)]
    each = zip(*(gradients(model) for model in models), strict=True)
    check(torch.stack(losses).mean(), [torch.stack(grads).mean(0) for grads in each], batch.samples)


def test_without_weights_uneven_shares_give_another_gradient() -> None:
    """So the tests above can fail."""
    batch, (inputs, labels) = Batch(23, 2), samples(23)
    model = module()
    parts = [part for share in batch.shares(7) for part in share]
    for part in parts:
        cut = slice(part.start, part.stop)
        (nn.functional.cross_entropy(model(inputs[cut]), labels[cut]) / len(parts)).backward()
    with pytest.raises(AssertionError):
        check(whole(23)[0], gradients(model), 23)


Step = tuple[torch.Tensor, list[torch.Tensor]]


def step_of_real_ranks(rank: int, world: int, batch: Batch) -> list[Step]:
    """A step with DDP, and with FSDP."""
    found = []
    for live in (DistributedDataParallel(module()), fully_shard(module())):
        loss = accumulate(live, batch, rank, world)
        torch.distributed.all_reduce(loss)
        found.append((loss / world, gradients(live)))
    return found


def test_real_ranks_average_to_the_gradient_of_the_whole_batch() -> None:
    batch = Batch(23, 4)
    assert {len(part) for share in batch.shares(3) for part in share} == {3, 4}
    for steps in spawn(step_of_real_ranks, 3, batch):
        for loss, grads in steps:
            check(loss, grads, batch.samples)


def test_ranks_that_work_on_the_same_samples_have_the_same_seat() -> None:
    mesh = Mesh({"pp": 2, "dp": 3, "tp": 2})
    assert [seat(mesh, rank) for rank in range(12)] == [(dp, 3) for _ in range(2) for dp in range(3) for _ in range(2)]
    assert [seat(Mesh({"dp_replicate": 2, "dp_shard": 2}), rank) for rank in range(4)] == [(n, 4) for n in range(4)]
    assert seat(Mesh({"tp": 4}), 3) == (0, 1)
    assert seat(Mesh({}), 0) == (0, 1)


def test_which_axes_carry_samples_may_be_said() -> None:
    mesh = Mesh({"dp": 2, "ep": 2, "cp": 2})
    assert [seat(mesh, rank, ("dp", "ep")) for rank in range(8)] == [(n // 2, 4) for n in range(8)]
    with pytest.raises(UsageError, match="axis 'ep'"):
        seat(mesh, 0)
    with pytest.raises(UsageError, match="data='dp'"):
        seat(mesh, 0, "dp")
    with pytest.raises(UsageError, match="rank 8"):
        seat(mesh, 8, ("dp",))


def test_a_misspelt_axis_does_not_give_all_ranks_the_same_samples() -> None:
    with pytest.raises(UsageError, match=r"none of data=\('ddp',\) is an axis of dp4 tp2"):
        seat(Mesh({"dp": 4, "tp": 2}), 0, ("ddp",))
    assert seat(Mesh({"dp": 1, "tp": 2}), 1, ("batch",)) == (0, 1)
    assert seat(Mesh({"dp": 2, "batch": 2}), 1, ("batch",)) == (1, 2), "it is the job that knows"
