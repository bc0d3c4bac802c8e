"""Real gloo ranks for tests: started quickly, watched closely, never left behind.

Ranks are forked from a process that has imported already what they would each import, so a group starts in well under
a second.  Inside pytest that process is multiprocessing's fork server (forking pytest itself would copy its threads'
locks); a plain script without threads may use ``method="fork"`` and have its ranks inherit everything it imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Method = Literal["forkserver", "fork"]

USED = (
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",  # which the first optimizer of a process imports: it takes as long as all else of torch
    "ucp.train.load",
    "ucp.train.save",
    "blake3",
    "zarr",
)
"""What ranks use, and would each import anew; every family, too, since a source is asked whose it is."""


class RankFailed(RuntimeError):
    """A rank raised, died or did not finish in time; the message holds the traceback of the rank that failed first."""


def spawn(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120.0,
    method: Method = "forkserver",
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``fn(rank, world, *args)`` on `world` gloo ranks and return what each rank returned, in rank order.

    The default process group is up when `fn` starts.  `fn` must be importable by name and its result must pickle.
    Raises `RankFailed` with the first rank's traceback; no rank outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        context: Any = forkserver() if method == "forkserver" else multiprocessing.get_context(method)
        processes = [
            context.Process(target=_rank_main, args=(rank, world, folder, env or {}, fn, args), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            problem = _wait(processes, time.monotonic() + timeout)
        finally:
            _kill(processes)
        if problem is not None:
            raise RankFailed(_report(problem, Path(folder), world))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world)]


def forkserver() -> Any:
    """The context whose processes begin with what ranks use, if asked for before the first of them starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_used())
    return context


def preload() -> None:
    """Import what ranks use, in a script that forks them."""
    for module in _used():
        importlib.import_module(module)


def _used() -> list[str]:
    families = {point.module for point in importlib.metadata.entry_points(group="ucp.converters")}
    return [*USED, *sorted(families)]


def _wait(processes: list[Any], deadline: float) -> str | None:
    """Wait for all ranks; None when all succeeded, else what went wrong."""
    running = {process.sentinel: process for process in processes}
    while running:
        ready = multiprocessing.connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return "timed out"
        for sentinel in ready:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                return f"rank exited with code {process.exitcode}"
    return None


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()


def _report(problem: str, folder: Path, world: int) -> str:
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        return f"{problem}; rank {errors[0].stem} failed first:\n{errors[0].read_text()}"
    logs = [folder / f"{rank}.log" for rank in range(world)]
    tails = [f"--- rank {path.stem}\n{path.read_text(errors='replace')[-1500:]}" for path in logs if path.exists()]
    return "\n".join([f"{problem}; no rank left a traceback", *tails])


def _rank_main(
    rank: int, world: int, folder: str, env: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Body of a rank: never returns, so that no inherited exit handler runs in it."""
    die_with_parent()
    here = Path(folder)
    _redirect_output(here / f"{rank}.log")
    code = 1
    try:
        _set_environment(rank, world, env)
        result = _run(rank, world, here, fn, args)
        (here / f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        # Renaming makes the traceback appear at once and whole, which orders the ranks' failures.
        (here / f"{rank}.partial").write_text(traceback.format_exc())
        os.replace(here / f"{rank}.partial", here / f"{rank}.error")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(rank: int, world: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    # A file, not a port, is where ranks meet: nothing can be taken by another test between choosing and binding.
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    result = fn(rank, world, *args)
    distributed.barrier()
    return result


def _set_environment(rank: int, world: int, env: dict[str, str]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        **env,
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _redirect_output(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the process that forked it dies, whatever killed that one."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
