"""Breaking real checkpoints, and what must hold whenever one is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from ucp.checkpoint import open_checkpoint
from ucp.errors import NotFoundError, UcpError
from ucp.run.convert import convert

ROOT = Path(__file__).parents[2]
RECORD = "ucp-conversion.json"


def ucp(*arguments: object, exit_code: int = 0, program: str | None = None, **options: Any) -> str:
    """Run the real command, or `program` in its place; its stderr."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UCP_")}
    command = [sys.executable, *(["-c", program] if program else ["-m", "ucp"]), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**environment, "PYTHONWARNINGS": "error"},
        **options,
    )
    assert done.returncode == exit_code, (arguments, done.stdout, done.stderr)
    return done.stderr


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by path; folders too, with none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a converted checkpoint; the record of the conversion names its own paths and is left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def no_checkpoint(folder: Path) -> None:
    """Whatever is at `folder`, nothing takes it for a checkpoint."""
    with pytest.raises(NotFoundError):
        open_checkpoint(str(folder))


def refused(
    source: Path, kind: type[UcpError], *names: str, folder: Path, opens: bool = False, command: bool = True
) -> UcpError:
    """Opening `source` fails, or, where it `opens`, converting it; in Python and on the command line.

    The error is of `kind`, has its exit code and a remedy, and tells all of `names`; the source is not touched, and
    nothing at the destination is a checkpoint.
    """
    before, destination = digests(source), folder / "refused"
    with pytest.raises(kind) as caught:
        convert_opened(source, destination) if opens else open_checkpoint(str(source))
    assert caught.type is kind, caught.value
    said = [caught.value.message]
    assert caught.value.hint, "an error says what to do"
    if command:
        arguments = ["convert", source, folder / "refused by command"] if opens else ["info", source]
        said.append(ucp(*arguments, exit_code=kind.exit_code))
    for text in said:
        assert all(name in text for name in names), (names, text)
    if not opens:
        with pytest.raises(kind):
            convert(str(source), str(destination))
    assert digests(source) == before
    for there in (destination, folder / "refused by command"):
        no_checkpoint(there)
    return caught.value


def convert_opened(source: Path, destination: Path) -> None:
    """Convert a checkpoint that can be opened."""
    try:
        open_checkpoint(str(source)).close()
    except UcpError as error:
        raise AssertionError("cannot even be opened") from error
    convert(str(source), str(destination))


def found_by_verify(source: Path) -> list[dict[str, Any]]:
    """Findings of ``ucp verify --deep``, which must have some."""
    command = [sys.executable, "-m", "ucp", "verify", str(source), "--deep", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 6, done.stdout + done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    assert findings
    return findings


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit over."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def repair(path: Path) -> None:
    """Make the CRC-32 of every record what its bytes give: damage that no checksum shows."""
    data = bytearray(path.read_bytes())
    for entry, start in records(path):
        at = data.rindex(b"PK\x01\x02", 0, data.rindex(entry.filename.encode()))
        data[at + 16 : at + 20] = zlib.crc32(data[start : start + entry.file_size]).to_bytes(4, "little")
    path.write_bytes(data)


def records(path: Path) -> list[tuple[zipfile.ZipInfo, int]]:
    """Every record of a torch file, with the byte at which its data starts."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
    starts = [info.header_offset + 30 + _lengths(data, info.header_offset) for info in found]
    return list(zip(found, starts, strict=True))


def _lengths(data: bytes, header: int) -> int:
    return int.from_bytes(data[header + 26 : header + 28], "little") + int.from_bytes(
        data[header + 28 : header + 30], "little"
    )


def storages(path: Path) -> list[tuple[int, int]]:
    """(first byte, bytes) of every storage that is not empty."""
    return [(start, info.file_size) for info, start in records(path) if "/data/" in info.filename and info.file_size]


def with_pickle(path: Path, data: bytes) -> None:
    """Replace the pickle of a torch file and nothing else."""
    with zipfile.ZipFile(path) as archive:
        held = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in held:
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


def pickle_of(path: Path) -> bytes:
    """The pickle in a torch file."""
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


class Exploit:
    """Unpickled by anything that runs pickles, makes the file `sentinel`."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.sentinel}'",))


def poisoned(data: bytes, sentinel: Path) -> bytes:
    """The pickle `data`, with an attack run before anything else in it; what it gives is the same."""
    attack = pickle.dumps(Exploit(sentinel), protocol=2)[2:-1]
    return data[:2] + attack + b"0" + data[2:]
