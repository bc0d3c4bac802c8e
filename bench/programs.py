"""Time and memory to check and bind programs to very large jobs, from names, shapes and coordinates alone.

    python -m bench.programs [--only dense|moe] [--dp N] [--profile] [--json FILE]

Each job runs in a process of its own, on one thread. Making the list of shards, which is a reader's work, is not timed;
its memory counts. The target is judged by CPU seconds, which are wall seconds on a machine that does nothing else.
`--profile` prints what takes the time, too.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import math
import pstats
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.programs_jobs import Job, dense, moe
from bench.report import table

SECONDS, MEBIBYTES = 5.0, 1024
"""The targets: check, bind and compile together, and the largest resident set, export included."""

JOBS: dict[str, Callable[..., Job]] = {"dense": dense, "moe": moe}
TITLES = {"dense": "405B dense, TP 8, PP 16, VPP 4", "moe": "671B experts, EP 64, PP 16"}
DP = {"dense": (1, 64), "moe": (1, 2)}
"""Replicas of everything that are tried; 1 stands for files, which hold one copy of each."""

Result = dict[str, float | int | str]


def main() -> None:
    """Run the jobs that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument("--only", choices=JOBS)
    parser.add_argument("--dp", type=int, help="replicas; both usual numbers unless given")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    chosen = [
        (name, dp) for name in JOBS for dp in ((asked.dp,) if asked.dp else DP[name]) if asked.only in (None, name)
    ]
    if asked.here:
        ((name, dp),) = chosen
        print(json.dumps(run(name, dp=dp, profile=asked.profile)))
        return
    results = [_apart(name, dp=dp, profile=asked.profile) for name, dp in chosen]
    print(report(results))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))


def run(name: str, *, dp: int, profile: bool = False) -> Result:
    """Measure one job in this process."""
    from ucp.lang.bind import bind
    from ucp.lang.export import export

    before = _resident()
    job = JOBS[name](dp=dp)
    made = _resident()
    with _profiled(on=profile):
        began, began_cpu = time.perf_counter(), time.process_time()
        bound = bind(job.program, job.held, mesh=job.mesh, config=job.config, flags=job.flags)
        bind_s, bind_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    _verify("elements", sum(math.prod(tensor.shape) for tensor in bound.tensors.values()), job.parameters)
    blocks = sum(len(pieces) for pieces in bound.pieces.values())
    peak = _resident()
    logical = {name: tensor.shape for (name, _), tensor in bound.tensors.items()}
    sizes, flags, cuts, tensors = bound.sizes, bound.flags, bound.setting.cuts, len(bound.tensors)
    del bound
    with _profiled(on=profile):
        began, began_cpu = time.perf_counter(), time.process_time()
        exporter = export(job.program, logical, mesh=job.mesh, sizes=sizes, flags=flags, cuts=cuts)
        shards = cut = 0
        for shard in exporter.shards(job.mesh.coordinates()):
            shards += 1
            cut += len(shard.blocks)
        export_s, export_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    _verify("shards", shards, len(job.held))
    _verify("blocks", cut, blocks)
    return {
        "job": name,
        "dp": dp,
        "coordinates": job.mesh.size,
        "shards": len(job.held),
        "tensors": tensors,
        "blocks": blocks,
        "bind_s": bind_s,
        "bind_cpu_s": bind_cpu_s,
        "export_s": export_s,
        "export_cpu_s": export_cpu_s,
        "start_mib": before,
        "shards_mib": made,
        "peak_mib": peak,
        "export_peak_mib": _resident(),
    }


def _verify(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise AssertionError(f"{found:,} {what}, not {wanted:,}")


def report(results: list[Result]) -> str:
    """A table of the results."""
    rows = [
        [
            f"{TITLES[str(r['job'])]}, DP {r['dp']}",
            f"{r['coordinates']:,}",
            f"{r['shards']:,}",
            f"{r['tensors']:,}",
            f"{r['blocks']:,}",
            f"{r['bind_s']:.2f}",
            f"{r['bind_cpu_s']:.2f}",
            f"{r['export_s']:.2f}",
            f"{r['export_cpu_s']:.2f}",
            f"{r['export_peak_mib']:.0f}",
            "yes" if _met(r) else "no",
        ]
        for r in results
    ]
    head = ["job", "coordinates", "shards", "tensors", "blocks", "bind s", "CPU", "export s", "CPU", "peak MiB", "met"]
    return table(head, rows)


def _met(result: Result) -> bool:
    return float(result["bind_s"]) <= SECONDS and float(result["export_peak_mib"]) <= MEBIBYTES


def _apart(name: str, *, dp: int, profile: bool) -> Result:
    """Measure one job in a process of its own."""
    command = [sys.executable, "-m", "bench.programs", "--here", "--only", name, "--dp", str(dp)]
    done = subprocess.run(
        [*command, *(["--profile"] if profile else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), end="\n" if lines else "")
    found: Result = json.loads(last)
    return found


def _resident() -> float:
    """Largest resident set of this process so far, in MiB (Linux counts KiB)."""
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _profiled(*, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    pstats.Stats(profile).sort_stats("cumulative").print_stats(35)


if __name__ == "__main__":
    main()
