"""torchrun agents that run a job script of a framework, each a node of its own; none outlives its test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.support.descendants import descendants
from tests.support.gloo import die_with_parent

ROOT = Path(__file__).parents[3]
PATIENCE = 400.0


class Agents:
    """Agents of one job: `script` with an order, a JSON object, as its argument.

    Orders get ``url`` and ``out`` in `folder`; the job appends records, one JSON object per line, to files in ``out``.
    """

    def __init__(self, folder: Path, script: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.script, self.environment = folder, script, environment
        self.out = folder / "out"
        self.out.mkdir()
        self.id = uuid.uuid4().hex[:8]
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        # Where agents meet, which is on no node that may be lost.
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, name: str, ranks: int, order: Mapping[str, Any], *, nodes: str = "1", restarts: int = 3) -> None:
        """Begin node `name` of `ranks` workers."""
        order = {"url": str(self.folder / "run"), "out": str(self.out), "root": str(self.folder / "nodes"), **order}
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", f"--rdzv-id={self.id}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._meeting.port}"]
        # Agents that are to meet may begin to look for each other long after one another.
        last_call = 1 if nodes == "1" else 15
        timing = f"join_timeout=600,last_call_timeout={last_call},keep_alive_interval=1,keep_alive_max_attempt=8"
        command += [f"--rdzv-conf=is_host=0,{timing}", str(self.script), json.dumps(order)]
        environment = {**self.environment, "UCP_NODE": name, "PYTHONPATH": str(ROOT)}
        # Else an agent that was not the first one knows for ever only the store of the one that was
        # (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py, `_bootstrap_store_info`).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(nodes != "1"))
        with open(self.folder / f"{name}.log", "a") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it calls prctl alone
            )

    def wait(self, name: str = "a") -> int:
        """The exit code of an agent, once it has ended."""
        try:
            return self.running[name].wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.log(name)[-5000:]}") from None

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for what running agents bring about."""
        end = time.monotonic() + PATIENCE
        while not what():
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)[-5000:]}"
            assert time.monotonic() < end, "\n".join(self.log(name)[-3000:] for name in self.running)
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Lose a node's processes at once; what it holds in files stays."""
        process = self.running.pop(name)
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def records(self) -> list[dict[str, Any]]:
        """What ranks have told so far; half a line, of a rank that was killed while it wrote, is left out."""
        lines = [line for path in sorted(self.out.iterdir()) for line in path.read_text().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str = "a") -> str:
        """What an agent and its workers printed."""
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        """End everything."""
        for name in list(self.running):
            self.kill(name)
