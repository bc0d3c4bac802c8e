"""Real gloo ranks, forked from a process that has imported what they need."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ucp.errors import UcpError

LIMIT_SECONDS = 300.0


def spawn(job: Callable[..., Any], world: int, *args: Any) -> Any:
    """Run ``job(rank, world, *args)`` on `world` ranks; the JSON value that rank 0 returned.

    UcpError with the first traceback if a rank fails or takes longer than five minutes; no rank is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="ucp-demo-") as folder:
        context = get_context("fork")
        ranks = [context.Process(target=_main, args=(folder, job, rank, world, args)) for rank in range(world)]
        try:
            for process in ranks:
                process.start()
            if not _all_succeed(ranks):
                raise UcpError(f"a rank of the demo failed:\n{_first_error(Path(folder))}")
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return json.loads((Path(folder) / "result").read_text())


def _all_succeed(ranks: list[Any]) -> bool:
    running: dict[Any, BaseProcess] = {process.sentinel: process for process in ranks}
    while running:
        ended = wait(list(running), timeout=LIMIT_SECONDS)
        if not ended:
            return False
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return False
    return True


def _first_error(folder: Path) -> str:
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    logs = sorted(folder.glob("log-*"))
    return errors[0].read_text() if errors else "".join(log.read_text(errors="replace")[-2000:] for log in logs[:1])


def _main(folder: str, job: Callable[..., Any], rank: int, world: int, args: tuple[Any, ...]) -> None:
    """Body of a rank: its output goes to a log, and it ends without the parent's exit handlers."""
    _end_with_parent()
    log = os.open(f"{folder}/log-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        result = _in_group(folder, job, rank, world, args)
        if rank == 0:
            Path(folder, "result").write_text(json.dumps(result))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever ended the rank is what the user must see
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """Ctrl-C is the parent's to handle, which ends its ranks; where something else ends the parent, Linux ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _in_group(folder: str, job: Callable[..., Any], rank: int, world: int, args: tuple[Any, ...]) -> Any:
    import torch
    from torch import distributed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    result = job(rank, world, *args)
    distributed.barrier()
    return result
