"""One target under atheris, in a process of its own: ``engine.py TARGET FOLDER``, and libFuzzer's arguments.

Inputs that break a rule are put in FOLDER, one for each place in the code, and fuzzing goes on.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ucp"]):
    from tests.fuzz.targets import TARGETS

    for _path in TARGETS[sys.argv[1]].inputs:  # what is imported at first use is to be counted too
        TARGETS[sys.argv[1]].warm(_path.read_bytes())

from tests.fuzz.mutate import MUTATIONS
from tests.fuzz.watch import ViolationError, attempt

_ADDRESS_SPACE = 3 << 30
"""Bytes above what the process has at its start: whoever asks for more gets MemoryError."""


def main() -> None:
    target, folder = TARGETS[sys.argv[1]], Path(sys.argv[2])
    mutation = MUTATIONS.get(target.style)
    seen: set[str] = set()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """In turn our mutation, which keeps the input well-formed, and libFuzzer's."""
        if mutation is None or seed % 4 == 0:
            return bytes(atheris.Mutate(data, most))
        changed = mutation(data, random.Random(seed))
        return changed if len(changed) <= most else data

    def run(data: bytes) -> None:
        before = _peak_memory()
        try:
            attempt(lambda: target.read(data))
            if _peak_memory() - before > target.most_memory(len(data)):
                raise ViolationError(f"takes {_peak_memory() - before} bytes of memory")
        except Exception as error:
            place = _place(error)
            if place not in seen:
                seen.add(place)
                (folder / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
                traceback.print_exception(error, file=sys.stderr)
                print(f"FOUND {target.name} {place}: {error!r:.200}", file=sys.stderr, flush=True)

    _limit_memory()
    atheris.Setup([sys.argv[0], *sys.argv[3:]], run, custom_mutator=mutate)
    atheris.Fuzz()


def _place(error: Exception) -> str:
    """What was raised by which line of the project."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/ucp/" in frame.filename or "/converters/" in frame.filename]
    return f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno}" if ours else type(error).__name__


def _peak_memory() -> int:
    """The most that the process ever held. Cheaper by far than counting what an input takes, as the tests do."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ADDRESS_SPACE, held + _ADDRESS_SPACE))


if __name__ == "__main__":
    main()
