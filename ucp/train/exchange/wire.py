"""Messages between the ranks of a process group: all of a round begun at once, so that none waits for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ucp.errors import StorageError


@dataclass(frozen=True, slots=True)
class Wire:
    """A process `group`, and the `device` whose memory its messages are sent from."""

    group: Any
    device: torch.device

    @classmethod
    def of(cls, group: Any, kinds: set[str]) -> Wire:
        """Messages between devices where the group does that (NCCL) and all ranks fill just those, else on the CPU.

        `kinds` are the types of device that any rank fills.
        """
        able = {device.type for device in group._device_types}
        accelerators = able - {"cpu"}
        kind = next(iter(kinds)) if len(kinds) == 1 and kinds <= able else "cpu"
        if kind not in able:
            kind = next(iter(accelerators))
        return cls(group, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind))

    def begin(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> list[Any]:
        """Begin to send to and receive from ranks of the group; the memory is busy until `finish`."""
        operations = [self._operation(distributed.irecv, data, rank) for rank, data in sorted(receives.items())]
        operations += [self._operation(distributed.isend, data, rank) for rank, data in sorted(sends.items())]
        try:
            return list(distributed.batch_isend_irecv(operations)) if operations else []
        except RuntimeError as error:
            raise gone(error) from error

    def finish(self, begun: list[Any]) -> None:
        """Wait until everything `begun` has been sent and received. StorageError if a rank is gone."""
        try:
            for work in begun:
                work.wait()
        except RuntimeError as error:
            raise gone(error) from error

    def _operation(self, kind: Any, data: torch.Tensor, rank: int) -> Any:
        return distributed.P2POp(kind, data, group=self.group, group_peer=rank)


def gone(error: RuntimeError) -> StorageError:
    """What a rank says that cannot reach another one."""
    return StorageError(f"another rank is gone ({str(error).splitlines()[0]})", hint="see its log")
