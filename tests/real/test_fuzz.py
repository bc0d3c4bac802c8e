"""Mutated real files through the reader: a typed error or a right answer, in little time and memory, never else."""

from __future__ import annotations

import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.hostile import records, repair
from tests.support.case import Case
from tests.support.cases import CASES
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import UcpError
from ucp.store import open_store

SOURCES = [CASES[name] for name in ("z1_bf16_dp4", "z3_bf16_dp2", "z0_fp32_dp2", "pp2_z1_bf16_dp2")]
SECONDS, MEBIBYTES = 5.0, 300
INTERESTING = b"\x00\x01\x7f\x80\xff().]}Ntubrsh\x85\x86\x87\x94R"


def change(data: bytearray, start: int, stop: int, rng: random.Random) -> None:
    """One to three bytes of [start, stop) flipped, set, or copied from elsewhere in it."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(start, stop)
        how = rng.randrange(3)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.choice(INTERESTING)
        else:
            length = min(rng.randint(1, 12), stop - at)
            other = rng.randrange(start, stop - length + 1)
            data[at : at + length] = data[other : other + length]


def of_pickle(path: Path, rng: random.Random) -> None:
    """Damage to the pickle that no checksum shows."""
    start, size = next((at, info.file_size) for info, at in records(path) if info.filename.endswith("data.pkl"))
    data = bytearray(path.read_bytes())
    change(data, start, start + size, rng)
    path.write_bytes(data)
    repair(path)


def of_directory(path: Path, rng: random.Random) -> None:
    """Damage to the zip's own directory."""
    data = bytearray(path.read_bytes())
    change(data, data.index(b"PK\x01\x02"), len(data), rng)
    path.write_bytes(data)


def anywhere(path: Path, rng: random.Random) -> None:
    """Damage to any byte, or a cut."""
    data = bytearray(path.read_bytes())
    change(data, 0, len(data), rng)
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


MUTATIONS: list[Callable[[Path, random.Random], None]] = [of_pickle, of_pickle, of_directory, anywhere]


def mutate_and_read(root: Path, rounds: int, seed: int) -> tuple[int, int]:
    """(typed errors, catalogs) of `rounds` mutations, one file at a time."""
    rng, store = random.Random(seed), open_store(str(root))
    paths = sorted(root.glob("*/*.pt"))
    errors = read = 0
    for number in range(rounds):
        path = rng.choice(paths)
        honest = path.read_bytes()
        rng.choice(MUTATIONS)(path, rng)
        start = time.process_time()
        try:
            catalog = CONVERTER.read(store)
            for name, tensor in catalog.tensors.items():
                for state in tensor.states:
                    catalog.cover(name, state)
            read += 1
        except UcpError:
            errors += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed} in {path.name}: {error!r}") from error
        assert time.process_time() - start < SECONDS, f"mutation {number} of seed {seed} in {path.name}"
        path.write_bytes(honest)
    return errors, read


def check(folder: Path, tmp_path: Path, rounds: int, seed: int) -> None:
    root = Path(shutil.copytree(folder / "ckpt", tmp_path / "source"))
    assert all(zipfile.is_zipfile(path) for path in root.glob("*/*.pt"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors, _ = mutate_and_read(root, rounds, seed)
    assert errors > rounds // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES << 10


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_mutated_files(deepspeed_case, tmp_path: Path, case: Case) -> None:
    check(deepspeed_case(case), tmp_path, 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_thousands_of_mutated_files(deepspeed_case, tmp_path: Path, case: Case, seed: int) -> None:
    check(deepspeed_case(case), tmp_path, 700, seed)
