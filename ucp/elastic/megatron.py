"""An elastic run of Megatron-Core: its groups from the layout of the run, and what its schedules take of a feed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ucp.elastic.batch import Batch
from ucp.elastic.feed import Feed
from ucp.elastic.groups import bound
from ucp.elastic.run import Run
from ucp.errors import UsageError

_SIZES = {
    "tp": ("tensor_model_parallel_size", parallel_state.get_tensor_model_parallel_world_size),
    "cp": ("context_parallel_size", parallel_state.get_context_parallel_world_size),
    "pp": ("pipeline_model_parallel_size", parallel_state.get_pipeline_model_parallel_world_size),
}
"""By axis: what configurations and ``initialize_model_parallel`` call its size, and who knows it in a job."""

_AXES = (*_SIZES, "dp")


def initialize_model_parallel(run: Run, **options: Any) -> None:
    """Split the ranks of a run into Megatron-Core's groups as its layout says. Collective over the active ranks.

    Axes of the layout are ``tp``, ``cp``, ``dp`` and ``pp``, in any order. No group waits longer than ``run.timeout``.
    `options` are further ones of ``megatron.core.parallel_state.initialize_model_parallel``, such as
    ``expert_model_parallel_size``. UsageError for other axes, on a spare rank, and for options that the layout tells.
    """
    _ = run.seat  # refuses spare ranks
    if unknown := [axis for axis, _ in run.mesh.axes if axis not in _AXES]:
        raise UsageError(
            f"{run.mesh}: Megatron-Core has no axis {unknown[0]!r}",
            hint=f"axes are {', '.join(_AXES)}; others are options",
        )
    told = {
        **{key: run.mesh[axis] for axis, (key, _) in _SIZES.items()},
        "order": _order([axis for axis, _ in run.mesh.axes]),
        "distributed_timeout_minutes": run.timeout / 60,
    }
    if taken := sorted(told.keys() & options.keys()):
        raise UsageError(f"initialize_model_parallel: {', '.join(taken)} is not free", hint="the run's layout tells it")
    parallel_state.initialize_model_parallel(**told, **options)
    bound(run.timeout)


def _order(axes: Sequence[str]) -> str:
    """Megatron-Core's order of axes, the innermost one first; experts divide the data axis."""
    order = [*reversed(axes), *(axis for axis in _AXES if axis not in axes)]
    order.insert(order.index("dp"), "ep")
    return "-".join(order)


def micro_batches(feed: Feed, model: Any, *, weighted: bool = False) -> dict[str, Any]:
    """The next step of a feed as arguments of what ``get_forward_backward_func()`` gives.

    ``data_iterator`` (one for each chunk of an interleaved pipeline), ``num_microbatches`` and ``micro_batch_size``.
    All of the step is fetched, and the feed moves on, so that a save after the step is one of whole steps.

    Gradients are those of the whole batch, whatever the layout. Schedules divide a loss by the number of
    micro-batches, and ``DistributedDataParallel`` averages over data-parallel ranks; so micro-batches of different
    sizes need more than that. Under ``calculate_per_token_loss`` Megatron-Core itself divides by the tokens of all, and
    nothing has to be done. With `weighted` the iterator gives pairs (batch, factor), and the loss that the loss
    function returns first has to be the mean times that factor, or the sum times it beside the number of tokens. Else
    micro-batches of different sizes are a UsageError.

    UsageError, too, where the feed is placed otherwise than ``parallel_state`` has it, where the model's configuration
    has other sizes than the job, and for micro-batches of different sizes in a pipeline that expects one size: one that
    is interleaved, or has no ``variable_seq_lengths``.
    """
    chunks = model if isinstance(model, list) else [model]
    config = get_model_config(chunks[0])
    seat = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    _check_sizes(config)
    _check_batch(feed.batch, seat[1], config, weighted=weighted, interleaved=len(chunks) > 1)
    given = list(feed.step())
    _check_seat(feed, *seat)
    count = len(given)
    listed = [(one, weight * count) for one, weight in given] if weighted else [one for one, _ in given]
    return {
        "data_iterator": [iter(listed) for _ in chunks] if len(chunks) > 1 else iter(listed),
        "num_microbatches": count,
        "micro_batch_size": max(map(len, feed.batch.share(*seat))),
    }


def _check_sizes(config: Any) -> None:
    """A configuration that was written for one layout builds another model at another one."""
    for axis, (key, known) in _SIZES.items():
        if getattr(config, key) != known():
            raise UsageError(
                f"the model's configuration has {key}={getattr(config, key)}, and the job has {known()}",
                hint=f"{key}=run.mesh[{axis!r}]",
            )


def _check_batch(batch: Batch, ranks: int, config: Any, *, weighted: bool, interleaved: bool) -> None:
    if weighted and config.calculate_per_token_loss:
        raise UsageError(
            "weighted=True under calculate_per_token_loss, which divides by the tokens of all and needs no factor",
            hint="leave weighted= out",
        )
    sizes = sorted({len(part) for share in batch.shares(ranks) for part in share})
    if len(sizes) == 1:
        return
    told = f"micro-batches of {sizes[0]} and {sizes[1]} samples on {ranks} data-parallel ranks"
    even = 'Needs(divides={"dp": [samples // micro]}) keeps to layouts in which all are alike'
    if not (weighted or config.calculate_per_token_loss):
        raise UsageError(
            f"{told}: schedules of Megatron-Core count each alike, whatever its size",
            hint=f"weighted=True with a loss function that takes the factor, or calculate_per_token_loss; {even}",
        )
    if config.pipeline_model_parallel_size > 1 and (interleaved or not config.variable_seq_lengths):
        more = "" if interleaved else "variable_seq_lengths=True in the model's configuration; "
        raise UsageError(f"{told}: stages of the pipeline expect tensors of one shape", hint=f"{more}{even}")


def _check_seat(feed: Feed, rank: int, ranks: int) -> None:
    first = feed.position - feed.batch.samples
    if feed.positions != tuple(first + number for part in feed.batch.share(rank, ranks) for number in part):
        raise UsageError(
            f"the feed gave other samples than those of data-parallel rank {rank} of {ranks}",
            hint="feed.place(*run.seat), and parallel_state by initialize_model_parallel(run)",
        )
