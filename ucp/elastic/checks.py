"""Whether what a run is given to save is what its training goes on from, and fits the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ucp.elastic import deepspeed
from ucp.elastic.batch import Batch
from ucp.errors import UsageError
from ucp.layout import Mesh


def check_state(state: Any, *, batch: Batch | None, mesh: Mesh, ranks: Callable[[], int], stepped: bool) -> None:
    """UsageError for a `state` with which a run of `mesh` and `batch` would silently train otherwise than it should.

    That are DeepSpeed's engines whose gradients are not those of the batch (`ucp.elastic.deepspeed.check_engines`),
    feeds of another batch, and, once the job has `stepped`, feeds that it draws from and does not save: each start
    would begin their samples anew. `ranks` tells how many of the mesh train on samples of their own.
    """
    held = list(parts(state))
    feeds = _feeds()
    if feeds is not None:
        _check_feeds([one for one in held if isinstance(one, feeds.Feed)], batch)
        if stepped and feeds.drawn and not any(one in feeds.drawn for one in held if isinstance(one, feeds.Feed)):
            raise UsageError(
                "samples come from a Feed that is not in the state: whenever the job starts again it would begin anew",
                hint='save it with the rest: {"model": model, "optimizer": optimizer, "feed": feed}',
            )
    if "deepspeed.runtime.engine" in sys.modules:
        deepspeed.check_engines(held, batch=batch, mesh=mesh, ranks=ranks, stepped=stepped)


def begin() -> None:
    """A run begins: feeds that others drew from are none of its own."""
    if (feeds := _feeds()) is not None:
        feeds.drawn.clear()


def parts(state: Any) -> Iterator[Any]:
    """What `state` holds, through dicts, lists and tuples."""
    if isinstance(state, Mapping):
        state = tuple(state.values())
    if isinstance(state, list | tuple):
        for one in state:
            yield from parts(one)
    else:
        yield state


def _check_feeds(feeds: list[Any], batch: Batch | None) -> None:
    for feed in feeds if batch is not None else ():
        if feed.batch != batch:
            raise UsageError(f"the run has {batch}, and its feed {feed.batch}", hint="give both the same batch")


def _feeds() -> Any:
    """The module of feeds, if anybody uses it: it needs torch's data loading."""
    return sys.modules.get("ucp.elastic.feed")
