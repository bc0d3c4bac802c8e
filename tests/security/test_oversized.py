"""What is claimed to be huge is refused before there is room made for it, in a process that could not give it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.zips import with_pickle
from tests.real.hostile import ROOT
from tests.security.folders import copied, edit_json
from tests.security.test_refused import header, signed
from ucp.errors import CorruptError
from ucp.store import open_store

LIMITED = """
import resource, sys
import ucp
from ucp.errors import UcpError

held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (600 << 20),) * 2)
try:
    with ucp.open(sys.argv[1]) as checkpoint:
        for name in checkpoint:
            checkpoint[name]
    ucp.convert(sys.argv[1], sys.argv[2])
except UcpError as error:
    print(type(error).__name__)
else:
    print("read")
"""


def in_little_memory(source: Path) -> str:
    """What opening and converting gives in 600 MiB, with the imports that are needed."""
    command = [sys.executable, "-c", LIMITED, str(source), str(source.parent / "new")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def expanded(count: int) -> bytes:
    """A pickle of a tensor of so many elements that repeats four bytes of storage 0, and of much besides."""
    number = count.to_bytes(8, "little")
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00\x8a\x08" + number + b"\x85K\x00\x85\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


HOSTILE = {
    "a tensor that repeats": lambda source: (source / "checkpoint.pt").write_bytes(
        with_pickle((source / "checkpoint.pt").read_bytes(), expanded(1 << 50))
    ),
    "a pickle that unfolds": lambda source: (source / "checkpoint.pt").write_bytes(
        with_pickle((source / "checkpoint.pt").read_bytes(), b"\x80\x02N" + b"2\x86" * 60 + b".")
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_torch_files(name: str, tmp_path: Path) -> None:
    source = copied("torch", tmp_path)
    HOSTILE[name](source)
    assert in_little_memory(source) == CorruptError.__name__


def test_manifests(tmp_path: Path) -> None:
    source = copied("universal", tmp_path)
    signed(source, lambda m: m["tensors"][0]["arrays"][0].update(shape=[1 << 40, 1 << 20]))
    assert in_little_memory(source) == CorruptError.__name__


def test_headers(tmp_path: Path) -> None:
    source = copied("hf", tmp_path)
    header(source / "model-00001-of-00003.safetensors", lambda d: next(iter(d.values())).update(shape=[1 << 58]))
    assert in_little_memory(source) == CorruptError.__name__


def test_a_blob_named_many_times(tmp_path: Path) -> None:
    """Of the universal form: half a megabyte of text that names one blob ten thousand times."""
    from crc32c import crc32c

    source = copied("universal", tmp_path)
    edit_json(source / "state.json", lambda d: d["state"].update(many=[{"$bytes": {"blob": "0"}}] * 10_000))
    data = (source / "state.json").read_bytes()
    row = {"path": "state.json", "size": len(data), "crc32c": crc32c(data)}
    signed(source, lambda m: m.update(files=[row if f["path"] == "state.json" else f for f in m["files"]]))
    assert in_little_memory(source) == "read"


@pytest.mark.parametrize("length", [-1, 1 << 62, 1 << 70])
def test_lengths_that_a_server_makes_up(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(CorruptError, match="no room for"):
        open_store(str(tmp_path)).read("x", 0, length)


def test_a_sound_checkpoint_is_read_within_the_limit(tmp_path: Path) -> None:
    assert in_little_memory(copied("universal", tmp_path)) == "read"
