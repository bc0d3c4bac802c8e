"""The ranks that hold a sharded target together: what one of them finds out, all of them hear."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from ucp.errors import StorageError
from ucp.train.team import attempt, portable

Mine = TypeVar("Mine")
Shared = TypeVar("Shared")


@dataclass(frozen=True, slots=True)
class Crew:
    """The ranks of a mesh; `groups` are this rank's groups along its axes. Without a mesh, this rank alone."""

    rank: int = 0
    size: int = 1
    groups: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Crew:
        """The crew of the largest mesh that a tensor lies on, the first of those: the same on each of its ranks."""
        meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
        mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)
        coordinate = mesh.get_coordinate() if mesh is not None else None
        if mesh is None or coordinate is None:
            return cls()
        rank = 0
        for index, size in zip(coordinate, mesh.shape, strict=True):
            rank = rank * size + index
        return cls(rank, mesh.size(), [mesh.get_group(axis) for axis in range(mesh.ndim)])

    @classmethod
    def everybody(cls) -> Crew:
        """All ranks of the process group."""
        return cls(distributed.get_rank(), distributed.get_world_size(), [distributed.group.WORLD])

    def share(self, work: Callable[[], tuple[Mine, Shared]]) -> tuple[Mine, list[Shared]]:
        """Every rank does `work`; its first result is this rank's own, of the second each rank gets everybody's.

        What `work` raises on any rank, every rank raises; StorageError if a rank is gone.
        """
        done = attempt(work)
        found = [portable(done if isinstance(done, Exception) else done[1], self.rank)]
        for group in self.groups:
            gathered: list[Any] = [None] * distributed.get_world_size(group)
            try:
                distributed.all_gather_object(gathered, found, group=group)
            except RuntimeError as error:
                raise StorageError(
                    f"another rank is gone ({str(error).splitlines()[0]})", hint="see its log"
                ) from error
            found = [one for part in gathered for one in part]
        if isinstance(done, Exception):
            raise done
        for one in found:
            if isinstance(one, Exception):
                raise one
        return done[0], found
