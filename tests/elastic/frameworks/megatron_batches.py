"""Gradients of Megatron-Core's schedules at several layouts: ``python -m tests.elastic.frameworks.megatron_batches -``.

A folder on stdin; what the tests look at is printed as JSON: how far gradients are from those of one rank with one
micro-batch of the whole batch, relative to the largest of each tensor, and what is refused.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from tests.support.gloo import spawn

SAMPLES, MICRO = 10, 3

ALL = ["mean", "masked", "tokens", "ignored"]

Scene = tuple[str, dict[str, int], list[Any]]

ALONE: list[Scene] = [("gradients", {"dp": 1}, [SAMPLES, SAMPLES, False, ALL])]
PAIR: list[Scene] = [
    ("gradients", {"pp": 2}, [SAMPLES, SAMPLES, False, ["mean", "tokens"]]),
    ("gradients", {"pp": 2}, [8, 4, True, ["mean"]]),
    ("streams", {"tp": 2}, [True]),
    ("streams", {"dp": 2}, [False]),
    ("gradients", {"dp": 2}, [SAMPLES, MICRO, False, ALL]),
]
FOUR: list[Scene] = [
    ("gradients", {"dp": 2, "pp": 2}, [SAMPLES, MICRO, False, ["mean", "tokens"]]),
    ("gradients", {"pp": 2, "dp": 2}, [8, 2, True, ["mean"]]),
    ("streams", {"dp": 2, "tp": 2}, [False]),
    ("refused", {"pp": 2, "dp": 2}, []),
    ("split", {"pp": 2, "dp": 2}, []),
    ("split", {"dp": 2, "pp": 2}, []),
    ("split", {"dp": 2, "tp": 2}, []),
    ("split", {"tp": 2, "cp": 2}, []),
]
"""What ranks do one after another: a function, its layout, and arguments."""


def main() -> None:
    """Run all scenes; ranks are forked from this process, which has imported everything."""
    folder = sys.stdin.read().strip()
    from tests.elastic.frameworks import megatron_model

    del megatron_model
    alone, pair, four = (
        spawn(play, size, folder, scenes, timeout=400, method="fork")
        for size, scenes in ((1, ALONE), (2, PAIR), (4, FOUR))
    )
    found = {
        "far": {
            **_far("dp", alone, 0, pair, 4),
            **_far("pp", pair, 0, four, 0),
            **_far("vpp", pair, 1, four, 1),
        },
        "streams": [
            [of_rank[2] for of_rank in pair],
            [of_rank[2] for of_rank in four],
            [of_rank[3] for of_rank in pair],
        ],
        "refused": four[0][3],
        "splits": [of_rank[4:] for of_rank in four],
    }
    json.dump(found, sys.stdout)


def play(rank: int, world: int, folder: str, scenes: list[Scene]) -> list[Any]:
    """What each scene gives on this rank."""
    from megatron.core.parallel_state import destroy_model_parallel

    found = []
    for number, (name, mesh, given) in enumerate(scenes):
        with _run(rank, world, mesh, f"{folder}/{world}-{number}") as run:
            found.append(globals()[name](run, *given))
            destroy_model_parallel()
    return found


def _run(rank: int, world: int, mesh: dict[str, int], url: str) -> Any:
    from ucp.elastic import Run, prefer

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    return Run(url, layouts=prefer({world: mesh}), memory=None, timeout=100)


def gradients(run: Any, samples: int, micro: int, interleaved: bool, ways: list[str]) -> dict[str, Any]:
    """By way: this rank's gradients by name, and its place in the model."""
    from megatron.core import parallel_state as ps

    from ucp.elastic import Batch
    from ucp.elastic.megatron import initialize_model_parallel

    initialize_model_parallel(run, virtual_pipeline_model_parallel_size=2 if interleaved else None)
    place = f"{ps.get_pipeline_model_parallel_rank()} {ps.get_tensor_model_parallel_rank()}"
    return {"place": place, **{way: _gradients(run, Batch(samples, micro), way, interleaved) for way in ways}}


