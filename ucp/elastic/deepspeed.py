"""DeepSpeed under `ucp.elastic.Run`: the global batch in its configuration, and steps whose gradients are those of it.

>>> from ucp.elastic import Batch
>>> batch_config(Batch(48, micro=8), 3)
{'train_batch_size': 48, 'train_micro_batch_size_per_gpu': 8, 'gradient_accumulation_steps': 2}

Facts are from deepspeed/runtime: ``backward`` divides a loss by the accumulation steps unless told not to (engine.py),
ranks are averaged (``gradient_allreduce_op``), and the configuration's sizes must agree (``_batch_assertion``,
config.py). DeepSpeed itself is imported by whoever has an engine, never here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ucp.elastic.batch import Batch
from ucp.errors import UsageError

if TYPE_CHECKING:
    from ucp.elastic.feed import Feed
    from ucp.layout import Mesh

_fed: WeakSet[Any] = WeakSet()
"""Engines whose steps were those of `micro_batches` or `train_batch`."""


def batch_config(batch: Batch, ranks: int) -> dict[str, int]:
    """The entries of DeepSpeed's configuration that say how `ranks` data-parallel ranks, ``run.seat[1]``, share a step.

    DeepSpeed wants all micro-batches of one size. Where `batch` has no such division, these are those of its largest,
    and ``train_batch_size`` is more than there are samples; `micro_batches` then sets the number that there is, as
    DeepSpeed counts samples by it. UsageError where so many ranks cannot share a step.
    """
    micro = max(map(len, batch.share(ranks - 1, ranks)))
    count = batch.count(ranks)
    return {
        "train_batch_size": micro * count * ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
    }


class Turn:
    """What is to be called with the mean loss of one micro-batch: it runs ``engine.backward`` and ``engine.step``."""

    def __init__(self, engine: Any, weight: float) -> None:
        self.weight = weight
        """The part of the micro-batch in the step's mean loss, times the ranks over which gradients are averaged."""
        self._engine, self._done, self._first = engine, False, engine.micro_steps

    def __call__(self, loss: Any) -> None:
        """Add the gradients of `loss`, the mean over this micro-batch; after the last one the optimizer steps."""
        import torch

        if self._done:
            raise UsageError("a micro-batch has one loss, and this one had it", hint="add losses up first")
        self._done = True
        # A weight that is rounded to 8 bits of mantissa would scale all gradients.
        exact = loss.to(torch.promote_types(loss.dtype, torch.float32))
        # Weights say all there is to say of accumulation.
        self._engine.backward(exact * self.weight, scale_wrt_gas=False)
        self._engine.step()

    def check(self) -> None:
        """UsageError unless exactly one loss of this micro-batch went to the engine."""
        passed = self._engine.micro_steps - self._first
        if not self._done or passed != 1:
            raise UsageError(
                f"the engine did {passed} backward passes in a micro-batch",
                hint="for given, backward in micro_batches(engine, feed): backward(loss); it steps the engine, too",
            )


def micro_batches(engine: Any, feed: Feed) -> Iterator[tuple[Any, Turn]]:
    """The micro-batches of this rank in the next step of `feed`, each with what is to be called with its mean loss.

    >>> for given, backward in micro_batches(engine, feed):  # doctest: +SKIP
    ...     backward(loss_of(engine(given)))

    That is ``engine.backward`` and ``engine.step``, weighted so that the gradients of the step are those of the mean
    over all samples of the global batch, however ranks and micro-batches divide it. UsageError, before anything is
    computed, for an engine whose configuration does not agree with the feed's batch, adds gradients of ranks up
    instead of averaging, leaves accumulation to the caller, or is a pipeline (`train_batch`); and afterwards if the
    engine was not called exactly once for each micro-batch.
    """
    if engine.pipeline_parallelism:
        raise UsageError("a pipeline takes a whole step at once", hint="train_batch(engine, feed)")
    _begin(engine, feed)
    steps = engine.global_steps
    for given, weight in feed.step():
        turn = Turn(engine, weight)
        yield given, turn
        turn.check()
    if engine.global_steps != steps + 1:
        raise UsageError(
            f"the optimizer stepped {engine.global_steps - steps} times in a step of the job",
            hint="leave set_gradient_accumulation_boundary() alone: micro_batches knows the last micro-batch",
        )


