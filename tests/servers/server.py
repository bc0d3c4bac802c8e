"""What all servers share: processes that end with whoever started them, free ports, readiness."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from tests.servers.endpoint import Endpoint

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_HEALTHY = (200, 204, 400, 403, 404, 405)


class ServerError(Exception):
    """A server does not start."""


class Server(ABC):
    """One server with its data in `folder`. `start` may follow `kill`: same port, same data where it keeps any."""

    name: ClassVar[str]
    keeps_data: ClassVar[bool] = True
    """Whether what was acknowledged survives `kill`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports: dict[str, int] = {}

    @classmethod
    @abstractmethod
    def missing(cls) -> str:
        """What it needs that is not installed; "" if it can start."""

    @property
    @abstractmethod
    def endpoint(self) -> Endpoint:
        """How to reach it, once started."""

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it serves the bucket."""

    def kill(self) -> None:
        """SIGKILL what answers clients; processes behind it may go on."""
        self._end(self.processes, signal.SIGKILL)
        self.processes = []

    def stop(self) -> None:
        """End everything; never raises."""
        self._end(self.processes, signal.SIGKILL)
        self.processes = []

    def port(self, name: str = "main") -> int:
        """A port that was free when first asked for, and that stays this server's."""
        if name not in self.ports:
            self.ports[name] = free_port()
        return self.ports[name]

    def launch(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start one process; its output goes to a file in the folder."""
        words = [str(word) for word in command]
        log = self.folder / f"{Path(words[0]).name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - calls one system call
            )
        self.processes.append(process)

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Wait until `ready`; ServerError with the end of the logs if a process ends or time is up."""
        until = time.monotonic() + seconds
        while not ready():
            ended = [process for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > until:
                logs = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.logs())
                raise ServerError(f"{self.name}: {what} {'ended' if ended else 'is not ready'}\n{logs}")
            time.sleep(0.05)

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    @staticmethod
    def _end(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        for process in processes:
            process.wait()


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    """Whether an HTTP server answers at `url`, if only to refuse."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        with error:
            return error.code in _HEALTHY
    except OSError:
        return False


@contextmanager
def running(kind: type[Server]) -> Iterator[Server]:
    """A server of one's own, to be killed as one likes, gone afterwards. Ports may be taken meanwhile: three tries."""
    folder = Path(tempfile.mkdtemp(prefix=f"ucp-{kind.name}-"))
    server = kind(folder)
    try:
        for tries in (2, 1, 0):
            try:
                server.start()
                break
            except ServerError:
                server.stop()
                if not tries:
                    raise
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                server = kind(folder)
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