def _gradients(run: Any, batch: Any, way: str, interleaved: bool) -> dict[str, torch.Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from tests.elastic.frameworks import megatron_model as model
    from ucp.elastic import Feed
    from ucp.elastic.megatron import micro_batches

    options = {"calculate_per_token_loss": way == "tokens", "variable_seq_lengths": not interleaved}
    chunks = model.build(run.mesh, vpp=1 + interleaved, **options)
    feed = Feed(model.dataset(), batch, seed=3)
    feed.place(*run.seat)
    weighted = way != "tokens"
    get_forward_backward_func()(
        forward_step_func=model.forward(_LOSSES[way], weighted=weighted),
        model=chunks,
        seq_length=model.LENGTH,
        forward_only=False,
        **micro_batches(feed, chunks, weighted=weighted),
    )
    assert feed.position == batch.samples
    return {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }


def _mean(losses: torch.Tensor, mask: torch.Tensor, factor: float) -> Any:
    """A mean over samples, all tokens of which count."""
    del mask
    return losses.mean() * factor, {}


def _masked(losses: torch.Tensor, mask: torch.Tensor, factor: float) -> Any:
    """Megatron-LM's, of a loss that is a mean over samples: a sum, and what Megatron-Core divides it by."""
    of_samples = (losses * mask).sum(-1) / mask.sum(-1)
    return of_samples.sum() * factor, torch.tensor(len(losses), dtype=torch.int), {}


def _tokens(losses: torch.Tensor, mask: torch.Tensor, factor: float) -> Any:
    """Megatron-LM's: a mean over all tokens of the step that count."""
    assert factor == 1.0
    return (losses * mask).sum(), mask.sum().int(), {}


def _ignored(losses: torch.Tensor, mask: torch.Tensor, factor: float) -> Any:
    """What is wrong: each micro-batch counts alike."""
    del mask, factor
    return losses.mean(), {}


_LOSSES = {"mean": _mean, "masked": _masked, "tokens": _tokens, "ignored": _ignored}


def _far(name: str, wanted: list[Any], first: int, got: list[Any], second: int) -> dict[str, float]:
    """By way: the largest difference of all ranks' gradients, each relative to the largest of its tensor."""
    known = {of_rank[first]["place"]: of_rank[first] for of_rank in wanted}
    assert {of_rank[second]["place"] for of_rank in got} == known.keys()
    found: dict[str, float] = {}
    for mine in (of_rank[second] for of_rank in got):
        theirs = known[mine["place"]]
        for way in mine.keys() - {"place"}:
            far = max(
                float((gradient - theirs[way][key]).abs().max() / theirs[way][key].abs().max())
                for key, gradient in mine[way].items()
            )
            found[f"{name} {way}"] = max(far, found.get(f"{name} {way}", 0.0))
    return found


def refused(run: Any) -> dict[str, str]:
    """What each mistake ends in, at pp2 dp2."""
    from tests.elastic.frameworks import megatron_model as model
    from ucp.elastic import Batch, Feed
    from ucp.elastic.megatron import initialize_model_parallel, micro_batches

    told: dict[str, str] = {}

    def attempt(name: str, work: Any, *given: Any, **named: Any) -> None:
        try:
            work(*given, **named)
        except Exception as error:
            # What is raised is what is asked for.
            told[name] = f"{type(error).__name__}: {error} ({getattr(error, 'hint', None)})"

    def feed(batch: Batch, seat: tuple[int, int]) -> Feed:
        made = Feed(model.dataset(), batch)
        made.place(*seat)
        return made

    with _run(run.rank, run.world, {"dp": 2, "fsdp": 2}, f"{run.url}-axis") as other:
        attempt("axis", initialize_model_parallel, other)
    attempt("taken", initialize_model_parallel, run, pipeline_model_parallel_size=2, order="tp-pp-dp")
    initialize_model_parallel(run)
    chunks = model.build(run.mesh)
    uneven, even, (rank, ranks) = Batch(SAMPLES, MICRO), Batch(8, 2), run.seat
    attempt("uneven", micro_batches, feed(uneven, run.seat), chunks)
    attempt("shapes", micro_batches, feed(uneven, run.seat), chunks, weighted=True)
    chunks[0].module.config.variable_seq_lengths = True
    attempt("interleaved", micro_batches, feed(uneven, run.seat), [*chunks, *chunks], weighted=True)
    attempt("seat", micro_batches, feed(even, (1 - rank, ranks)), chunks)
    attempt("ranks", micro_batches, feed(even, (0, 1)), chunks)
    chunks[0].module.config.calculate_per_token_loss = True
    attempt("twice", micro_batches, feed(even, run.seat), chunks, weighted=True)
    chunks[0].module.config.calculate_per_token_loss = False
    chunks[0].module.config.pipeline_model_parallel_size = 1
    attempt("sizes", micro_batches, feed(even, run.seat), chunks)
    chunks[0].module.config.pipeline_model_parallel_size = 2
    good = micro_batches(feed(even, run.seat), chunks)
    told["good"] = f"{good['num_microbatches']} {good['micro_batch_size']} {len(list(good['data_iterator']))}"
    return told


def streams(run: Any, saves: bool) -> dict[str, Any]:
    """What each stream gives next, as it was seeded and as it goes on."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    import ucp
    from tests.elastic.frameworks import megatron_model as model
    from ucp.elastic.megatron import initialize_model_parallel

    initialize_model_parallel(run)
    url = f"{os.path.dirname(run.url)}/streams"
    model_parallel_cuda_manual_seed(7)
    tracker = get_cuda_rng_tracker()
    state = {"model": model.build(run.mesh), "rng_tracker": tracker}
    seeded, notes = drawn(tracker), []
    if saves:
        ucp.save(state, url)
    else:
        notes = [note for note in ucp.load(state, url).notes if "rng_tracker" in note]
    return {"mesh": run.mesh.coordinate(run.rank), "seeded": seeded, "goes on": drawn(tracker), "notes": notes}


def drawn(tracker: Any) -> dict[str, float]:
    """A number of each stream."""
    found = {}
    for name in tracker.get_states():
        with tracker.fork(name):
            found[name] = torch.rand(()).item()
    return found


def split(run: Any) -> dict[str, Any]:
    """Where this rank is, as the run and as Megatron-Core have it, and how long its groups wait."""
    from megatron.core import parallel_state as ps

    from ucp.elastic.megatron import initialize_model_parallel
    from ucp.train.frameworks.megatron_mesh import mesh_of_job

    initialize_model_parallel(run)
    live: Any = mesh_of_job()
    seats = run.seat, (ps.get_data_parallel_rank(), ps.get_data_parallel_world_size())
    meshes = [[axis for axis in one.axes if axis[1] > 1] for one in (run.mesh, live)]
    return {"seats": seats, "meshes": meshes, "longest": _longest(), "timeout": run.timeout}


def _longest() -> float:
    """Seconds that operations of Megatron-Core's groups wait."""
    from torch.distributed import distributed_c10d

    groups = list(distributed_c10d._world.pg_map)[1:]
    assert len(groups) > 4
    cpu = torch.device("cpu")
    return max(group._get_backend(cpu).options._timeout.total_seconds() for group in groups)


if __name__ == "__main__":
    main()