def train_batch(engine: Any, feed: Feed) -> Any:
    """One step of a pipeline engine, ``engine.train_batch``, with the next step of `feed`; the mean loss.

    Every stage calls it, with a feed that is placed by ``run.seat``. UsageError as in `micro_batches`, and where
    micro-batches would differ in size: a pipeline computes the mean of their means.
    """
    if not engine.pipeline_parallelism:
        raise UsageError(f"{type(engine).__name__} is no pipeline", hint="micro_batches(engine, feed)")
    ranks, batch = _begin(engine, feed), feed.batch
    parts = ranks * batch.count(ranks)
    if batch.samples % parts:
        raise UsageError(
            f"{batch.samples} samples are not {parts} micro-batches of one size, which a pipeline needs",
            hint=f"Run(needs=Needs(divides={{'dp': [{batch.samples // batch.micro}]}})) refuses such layouts, "
            "if micro divides samples",
        )
    source = feed.step()
    loss = engine.train_batch(data_iter=(given for given, _ in source))
    # Stages between the first and the last read nothing, but the job has taken the samples.
    for _ in source:
        pass
    return loss


def _begin(engine: Any, feed: Feed) -> int:
    """Data-parallel ranks of `engine`, which may begin a step of `feed`."""
    ranks = feed.seat[1]
    if (problem := _problem(engine, feed.batch, ranks)) is not None:
        raise UsageError(problem[0], hint=problem[1])
    _fed.add(engine)
    # Samples are counted by it, and schedules of Megatron's kind go by it.
    engine._config.train_batch_size = feed.batch.samples
    return ranks


def check_engines(
    held: Collection[Any], *, batch: Batch | None, mesh: Mesh, ranks: Callable[[], int], stepped: bool
) -> None:
    """UsageError for an engine among what a state has `held` that does not fit a run of `mesh` and `batch`.

    `ranks` tells how many of the mesh train on samples of their own; only engines need to know. Once the job has
    `stepped`, a feed beside an engine must have been drawn by `micro_batches` or `train_batch`: its weights, given to
    ``engine.backward`` as they are, would be divided by the accumulation steps, which change with the number of ranks,
    and nobody would be told.
    """
    for engine in filter(_is_engine, held):
        if engine.dp_world_size != (parts := ranks()):
            raise UsageError(
                f"DeepSpeed averages gradients over {engine.dp_world_size} ranks, and in {mesh} there are {parts} with "
                "samples of their own",
                hint="layouts=keep() for ZeRO; a pipeline of 2 stages is keep(pp=2) and PipelineModule(num_stages=2)",
            )
        if batch is not None and (problem := _problem(engine, batch, parts)) is not None:
            raise UsageError(problem[0], hint=problem[1])
        if stepped and engine not in _fed and any(_is_feed(one) for one in held):
            raise UsageError(
                "engine.backward divides losses by the accumulation steps, the weights of a feed do not: gradients of "
                "this job have another scale on each number of ranks",
                hint="for given, backward in ucp.elastic.deepspeed.micro_batches(engine, feed): backward(loss)",
            )


def _problem(engine: Any, batch: Batch, ranks: int) -> tuple[str, str] | None:
    """Why gradients of `engine` are not those of `batch`, and what to do; None if they are."""
    wanted = batch_config(batch, ranks)
    entries = "{**config, **ucp.elastic.deepspeed.batch_config(batch, run.seat[1])} is what to initialize with"
    if engine.dp_world_size != ranks:
        return (
            f"DeepSpeed averages gradients over {engine.dp_world_size} ranks, and samples are placed for {ranks}",
            "feed.place(*run.seat), and an engine that was made inside the run",
        )
    if (count := engine.gradient_accumulation_steps()) != wanted["gradient_accumulation_steps"]:
        told = f"{wanted['gradient_accumulation_steps']} micro-batches of {batch} on each of {ranks} ranks"
        return f"gradient_accumulation_steps={count} in DeepSpeed's configuration, for {told}", entries
    if (size := engine.train_batch_size()) not in (batch.samples, wanted["train_batch_size"]):
        return f"train_batch_size={size} in DeepSpeed's configuration, for {batch}", entries
    if (size := getattr(engine, "sequence_parallel_size", 1)) > 1:
        told = f"sequence_parallel_size={size}: DeepSpeed adds up what the losses of parts of a sequence give"
        return told, "leave it out: of which mean each of these losses is a part is not known here"
    if not engine.gradient_average:
        return (
            "gradient_allreduce_op adds the gradients of ranks up: their scale follows their number",
            "set it to mean",
        )
    if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
        return "managed_gradient_accumulation=false counts micro-batches as samples of one size", "leave it out"
    return None


def _is_engine(value: Any) -> bool:
    framework = sys.modules.get("deepspeed.runtime.engine")
    return framework is not None and isinstance(value, framework.DeepSpeedEngine)


def _is_feed(value: Any) -> bool:
    home = sys.modules.get("ucp.elastic.feed")
    return home is not None and isinstance(value, home.Feed)
