"""The rules hold: a reader that broke one would be found out."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.memory import FuzzStore, Meter, ViolationError
from tests.fuzz.mutate import MUTATIONS
from tests.fuzz.target import store_of
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import Allowance, attempt, watched
from ucp.errors import CorruptError

LITTLE = Allowance(lines=1000, lines_per_byte=1, memory=1 << 20, memory_per_byte=1)


def endless() -> None:
    while True:
        pass


def swallowed() -> None:
    with contextlib.suppress(AssertionError):
        compile("1", "x", "eval")


BREACHES: dict[str, Callable[[], object]] = {
    "imports": lambda: importlib.import_module("this"),
    "compiles": lambda: compile("1", "x", "eval"),
    "compiles and hides it": swallowed,
    "evaluates": lambda: eval("1"),  # noqa: S307 - that it is noticed is the point
    "runs a command": lambda: subprocess.run(["true"], check=True),
    "runs a command in a shell": lambda: os.system("true"),
    "writes a file": lambda: Path("written").write_text("x"),
    "reads a file": lambda: Path("/etc/hostname").read_bytes(),
    "makes a folder": lambda: os.mkdir("made"),
    "removes a file": lambda: os.remove("nothing"),
    "opens a socket": socket.socket,
    "resolves a name": lambda: socket.getaddrinfo("localhost", 80),
    "never ends": endless,
    "takes much memory": lambda: bytearray(4 << 20),
    "reads too much": lambda: [store.read("a") for store in [FuzzStore({"a": bytes(10)}, Meter(15))] * 2],
    "writes to the store": lambda: store_of({}).put("a", b""),
    "deletes from the store": lambda: store_of({"a": b""}).delete("a"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breaches_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("this", None)
    with pytest.raises(ViolationError):
        watched(BREACHES[name], 1, LITTLE)
    assert not list(tmp_path.iterdir())


def test_any_other_exception_comes_through() -> None:
    with pytest.raises(RecursionError):
        attempt(lambda: (_ for _ in ()).throw(RecursionError))


def test_a_refusal_is_told_from_a_result() -> None:
    def refuse() -> None:
        raise CorruptError("x")

    assert isinstance(watched(refuse, 1, LITTLE).error, CorruptError)
    assert watched(lambda: 1, 1, LITTLE).error is None


@pytest.mark.parametrize("style", MUTATIONS)
def test_mutations_change_inputs_and_keep_most_well_formed(style: str) -> None:
    target = next(target for target in TARGETS.values() if target.style == style)
    seed = next(path for path in target.inputs if path.name.startswith("seed")).read_bytes()
    changed = {MUTATIONS[style](seed, random.Random(number)) for number in range(50)}
    assert len(changed) > 25
    assert MUTATIONS[style](b"\0", random.Random(0)) is not None
