"""A cluster on one machine: agents of torchrun as its nodes, which can be killed, cut off, and started anew."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Self

from ucp.demo.elastic import warden
from ucp.demo.elastic.network import INTERFACE, Network
from ucp.errors import UcpError, UsageError

FOLDER = "UCP_DEMO_FOLDER"
"""Variable with the folder in which the job leaves its records, and finds its orders."""
SHARED_MEMORY = "/dev/shm"
_POLL = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """How agents meet (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py); whole seconds.

    A round is complete when all nodes that may come are there, or `last_call` after enough of them are. A node that
    has given no sign of life for `beat` times `beats` is out of it. `look` is how often an agent looks at its ranks
    (it may be a fraction).
    """

    last_call: int = 2
    beat: int = 1
    beats: int = 8
    look: float = 0.2
    join: int = 3600
    answer: int = 3600
    """How long an agent waits for others, and for the store of the meeting, from which it may be cut off.

    An agent that has waited for longer ends, and as it ends closes the meeting for all others, for ever, as soon as it
    reaches the store again (torch/distributed/launcher/api.py, `launch_agent`): both are longer than any link is cut.
    """
    stop: int = 10
    """How long ranks that are told to end may take, before they are killed."""

    @property
    def words(self) -> str:
        """As the option ``--rdzv-conf`` wants it."""
        return (
            f"is_host=0,last_call_timeout={self.last_call},keep_alive_interval={self.beat},"
            f"keep_alive_max_attempt={self.beats},join_timeout={self.join},read_timeout={self.answer},close_timeout=5"
        )


@dataclass(slots=True)
class _Node:
    name: str
    ranks: int
    agent: subprocess.Popen[bytes] | None = None
    starts: int = 0
    away: bool = False
    log: IO[bytes] | None = field(default=None, repr=False)


class Cluster:
    """Nodes, each an agent of torchrun with `nodes[name]` ranks, that run `command` (a script and its arguments).

    `folder` gets the agents' logs, and is told to the job in UCP_DEMO_FOLDER. With `divided`, every node has a network
    namespace and an address of its own, and can be cut off. Whatever happens, also to this process, no process, no
    namespace and nothing in shared memory is left behind.

    UcpError where namespaces cannot be made, or processes cannot be killed.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        nodes: Mapping[str, int],
        least: int = 1,
        divided: bool = False,
        meeting: Meeting = Meeting(),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.meeting = folder, meeting
        self.id = secrets.token_hex(4)
        self._command, self._least, self._environment = list(command), least, dict(environment or {})
        self._nodes = {name: _Node(name, ranks) for name, ranks in nodes.items()}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._warden = _start_warden(self.id)
        try:
            self.remember(f"folder {SHARED_MEMORY}/ucp-{os.getuid()}/{self.id}")
            self._network = Network(self.id, remember=self.remember) if divided else None
            self._store = _store(meeting)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs, and remove what is not in `folder`; returns when all of it is gone."""
        pipe = self._warden.stdin
        if pipe is not None and not pipe.closed:
            with suppress(BrokenPipeError):
                pipe.close()
        self._warden.wait()
        for node in self._nodes.values():
            _reap(node)

    def remember(self, line: str) -> None:
        """Have something removed at the end: ``folder PATH``, ``netns NAME`` or ``link NAME``."""
        pipe = self._warden.stdin
        assert pipe is not None
        pipe.write(f"{line}\n".encode())
        pipe.flush()

    @property
    def divided(self) -> bool:
        """Whether nodes have networks of their own."""
        return self._network is not None

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the nodes whose agent runs, those cut off too."""
        return tuple(name for name, node in self._nodes.items() if node.agent is not None and node.agent.poll() is None)

    @property
    def reachable(self) -> tuple[str, ...]:
        """Names of the nodes whose agent runs and that are not cut off."""
        return tuple(name for name in self.present if not self._nodes[name].away)

    @property
    def cut_off(self) -> tuple[str, ...]:
        """Names of the nodes whose link is cut, whether their agent runs still or not."""
        return tuple(name for name, node in self._nodes.items() if node.away)

    def ranks_of(self, nodes: Sequence[str]) -> int:
        """How many ranks these nodes have together."""
        return sum(self._nodes[name].ranks for name in nodes)

    def start(self, name: str) -> None:
        """Start `name`, or start it anew if its agent is gone; what was left of it is killed first."""
        node = self._nodes[name]
        if name in self.present:
            raise UsageError(f"node {name} runs already")
        warden.kill_all(f"{self.id}/{name}/")
        _reap(node)
        self.heal(name)
        node.starts += 1
        node.log = open(self.folder / "logs" / f"{name}-{node.starts}.log", "wb")  # noqa: SIM115 - as long as the node
        node.agent = subprocess.Popen(
            self._agent(node),
            env=self._environment_of(node),
            stdin=subprocess.DEVNULL,
            stdout=node.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ranks(self, name: str) -> dict[int, int]:
        """Process numbers of the ranks that run on `name`, by local rank."""
        found = warden.running(f"{self.id}/{name}/")
        # What a rank starts has the environment of the rank.
        ranks = {one.pid for one in found if one.local_rank is not None}
        return {one.local_rank: one.pid for one in found if one.local_rank is not None and one.parent not in ranks}

    def kill_rank(self, name: str, local_rank: int) -> bool:
        """SIGKILL to one rank; False if it does not run."""
        pid = self.ranks(name).get(local_rank)
        return pid is not None and _kill(pid)

    def kill_agent(self, name: str) -> bool:
        """SIGKILL to the agent of `name` alone: its ranks run on without it. False if it does not run."""
        agent = self._nodes[name].agent
        if agent is None or agent.poll() is not None:
            return False
        agent.kill()
        agent.wait()
        return True

    def kill_node(self, name: str, *, disk: bool = False) -> int:
        """A machine goes: SIGKILL to everything on `name`, its shared memory lost; how many processes there were.

        With `disk`, what it has below ``local`` in the folder is lost too.
        """
        self.kill_agent(name)
        killed = warden.kill_all(f"{self.id}/{name}/")
        roots = [SHARED_MEMORY, *([str(self.folder / "local")] if disk else [])]
        for root in roots:
            path = f"{root}/ucp-{os.getuid()}/{self.id}/{name}"
            warden.remove_folder(path)
            Path(f"{path}.lock").unlink(missing_ok=True)
        _reap(self._nodes[name])
        return killed + 1

    def cut(self, name: str) -> None:
        """Cut `name` off from all others and from the meeting; its processes run on. UsageError where it cannot be."""
        if self._network is None:
            raise UsageError("nodes of this cluster share a network", hint="Cluster(..., divided=True)")
        self._nodes[name].away = True
        self._network.cut(name)

    def heal(self, name: str) -> None:
        """Undo `cut`."""
        if self._nodes[name].away and self._network is not None:
            self._network.heal(name)
        self._nodes[name].away = False

    def wait(self, until: Callable[[], bool], *, seconds: float, what: str) -> float:
        """Wait until `until` holds; how long it took. UcpError, with the ends of the logs, after `seconds`."""
        begun = time.monotonic()
        while not until():
            if time.monotonic() - begun > seconds:
                raise UcpError(f"{what}: not within {seconds:g} s\n{self.last_words()}")
            time.sleep(_POLL)
        return time.monotonic() - begun

    def last_words(self, size: int = 1500) -> str:
        """The ends of the newest logs of all nodes."""
        logs = [self.folder / "logs" / f"{node.name}-{node.starts}.log" for node in self._nodes.values() if node.starts]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-size:]}" for log in logs)

    def _agent(self, node: _Node) -> list[str]:
        host = self._network.host if self._network else "127.0.0.1"
        address = self._network.address(node.name) if self._network else "127.0.0.1"
        before = self._network.inside(node.name) if self._network else []
        options = {
            "nnodes": f"{self._least}:{len(self._nodes)}",
            "nproc-per-node": node.ranks,
            "max-restarts": 100_000,
            "monitor-interval": self.meeting.look,
            "shutdown-timeout": self.meeting.stop,
            "rdzv-backend": "c10d",
            "rdzv-endpoint": f"{host}:{self._store.port}",
            "rdzv-id": self.id,
            "rdzv-conf": self.meeting.words,
            "local-addr": address,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return [*before, sys.executable, "-m", "torch.distributed.run", *words, *self._command]

    def _environment_of(self, node: _Node) -> dict[str, str]:
        ours = {
            warden.MARK: f"{self.id}/{node.name}/",
            "UCP_NODE": node.name,
            FOLDER: str(self.folder),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # Agents that were not the first keep the address of the first one for ever, dead or not, if they share its
            # store (DynamicRendezvousHandler.next_rendezvous).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if sys.platform == "linux":
            ours["GLOO_SOCKET_IFNAME"] = INTERFACE if self._network else "lo"
        return {**os.environ, **ours, **self._environment}


def _start_warden(mark: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", warden.__file__, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as told:
        if told.readline() != b"ready\n":
            raise UcpError("the warden of the cluster does not start")
    return process


def _store(meeting: Meeting) -> Any:
    """The store in which agents meet; it ends with this process."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        "0.0.0.0",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=meeting.join),
        multi_tenant=False,
    )


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _reap(node: _Node) -> None:
    if node.agent is not None:
        node.agent.wait()
    if node.log is not None:
        node.log.close()
    node.agent, node.log = None, None
