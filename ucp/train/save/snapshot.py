"""What a save writes: a copy in host memory, or, while training stands still, the job's own memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ucp.format.native_shard import Piece
from ucp.train.save.digest import device_digest, digests
from ucp.train.save.plan import Cut
from ucp.train.save.staging import Buffer, Buffers, Staging


@dataclass(frozen=True, slots=True)
class Live:
    """The memory of the job itself, which does not change as long as the save lasts."""

    memory: Mapping[Piece, torch.Tensor]

    def tensor(self, cut: Cut) -> torch.Tensor:
        """The elements of a cut, where they are."""
        return self.memory[cut.of][cut.slices]

    def compared(self, cut: Cut) -> Any:
        """The digest of this rank's copy of them."""
        return digest_of(self.tensor(cut), cut)

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(slots=True)
class Staged:
    """A copy in host memory, and the digests of what was not copied."""

    buffers: Buffers
    buffer: Buffer
    staging: Staging = field(default_factory=Staging)

    def tensor(self, cut: Cut) -> torch.Tensor:
        """The elements of a cut, or of a box of one, that was staged."""
        staged = self.staging.staged.get(cut.piece)
        return self.staging.staged[cut.of][cut.slices] if staged is None else staged

    def compared(self, cut: Cut) -> Any:
        """The digest of this rank's copy; None where it was neither staged nor digested."""
        staged = self.staging.staged
        if cut.piece in self.staging.compared:
            return self.staging.compared[cut.piece]
        return digest_of(self.tensor(cut), cut) if cut.piece in staged or cut.of in staged else None

    def close(self) -> None:
        """Give the memory back for the next save."""
        self.staging = Staging()
        self.buffers.give_back(self.buffer)


def digest_of(tensor: torch.Tensor, cut: Cut) -> Any:
    """The digest of `tensor` by the method of `cut`."""
    return int(device_digest(tensor).item()) if cut.compare == "device" else digests(tensor)
