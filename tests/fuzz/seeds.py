"""Make the folders and first inputs anew from what real frameworks write: ``python -m tests.fuzz.seeds``.

Inputs that fuzzing added are left; so are those that found something.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.target import BASES, CORPUS
from tests.fuzz.targets.folders import SLOTS, base
from tests.fuzz.zips import pickle_of
from tests.support.deepspeed_job import job_environment
from ucp.lang import load_program, shipped, to_json
from ucp.plan import Digests
from ucp.run.crc import crc
from ucp.run.destination import Record
from ucp.run.integrity import Piece
from ucp.run.journal import Done

_FOLDERS = {
    **{
        name: name
        for name in (
            "bytecheckpoint",
            "dcp",
            "deepspeed-0",
            "deepspeed-1",
            "deepspeed-3",
            "deepspeed-universal",
            "hf",
            "native",
        )
    },
    "torch": "torch",
    "universal": "universal",
    **{
        name: f"megatron/tiny_one_bf16_distributed/{form}/iter_0000003"
        for name, form in (
            ("megatron-fully", "fully_reshardable"),
            ("megatron-dp", "dp_reshardable"),
            ("megatron-legacy", "legacy"),
        )
    },
}
_PROGRAMS = ("hf_gpt2", "hf_mixtral", "megatron_core_moe", "megatron_legacy")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="seeds-") as folder:
        made = Path(sys.argv[1] if sys.argv[1:] else folder)
        if not sys.argv[1:]:
            subprocess.run([sys.executable, "-m", "tests.fuzz.seed_jobs", str(made)], env=job_environment(), check=True)
        for name, where in _FOLDERS.items():
            shutil.rmtree(BASES / name, ignore_errors=True)
            shutil.copytree(
                made / where, BASES / name, ignore=shutil.ignore_patterns("zero_to_*", "legacy.pt", "ucp-conv*")
            )
            _forget(BASES / name, str(made))
        base.cache_clear()
        legacy = (made / "torch" / "legacy.pt").read_bytes()
    for name, number, data in (*_containers(legacy), *_forms(), *_records(), *_language(), *_slots()):
        path = CORPUS / name / f"seed-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _forget(folder: Path, made: str) -> None:
    """Frameworks note where they saved: a path of as many characters that is nobody's, so that lengths stay right."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(made.encode(), b"/" + b"x" * (len(made.encode()) - 1)))


Seeds = Iterator[tuple[str, int, bytes]]


def _containers(legacy: bytes) -> Seeds:
    whole = base("torch")["checkpoint.pt"]
    yield "torch-zip", 0, whole
    yield "torch-legacy", 0, legacy
    yield "pickle", 0, pickle_of(whole)
    value = {
        "a": [1, -1, 1 << 40, 2.5, ("x", b"y", None, True)],
        "s": {1, 2},
        "f": frozenset("a"),
        "l": 1 << 90,
        "é": "ü",
    }
    for protocol in range(6):
        yield "pickle", 1 + protocol, pickle.dumps(value, protocol)
    for number, (path, data) in enumerate(base("hf").items()):
        if path.endswith(".safetensors"):
            yield "safetensors", number, data


def _forms() -> Seeds:
    yield "universal", 0, base("universal")["zarr.json"]
    yield "universal-state", 0, base("universal")["state.json"]
    yield "universal-digests", 0, base("universal")["digests.bin"]
    yield "native", 0, base("native")["ucp.json"]


def _records() -> Seeds:
    done = Done("tensors/a/c/0", Digests((1, 2), (3,)), (Piece(0, 1, 2, 3),))
    yield "claim", 0, b'{"version": 2, "fingerprint": "plan", "generation": "0123456789ab"}'
    yield "journal-lines", 0, "\n".join([done.line().partition(" ")[2]] * 2).encode()
    yield "conversion-record", 0, Record("plan", "s", "universal", "", crc("crc32c", b"x")).encoded()
    yield "step-record", 0, b'{"format":"step","version":1,"step":1,"metrics":{"loss":0.5,"x":"nan"},"aside":false}'


def _language() -> Seeds:
    for number, name in enumerate(_PROGRAMS):
        yield "language", number, shipped()[name].read_bytes()
        yield "language-json", number, json.dumps(to_json(load_program(name))).encode()
    tour = b"format 1\nmesh tp dp\nsize h n=2\nflag tied\na.{n} [h|tp, h] <-> b.{n} [h, h]\nin layer {\n}\n"
    yield "language", len(_PROGRAMS), tour


def _slots() -> Seeds:
    for slot in SLOTS:
        yield slot.name, 0, slot.seed


if __name__ == "__main__":
    main()
