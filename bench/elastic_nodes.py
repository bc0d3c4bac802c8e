"""Nodes for `bench.elastic`: torchrun's agents on this machine, watched while their workers die and come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import distributed

from bench.elastic_jobs import MARKS, NODES, Request

RENDEZVOUS = {
    "is_host": "0",  # the meeting point is ours, so that it outlives every node
    "last_call_timeout": "1",
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "3",
}
"""What torchrun waits for, in seconds; its defaults are 30, 5 and 3."""
_STORE: Any = distributed  # it does not say what it exports
_LIMIT = 300.0
_PERIOD = 0.02
_TMPFS = Path("/dev/shm")


@dataclass(slots=True)
class Worker:
    """A process of the job: its marks so far, and when it was found gone."""

    pid: int
    marks: list[Mapping[str, Any]]
    ended: float | None = None

    def at(self, what: str) -> float:
        """When it did `what` first; infinity if never."""
        return next((float(mark["at"]) for mark in self.marks if mark["what"] == what), float("inf"))

    def first(self, what: str) -> Mapping[str, Any]:
        """The mark of `what`."""
        return next(mark for mark in self.marks if mark["what"] == what)

    def steps(self) -> Iterator[Mapping[str, Any]]:
        """The marks of its steps."""
        return (mark for mark in self.marks if mark["what"] == "step")


@dataclass(slots=True)
class Seen:
    """What was seen of a job: its workers, the most bytes that lay in the nodes' memory, when another node came."""

    workers: list[Worker] = field(default_factory=list)
    held: int = 0
    came: float | None = None

    @property
    def step(self) -> int:
        """The last step that any worker has done."""
        return max((mark["step"] for worker in self.workers for mark in worker.steps()), default=0)


def watch(request: Request, folder: Path) -> Seen:
    """Run the job to its end. RuntimeError with its last words if it fails or hangs."""
    meeting = _STORE.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = folder / "request.json"
    given.write_text(json.dumps(asdict(request)))
    name = f"bench-{os.getpid()}-{request.how}"
    agents = {node: _agent(node, name, meeting.port, given, folder) for node in NODES}
    lost, seen, deadline = NODES[-1], Seen(), time.monotonic() + _LIMIT
    try:
        while any(agent.poll() is None for agent in agents.values()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{request.how}: not done after {_LIMIT:.0f} s\n{_words(folder)}")
            _look(request, seen, name)
            if seen.came is None and seen.step >= request.node_comes and agents[lost].poll() is not None:
                seen.came, agents[lost] = time.time(), _agent(lost, name, meeting.port, given, folder)
            time.sleep(_PERIOD)
        _look(request, seen, name)
    finally:
        _end(agents.values(), seen.workers)
        shutil.rmtree(_memory(name), ignore_errors=True)
    if any(agent.returncode for agent in agents.values()):
        codes = [agent.returncode for agent in agents.values()]
        raise RuntimeError(f"{request.how}: agents ended with {codes}\n{_words(folder)}")
    return seen


def _agent(node: str, name: str, port: int, request: Path, folder: Path) -> subprocess.Popen[bytes]:
    """One node: ``torchrun`` with one worker."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(NODES) - 1}:{len(NODES)}"]
    words += ["--nproc-per-node=1", "--max-restarts=9", f"--rdzv-id={name}", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "--monitor-interval=0.1"]
    words += ["--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in RENDEZVOUS.items())]
    environment = os.environ | {
        "UCP_NODE": node,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        # Without it, agents go on looking for the first rendezvous' host after that one is lost (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / f"{node}.log").open("ab") as log:
        return subprocess.Popen(
            [*words, "-m", "bench.elastic_jobs", str(request)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _look(request: Request, seen: Seen, name: str) -> None:
    """Read new marks, see who is gone, and what is held in memory; do what a death asks for."""
    known = {worker.pid: worker for worker in seen.workers}
    for path in Path(request.root, MARKS).glob("*.jsonl"):
        pid = int(path.stem)
        if pid not in known:
            seen.workers.append(known.setdefault(pid, Worker(pid, [])))
        worker = known[pid]
        if worker.ended is None:
            gone = _gone(pid)
            before = {mark["what"] for mark in worker.marks}
            worker.marks = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
            if "died" not in before and worker.at("died") < float("inf"):
                _lose(request, name, worker)
            if gone:
                worker.ended = time.time()
    seen.held = max(seen.held, sum(_blocks(_memory(name))))


def _lose(request: Request, name: str, worker: Worker) -> None:
    """What a death takes along: the memory of a lost node, and what this machine has cached of the storage."""
    if worker.first("died")["step"] == request.node_dies:
        shutil.rmtree(_memory(name) / NODES[2], ignore_errors=True)
        shutil.rmtree(Path(request.disks) / f"ucp-{os.getuid()}" / name / NODES[2], ignore_errors=True)
    for path in Path(request.storage).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _memory(name: str) -> Path:
    return _TMPFS / f"ucp-{os.getuid()}" / name


def _blocks(folder: Path) -> Iterator[int]:
    """Bytes of memory that files below `folder` take."""
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue


def _gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _end(agents: Iterable[subprocess.Popen[bytes]], workers: Sequence[Worker]) -> None:
    """Whatever happened, nothing that was started here stays."""
    for agent in agents:
        if agent.poll() is None:
            agent.kill()
        agent.wait()
    for worker in workers:
        if not _gone(worker.pid):
            os.kill(worker.pid, signal.SIGKILL)


def _words(folder: Path) -> str:
    """The ends of the nodes' logs."""
    return "\n".join(f"== {path.stem}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
