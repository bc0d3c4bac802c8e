"""Reading, verifying and converting runs nothing and imports nothing that a checkpoint names, whatever family it is of.

Each family is read in a process whose audit hook (PEP 578) records what Python is about to do. The first round, over
sound checkpoints, imports what our own code needs; the second, over poisoned ones, must add nothing at all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import BASES
from tests.fuzz.zips import pickle_of, with_pickle
from tests.real.hostile import ROOT
from tests.security.folders import FAMILIES, copied
from ucp.errors import NotFoundError, UnsafeError

WATCHED = """
import importlib, json, pkgutil, sys
from pathlib import Path

jobs, out = json.loads(sys.argv[1]), sys.argv[2]
seen, on = [], False
FORBIDDEN = (
    "import", "exec", "compile", "marshal", "code.__new__", "pickle", "subprocess", "os.system", "os.exec", "os.spawn",
    "os.posix_spawn", "os.fork", "os.kill", "socket", "ctypes", "urllib", "http", "ftplib", "webbrowser", "pty",
    "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "shutil",
)

def hook(event, arguments):
    if not on or not arguments or str(arguments[0]).startswith(out):  # the destination is the one place to write to
        return
    if event == "open":
        path, mode, flags = arguments
        if flags & 3 or mode is not None and set(mode) & set("wax+"):  # O_WRONLY, O_RDWR
            seen.append(f"{event} {arguments!r}")
    elif event.startswith("ctypes") and arguments[-1] in (None, "syncfs"):
        pass  # how local stores make what they wrote durable
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {arguments!r}"[:300])

sys.addaudithook(hook)

import ucp, ucp.converters
from ucp.converter import read_catalog
from ucp.errors import UcpError
from ucp.run.verify import verify
from ucp.tree import walk

LEFT_OUT = ("ucp.integrations", "ucp.demo", "ucp.testing", "ucp.spec", "ucp.metrics")
for package in (ucp, ucp.converters):  # what our own code imports at first use is no matter of the checkpoint
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.name.startswith(LEFT_OUT) and not info.name.endswith("__main__"):
            importlib.import_module(info.name)

def read(folder, family, _):
    catalog, store = read_catalog(folder, family=family)
    for tree in catalog.state.values():
        list(walk(tree))
    verify(catalog, store, deep=True)

def convert(folder, family, there):
    ucp.convert(folder, there, family=family)

def use(folder, family, there):
    told = []
    for action in (read, convert):
        try:
            action(folder, family, there)
            told.append(None)
        except UcpError as error:
            told.append(type(error).__name__)
    return told

results = {}
for name, sound, poisoned in jobs:
    family = name if name == "deepspeed-universal" else name.partition("-")[0]
    first = use(sound, family, f"{out}/sound/{name}")
    on = True
    second = use(poisoned, family, f"{out}/poisoned/{name}")
    on = False
    results[name] = [first, second, seen[:5]]
    seen.clear()
print(json.dumps(results))
"""


def attack(call: bytes) -> bytes:
    """Opcodes that call something when they are run by pickle, and leave the stack as it was."""
    return call + b"0"


SENTINEL = "poisoned-sentinel"
MODULE = f"open({SENTINEL!r}, 'w').close()\nclass Thing: pass\ndef run(): pass\n"


def text(value: str) -> bytes:
    """Opcodes that push a text."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


ATTACKS = {
    "os.system": b"cos\nsystem\n" + text(f"touch {SENTINEL}") + b"\x85R",
    "exec": b"cbuiltins\nexec\n" + text(f"open({SENTINEL!r}, 'w').close()") + b"\x85R",
    "module of the attacker": b"cpoisoned_module\nrun\n)R",
    "class of the attacker": b"cpoisoned_module\nThing\n)\x81}" + text("a") + b"K\x01sb",
}


def poison(folder: Path, opcodes: bytes) -> int:
    """Put an attack into every pickle of a checkpoint; how many there were."""
    found = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if data.startswith(b"PK\x03\x04") and path.suffix in (".pt", ".bin"):
            inner = pickle_of(data)
            path.write_bytes(with_pickle(data, inner[:2] + attack(opcodes) + inner[2:]))
            found += 1
        elif path.name == ".metadata":
            path.write_bytes(data[:2] + attack(opcodes) + data[2:])
            found += 1
    return found


def watched(jobs: list[tuple[str, str, str]], folder: Path) -> dict[str, list]:
    """What a fresh process did, with a module beside that would show if it was imported."""
    (folder / "poisoned_module.py").write_text(MODULE)
    command = [sys.executable, "-c", WATCHED, json.dumps(jobs), str(folder / "out")]
    environment = _environment(folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (folder / SENTINEL).exists()
    found: dict[str, list] = json.loads(done.stdout)
    return found


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


VICTIM = """
import json, os, pickle, sys

found = []
for path in sys.argv[2:]:
    sys.modules.pop("poisoned_module", None)
    with open(path, "rb") as file:
        pickle.load(file)
    found.append(os.path.exists(sys.argv[1]))
    os.unlink(sys.argv[1])
print(json.dumps(found))
"""

SELDOM = {name: [pytest.mark.slow] for name in ("exec", "module of the attacker")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SELDOM.get(name, ())) for name in ATTACKS])
def test_nothing_is_run(name: str, tmp_path: Path) -> None:
    jobs, pickles = [], {}
    for family in FAMILIES:
        poisoned = tmp_path / "poisoned" / family
        poisoned.parent.mkdir(exist_ok=True)
        shutil.copytree(BASES / family, poisoned)
        pickles[family] = poison(poisoned, ATTACKS[name])
        jobs.append((family, str(BASES / family), str(poisoned)))
    for family, (first, second, seen) in watched(jobs, tmp_path).items():
        assert first == [None, None], family
        assert seen == [], family
        if pickles[family] and name in ("os.system", "exec"):
            # What ByteCheckpoint wrote is told by the first class that its pickle names, so that this is another's.
            assert second == [NotFoundError.__name__ if family == "bytecheckpoint" else UnsafeError.__name__] * 2, (
                family
            )
    assert {family for family in FAMILIES if not pickles[family]} == {"hf", "native", "universal"}


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """What the pickles ask for does happen where pickle itself runs them."""
    source = copied("dcp", tmp_path)
    (tmp_path / "poisoned_module.py").write_text(MODULE)
    honest = (source / ".metadata").read_bytes()
    (tmp_path / "attacks").mkdir()
    for number, opcodes in enumerate(ATTACKS.values()):
        (tmp_path / "attacks" / str(number)).write_bytes(honest[:2] + attack(opcodes) + honest[2:])
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, SENTINEL, *map(str, sorted((tmp_path / "attacks").iterdir()))],
        cwd=tmp_path,
        env=_environment(tmp_path),
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == [True] * len(ATTACKS)
