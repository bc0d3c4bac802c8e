"""Nodes in processes of their own, which are killed, stopped, and cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ucp.elastic.nodes import Address

ROOT = Path(__file__).parents[3]
_PATIENCE_SECONDS = 60.0


def start(module: str, *arguments: str, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A module of these tests as a process that ends with this one; `inside` is a command to run it with."""
    return subprocess.Popen(
        [*inside, sys.executable, "-m", f"tests.elastic.nodes.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def serve(folder: Path, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> tuple[subprocess.Popen[str], Address]:
    """A node with a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    process = start("serve", str(folder), host, inside=inside)
    assert process.stdout is not None
    found, port, secret = json.loads(process.stdout.readline())
    return process, Address(found, port, bytes.fromhex(secret))


def end(process: subprocess.Popen[str]) -> None:
    """Kill it, whatever it does."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def eventually(true: Callable[[], bool]) -> bool:
    """Whether it becomes true before long."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False


def files(folder: Path) -> list[str]:
    """All files below a folder, with or without names of objects."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
