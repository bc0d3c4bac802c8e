"""The commands that are set side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.make import Made
from bench.measure import Measurement, measure

COPY, COPY_SYNC, STOCK, UCP, UNCHECKED = "cp -r", "cp -r + fsync", "ds_to_universal.py", "ucp convert", "ucp --no-check"
STOCK_WORKERS = ((4, 2), (2, 2), (2, 1), (1, 1))
"""Extracting and merging processes of `ds_to_universal.py`: its defaults first."""


@dataclass(slots=True)
class Contender:
    """A command and its measurements, one per round; `startup` does what the command does before its work begins."""

    name: str
    command: list[str]
    output: Path
    startup: list[str]
    runs: list[Measurement] = field(default_factory=list)

    def run(self) -> Measurement:
        """Run the command once, count it, and give the measurement."""
        self.runs.append(measure(self.command, output=self.output))
        return self.runs[-1]

    @property
    def walls(self) -> list[float]:
        """Wall seconds of each round."""
        return [run.wall for run in self.runs]


def copies(made: Made, room: Path) -> list[Contender]:
    """Plain copies of the same files, without and with fsync of each copied file."""
    output = room / "copy"
    copy = ["cp", "-r", str(made.tag), str(output)]
    script = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    durable = ["sh", "-c", script, "copy", str(made.tag), str(output)]
    nothing = ["cp", "--version"]
    return [Contender(COPY, copy, output, nothing), Contender(COPY_SYNC, durable, output, nothing)]


def stock(made: Made, room: Path, workers: tuple[int, int]) -> Contender:
    """DeepSpeed's own converter with so many extracting and merging processes."""
    output = room / "stock"
    module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(made.tag), "--output_folder", str(output / "universal")]
    extract, merge = map(str, workers)
    command = [*module, *folders, "--num_extract_workers", extract, "--num_merge_workers", merge]
    return Contender(f"{STOCK} {extract}/{merge}", command, output, [*module, "--help"])


def ucp(made: Made, room: Path, *, check: bool) -> Contender:
    """Our converter with its defaults, or without the comparison of low-precision weights and replicas."""
    output = room / ("ucp" if check else "ucp-unchecked")
    words = ["convert", str(made.root), str(output), "--json", "--no-progress"]
    program = [sys.executable, "-m", "ucp"]
    command = [*program, *words, *([] if check else ["--no-check"])]
    imports = "import ucp.cli.convert, ucp.run.convert, ucp.converters.deepspeed, ucp.format.universal"
    return Contender(UCP if check else UNCHECKED, command, output, [sys.executable, "-c", imports])


def reported(run: Measurement) -> dict[str, int]:
    """The bytes that `ucp convert --json` says it read, read to check, and wrote."""
    said = json.loads(run.stdout)
    return {name: int(said[name]) for name in ("bytes_read", "bytes_checked", "bytes_written")}
