"""What a form of checkpoint does in a save: the seam between the engine and how bytes are laid out in storage.

The engine brings every rank a `Task`: what it has staged, the plan by which each box is written by one rank, and a
channel to the other ranks. A form is three steps, of which all but the first run on every rank, in a background thread
if the save is asynchronous:

1. `Form.brief`, on rank 0 alone: what each rank is to know beyond its plan, such as the chunks that it assembles;
2. `Form.write`: write this rank's objects and make them durable. Ranks may exchange bytes over `Task.channel` here, all
   in the same order; what this returns travels to rank 0;
3. `Form.commit`, on rank 0 alone, once all ranks have written: put the root object. Whatever fails, none is put.

`Task.snapshot` has the bytes: ``task.snapshot.tensor(cut)`` is the tensor of the box of a `Cut` of ``task.plan.write``,
of its shape and dtype, in host memory if the save is asynchronous, else where it lies in the job. It does not change
until the task is over. The cuts of all ranks' plans together are every element once: ``brief`` gets them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ucp.format.native_shard import Piece
from ucp.store import Store
from ucp.train.save.channel import Channel
from ucp.train.save.ground import Ground
from ucp.train.save.plan import Cut, Plan
from ucp.train.save.whole import Whole


class Snapshot(Protocol):
    """What a rank saves, as it was at one moment."""

    def tensor(self, cut: Cut) -> torch.Tensor:
        """The elements of a cut of this rank's plan."""
        ...

    def compared(self, cut: Cut) -> Any:
        """A digest of this rank's copy of what it compares, by the method of the cut; None if it was not staged."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(slots=True)
class Task:
    """One save on one rank. `digests` are those of written pieces: whoever computes a digest of blocks leaves it there.

    `tag` is new for every save: names of objects that contain it belong to this save alone. `before` is the fingerprint
    of the root object that is to be replaced; `ground`, on rank 0, what else there was.
    """

    store: Store
    channel: Channel
    snapshot: Snapshot
    plan: Plan
    tag: str
    brief: Any = None
    before: str | None = None
    ground: Ground | None = None
    digests: dict[Piece, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Number of the rank in the channel."""
        return self.channel.rank


class Form(ABC):
    """A form of checkpoint. `name` is what users call it; it `talks` if its `write` uses the channel."""

    name: str
    talks: bool = False
    root: str | None = None
    """The object whose presence is the checkpoint, if all of this form have the same."""

    @abstractmethod
    def is_ours(self, path: str) -> bool:
        """Whether only a save of this form can have put the object at `path` there."""

    def brief(self, whole: Whole, plans: Sequence[Plan], store: Store, ground: Ground, tag: str) -> Sequence[Any]:
        """What each rank is told, one by one, of a save to `store`."""
        return [None for _ in plans]

    @abstractmethod
    def write(self, task: Task) -> Any:
        """Write what is this rank's, durably; what it returns goes to `commit`."""

    @abstractmethod
    def commit(self, whole: Whole, task: Task, written: Sequence[Any]) -> int:
        """Put what makes it a checkpoint; the bytes that all ranks have written."""

    @abstractmethod
    def discard(self, task: Task) -> None:
        """Remove what this rank has written: the save has failed."""
