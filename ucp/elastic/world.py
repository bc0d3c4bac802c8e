"""Where this process is among those of its job, as the launcher tells."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ucp.elastic.nodes.folder import node_name
from ucp.errors import UsageError

_LONGEST = 40

_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Who says which of a node's processes this is: torchrun, Slurm (srun(1)), Open MPI, MPICH and Intel MPI."""

_OTHERS = {
    "SLURM_STEP_NUM_TASKS": "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE": "RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE": "RANK=$PMI_RANK WORLD_SIZE=$PMI_SIZE",
}
"""Where launchers say how many processes they started, and what torch wants to hear of it."""


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process: `rank` of `size`, and `local_rank` of those that its launcher started on `node`.

    `alone` where no launcher says anything: a job of one process. `agent` is the process id of the torchrun agent that
    started this one, None under other launchers.
    """

    rank: int
    size: int
    local_rank: int
    node: str
    alone: bool = False
    agent: int | None = None


def world_of(environment: Mapping[str, str] | None = None) -> World:
    """What ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` say, and the process group where there is one already.

    They are torchrun's (torch/distributed/elastic/agent/server/local_elastic_agent.py), and those of most launchers.
    ``TORCHELASTIC_RESTART_COUNT`` is not asked: each agent counts on its own.

    UsageError if they contradict each other, and where another launcher started several processes that would each take
    themselves for the whole job.
    """
    given = os.environ if environment is None else environment
    grouped = _grouped()
    if grouped is None and "RANK" not in given and "WORLD_SIZE" not in given:
        _check_alone(given)
        return World(0, 1, 0, node_name(), alone=True)
    try:
        if grouped is None or "RANK" in given or "WORLD_SIZE" in given:
            rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        else:
            rank, size = grouped
        local = int(next((given[name] for name in _LOCAL_RANKS if name in given), "0"))
    except (KeyError, ValueError) as error:
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK do not tell the place of this process: {error}") from None
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"rank {rank} of {size}, local rank {local}: there is no such place")
    if grouped not in (None, (rank, size)):
        raise UsageError(
            f"RANK and WORLD_SIZE say rank {rank} of {size}, the process group says {grouped[0]} of {grouped[1]}",
            hint="make the process group of all ranks, or leave it to the run",
        )
    return World(rank, size, local, node_name(), agent=_agent() if "TORCHELASTIC_RUN_ID" in given else None)


def _grouped() -> tuple[int, int] | None:
    """Rank and size of the process group, if there is one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _check_alone(given: Mapping[str, str]) -> None:
    for name, told in _OTHERS.items():
        if given.get(name, "1") not in ("", "1"):
            raise UsageError(
                f"{name}={given[name]}, and RANK and WORLD_SIZE are not set: each process would be a job of its own",
                hint=f"in each of them: export {told}, and MASTER_ADDR and MASTER_PORT of the first",
            )


def _agent() -> int:
    """The parent, which is torchrun's agent; UsageError if that is gone already, and another process is in its place.

    An orphan's parent is the first process of the machine, or of the container: which may be the agent itself.
    """
    parent = os.getppid()
    if parent == 1 and (command := _command(1)) is not None and not re.search("python|torch", command):
        raise UsageError("the torchrun that started this process is gone", hint="start the job again")
    return parent


def _command(pid: int) -> str | None:
    """The command line of a process; None where that is not told."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").replace("\0", " ")
    except OSError:
        return None


def job_name(url: str) -> str:
    """The name of the job that saves at `url`, the same whenever it is started: the name of its folders on nodes."""
    where = url.rstrip("/") or url
    where = where if "://" in where else os.path.abspath(os.path.expanduser(where))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", where.rpartition("/")[2])[-_LONGEST:].strip(".-")
    return f"{name or 'run'}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
