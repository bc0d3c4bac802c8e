"""One server for all processes of a test run.

Whoever comes first starts a keeper, a process that owns the server. Users hold a shared lock on a file; the keeper
stops the server when it gets that lock for itself: when the last user has let go or died, however it died.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.servers.endpoint import Endpoint
from tests.servers.server import Server, ServerError

_POLL_SECONDS = 0.2


@contextmanager
def shared(kind: type[Server], folder: Path) -> Iterator[Endpoint]:
    """The endpoint of the server that the users of `folder` share."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{kind.name}.users", fcntl.LOCK_SH):
        with _locked(folder / f"{kind.name}.starting", fcntl.LOCK_EX):
            endpoint = _started(kind, folder)
        yield endpoint


def _started(kind: type[Server], folder: Path) -> Endpoint:
    state = folder / f"{kind.name}.json"
    if not state.exists():
        log = folder / f"{kind.name}.errors"
        with log.open("wb") as errors:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "tests.servers.shared", kind.name, str(folder)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        while not state.exists():
            if keeper.poll() is not None:
                raise ServerError(log.read_text(errors="replace"))
            time.sleep(0.05)
        # The keeper outlives this process; nobody here waits for it.
        keeper.returncode = 0
    return Endpoint(**json.loads(state.read_text()))


def _keep(kind: type[Server], folder: Path) -> None:
    from tests.servers.server import running

    state = folder / f"{kind.name}.json"
    with running(kind) as server:
        temporary = state.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(server.endpoint)))
        temporary.replace(state)
        with (folder / f"{kind.name}.users").open("ab") as users:
            while not _try_lock(users.fileno()):
                time.sleep(_POLL_SECONDS)
            # Held to the end, so that who comes now waits and then starts another.
            state.unlink()
            server.stop()


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file.fileno(), how)
        yield


if __name__ == "__main__":
    from tests.servers.kinds import SERVERS

    os.umask(0o077)
    _keep(SERVERS[sys.argv[1]], Path(sys.argv[2]))
