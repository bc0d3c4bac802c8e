"""DCP checkpoints, ours against stock torch: loads in another layout, and Hugging Face folders made of them.

    python -m bench.dcp [--layers 2] [--rounds 3] [--folder DIR] [--json FILE]

Four gloo ranks save a Llama with AdamW under FSDP2. Two ranks load it whole, eight load every matrix by columns; then
it is made a Hugging Face folder. Everything is in the page cache; what was loaded and written is compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ucp
from bench.make import CACHE, REPOSITORY
from bench.measure import Measurement, measure, warm
from bench.report import file_system, load, machine, spread, table

_MB, _MIB = 1e6, 2**20
SAVERS = 4
LOADS = {"fsdp": (2, "FSDP2 on 2 ranks, model and optimizer"), "columns": (8, "columns on 8 ranks, model")}

Ranks = list[dict[str, Any]]
"""What each rank says of its load; see `bench.resume_ranks.Loaded`."""


def made(folder: Path, layers: int) -> Path:
    """The folder with the checkpoint and the model's configuration, made if it is missing."""
    home = folder / f"dcp-{layers}l-dp{SAVERS}"
    if not home.exists():
        partial = home.with_name(home.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _job(what="save", root=str(partial), layers=layers, ranks=SAVERS)
        partial.replace(home)
    return home


def loads(home: Path, layers: int, what: str, *, rounds: int) -> dict[str, list[Ranks]]:
    """Load with both, in turn, `rounds` times; then compare what they load."""
    ranks, _ = LOADS[what]
    request = {"what": what, "root": str(home / "dcp"), "layers": layers, "ranks": ranks}
    runs: dict[str, list[Ranks]] = {"stock": [], "ucp": []}
    for number in range(rounds):
        for how, found in runs.items():
            warm(sorted((home / "dcp").glob("*.distcp")))
            found.append(_job(**request, how=how))
            print(f"{what} round {number + 1}: {how} {_wall(found[-1]):.2f} s", file=sys.stderr, flush=True)
    stock, ours = ([rank["held"] for rank in _job(**request, how=how, check=True)] for how in runs)
    assert stock == ours, "the two loaded different numbers"
    assert stock[0], "nothing was compared"
    return runs


def _job(**request: Any) -> Ranks:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        command = [sys.executable, "-m", "bench.dcp_jobs", file.name]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{request}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else []


def _wall(ranks: Ranks) -> float:
    return max(float(rank["wall"]) for rank in ranks)


def foldings(home: Path, layers: int, room: Path, *, rounds: int) -> dict[str, list[Measurement]]:
    """Make Hugging Face folders with both, in turn; compare them."""
    python, source = [sys.executable, "-m"], str(home / "dcp")
    hf = ["--to", "hf", "--no-progress", "-t", f"config={home / 'config.json'}"]
    stock, ours = room / "stock", room / "ucp"
    commands = {
        "dcp.load + save_pretrained": (stock, [*python, "bench.dcp_to_hf", source, str(stock), str(layers)]),
        "ucp convert": (ours, [*python, "ucp", "convert", source, str(ours), *hf]),
    }
    runs: dict[str, list[Measurement]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, (output, command) in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            warm(sorted((home / "dcp").glob("*.distcp")))
            runs[name].append(measure(command, output=output))
            print(f"round {number + 1}: {name} {runs[name][-1].wall:.2f} s", file=sys.stderr, flush=True)
    _compare(stock, ours)
    return runs


def _compare(one: Path, other: Path) -> None:
    from safetensors import safe_open

    first, second = (sorted(folder.glob("*.safetensors")) for folder in (one, other))
    handles: Any = [[safe_open(path, "pt") for path in files] for files in (first, second)]
    held = [{name: handle for handle in group for name in handle.keys()} for group in handles]  # noqa: SIM118
    assert held[0].keys() == held[1].keys(), "different tensors"
    for name in held[0]:
        a, b = held[0][name].get_tensor(name), held[1][name].get_tensor(name)
        assert a.dtype == b.dtype, f"{name} differs"
        assert a.equal(b), f"{name} differs"


def load_page(runs: Mapping[str, list[Ranks]], what: str, needed: int) -> str:
    """Markdown of one way of loading."""
    rows = [
        [
            {"stock": "dcp.load", "ucp": "ucp.load"}[how],
            spread([_wall(ranks) for ranks in rounds]),
            f"{_ratio([_wall(r) for r in rounds], [_wall(r) for r in runs['stock']]):.2f}",
            spread([sum(rank["cpu"] for rank in ranks) for ranks in rounds]),
            f"{max(sum(rank['read'] for rank in ranks) for ranks in rounds) / _MB:,.0f}",
            f"{max(sum(rank['read'] for rank in ranks) for ranks in rounds) / needed:.2f}",
            f"{max(rank['peak'] for ranks in rounds for rank in ranks) / _MIB:,.0f}",
        ]
        for how, rounds in runs.items()
    ]
    head = ["load", "wall s", "x stock", "CPU s, all ranks", "read MB, all ranks", "x needed", "peak MiB"]
    return f"### Loaded as {LOADS[what][1]}\n\n{table(head, rows)}"


def folding_page(runs: Mapping[str, list[Measurement]], base: Measurement, needed: int) -> str:
    """Markdown of one way of making a Hugging Face folder."""
    stock, *_ = runs.values()
    rows = [
        [
            name,
            spread([run.wall for run in found]),
            f"{_ratio([run.wall for run in found], [run.wall for run in stock]):.2f}",
            spread([run.cpu for run in found]),
            f"{max(run.read for run in found) / _MB:,.0f}",
            f"{max(run.read for run in found) / needed:.2f}",
            f"{max(run.written for run in found) / _MB:,.0f}",
            f"{(max(run.peak for run in found) - base.peak) / _MIB:,.0f}",
        ]
        for name, found in runs.items()
    ]
    head = ["command", "wall s", "x stock", "CPU s", "read MB", "x needed", "written MB", "peak MiB"]
    return f"### A Hugging Face folder of it\n\n{table(head, rows)}"


def _ratio(ours: Sequence[float], stock: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, stock, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure DCP checkpoints side by side with stock torch.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    given = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    folder = given.folder.absolute()
    home, room = made(folder, given.layers), folder / "room-dcp"
    weights = sum(tensor.states["value"].nbytes for tensor in ucp.open(str(home / "dcp")).catalog.tensors.values())
    print(
        f"{machine()}, {file_system(folder)}; {load():.1f} other processes running; weights {weights / _MB:,.0f} MB\n"
    )
    document: dict[str, Any] = {"machine": machine(), "layers": given.layers}
    for what in LOADS:
        runs = loads(home, given.layers, what, rounds=given.rounds)
        print(load_page(runs, what, 3 * weights if what == "fsdp" else weights) + "\n", flush=True)
        document[what] = runs
    base = measure([sys.executable, "-c", "pass"], output=room / "nothing")
    folded = foldings(home, given.layers, room, rounds=given.rounds)
    print(folding_page(folded, base, weights) + "\n", flush=True)
    document["folded"] = {name: [asdict(run) for run in found] for name, found in folded.items()}
    shutil.rmtree(room, ignore_errors=True)
    if given.json:
        given.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
