"""Hugging Face folders, side by side: what transformers, torch and Megatron-Core do in memory, and `ucp convert`.

    python -m bench.hf [--millions 240] [--rounds 5] [--races reshard,consolidate,megatron] [--folder DIR] [--json FILE]

Three races, each from a warm page cache, the commands in turn: other sizes of files (transformers loads and saves); one
file out of what four ranks saved (torch's `consolidate_safetensors_files`); and a Megatron-Core checkpoint (tensors
loaded, renamed and joined in memory, saved by `dist_checkpointing`). At the end the results are compared bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ucp
from bench.contenders import Contender, reported
from bench.make import CACHE, REPOSITORY
from bench.measure import measure, warm
from bench.report import file_system, machine, spread, table

RANKS = 4
_MB, _MIB = 1e6, 2**20
_SIZE = "100MB"
_SLACK = 64 << 20


@dataclass(frozen=True, slots=True)
class Race:
    """What is measured: a source, what others do and what we do with it."""

    name: str
    source: Path
    stock: Contender
    ours: Contender

    @property
    def nbytes(self) -> int:
        """Bytes of the source's weights."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """The source's weights."""
        return sorted(self.source.glob("*.safetensors"))


def main() -> None:
    given = _arguments()
    folder = given.folder.absolute()
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    room = folder / "room-hf"
    shutil.rmtree(room, ignore_errors=True)
    print(f"{machine()}, {file_system(folder)}\n")
    model, shards = sources(folder, given.millions)
    base = measure([sys.executable, "-c", "pass"], output=room / "nothing").peak
    races = [race for race in _races(model, shards, room) if race.name in given.races]
    for race in races:
        run(race, rounds=given.rounds)
        print(page(race, base), flush=True)
    shutil.rmtree(room)
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "races": [_document(race) for race in races]}, indent=1)
        )


def sources(folder: Path, millions: float) -> tuple[Path, Path]:
    """The model and what ranks saved of it, made in the cache `folder` if they are missing."""
    model, shards = folder / f"llama-{millions:g}m", folder / f"llama-{millions:g}m-dp{RANKS}"
    for path, words in ((model, ["model", model, millions]), (shards, ["shards", model, shards, RANKS])):
        if not path.exists():
            subprocess.run(_job(*words), check=True, cwd=REPOSITORY)
    return model, shards


def run(race: Race, *, rounds: int) -> None:
    """Measure both, `rounds` times, in turn, and compare what they wrote."""
    for number in range(rounds):
        for contender in (race.stock, race.ours):
            shutil.rmtree(contender.output, ignore_errors=True)
            contender.output.parent.mkdir(parents=True, exist_ok=True)
            warm(race.files)
            contender.run()
            print(f"{race.name} round {number + 1}: {contender.name} {contender.walls[-1]:.2f} s", flush=True)
    for measured in race.ours.runs:
        said = reported(measured)
        counted = said["bytes_read"] + said["bytes_checked"]
        assert 0 <= measured.read - counted < _SLACK, f"read {measured.read}, but says {counted}"
    _compare(race)
    for contender in (race.stock, race.ours):
        shutil.rmtree(contender.output)


def page(race: Race, base: int) -> str:
    """The outcome of one race as Markdown."""
    rows = [
        [
            contender.name,
            spread(contender.walls),
            spread([run.cpu for run in contender.runs]),
            f"{max(run.read for run in contender.runs) / _MB:,.0f}",
            f"{max(run.written for run in contender.runs) / _MB:,.0f}",
            f"{max(max(run.peak for run in contender.runs) - base, 0) / _MIB:,.0f}",
        ]
        for contender in (race.stock, race.ours)
    ]
    ratio = statistics.median(a / b for a, b in zip(race.ours.walls, race.stock.walls, strict=True))
    over = max(reported(run)["bytes_read"] for run in race.ours.runs) / race.nbytes
    told = f"Wall / stock: {ratio:.3f}. Bytes read / those needed: {over:.3f}. Results are equal, bit for bit."
    head = ["command", "wall s", "CPU s", "read MB", "written MB", "peak MiB"]
    return (
        f"\n### {race.name}: {race.nbytes / _MB:,.0f} MB in {len(race.files)} files\n\n{table(head, rows)}\n\n{told}\n"
    )


def _races(model: Path, shards: Path, room: Path) -> list[Race]:
    stock, ours = room / "stock", room / "ours"
    config = f"config={model / 'config.json'}"
    return [
        Race(
            "reshard",
            model,
            _contender("transformers", _job("reshard", model, stock, _SIZE), stock),
            _contender("ucp convert", _convert(model, ours, "hf", "-t", f"shard_bytes={_SIZE}"), ours),
        ),
        Race(
            "consolidate",
            shards,
            _contender("torch consolidate", _job("consolidate", shards, stock), stock),
            _contender("ucp convert", _convert(shards, ours, "hf", "-t", config, "-o", f"ranks={RANKS}"), ours),
        ),
        Race(
            "megatron",
            model,
            _contender("in memory, dist_checkpointing", _job("megatron", model, stock), stock),
            _contender("ucp convert", _convert(model, ours, "megatron", "--mesh", "tp=1,pp=1"), ours),
        ),
    ]


def _contender(name: str, command: list[str], output: Path) -> Contender:
    return Contender(name, command, output, [])


def _job(*words: object) -> list[str]:
    return [sys.executable, "-m", "bench.hf_jobs", *map(str, words)]


def _convert(source: Path, output: Path, to: str, *words: str) -> list[str]:
    base = [sys.executable, "-m", "ucp", "convert", str(source), str(output), "--to", to]
    return [*base, *words, "--json", "--no-progress"]


def _compare(race: Race) -> None:
    """AssertionError unless both results have the same tensors; Megatron's as they are stored."""
    if race.name == "megatron":
        options: dict[str, Any] = {"family": "megatron", "names": "stored"}
        (inside,) = [path.parent for path in race.ours.output.rglob("metadata.json")]
        found, wanted = ucp.open(str(inside), **options), ucp.open(str(race.stock.output), **options)
    else:
        found, wanted = ucp.open(str(race.ours.output)), ucp.open(str(race.stock.output))
    assert sorted(found) == sorted(wanted), f"other names: {sorted(set(found) ^ set(wanted))[:5]}"
    for name in wanted:
        assert _same(found[name]["value"][...], wanted[name]["value"][...]), f"{name} differs"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; a vocabulary may be padded with zeros in one of the two."""
    rows = min(len(a), len(b))
    return torch.equal(a[:rows].view(torch.int32), b[:rows].view(torch.int32)) and not (
        a[rows:].any() or b[rows:].any()
    )


def _document(race: Race) -> dict[str, Any]:
    contenders: Sequence[Contender] = (race.stock, race.ours)
    runs = {
        c.name: [{k: v for k, v in dataclasses.asdict(r).items() if k != "stdout"} for r in c.runs] for c in contenders
    }
    return {"name": race.name, "nbytes": race.nbytes, "runs": runs}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure conversions of Hugging Face folders side by side.")
    parser.add_argument("--millions", type=float, default=240, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--races", type=lambda text: text.split(","), default=["reshard", "consolidate", "megatron"])
    parser.add_argument("--folder", type=Path, default=CACHE, help="where models are kept and results are written")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
