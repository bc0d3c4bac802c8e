"""Try what is promised of checkpoints, and write docs/reliability.md.

    python -m bench.reliability [--out docs/reliability.md] [--json FILE] [--only SECTION,...] [--server moto]
        [--size quick|usual|full]

Sections: network, wire, rest, crashes, throughput, digests. With ``--json``, what was measured is kept there, and
sections that are not run now are those of the file. Wrong values, lost bytes and mixtures are figures of the page and
make the command fail; so does any error that is none of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.reliability.measured import SECTIONS
from bench.reliability.page import page
from bench.report import load, machine

QUICK: Mapping[str, int] = {"rounds": 1, "wire": 6, "flips": 2, "everywhere": 0, "mib": 16, "digests": 64}
USUAL: Mapping[str, int] = {"rounds": 3, "wire": 18, "flips": 20, "everywhere": 0, "mib": 32, "digests": 128}
FULL: Mapping[str, int] = {"rounds": 9, "wire": 96, "flips": 200, "everywhere": 1, "mib": 128, "digests": 1024}
SIZES = {"quick": QUICK, "usual": USUAL, "full": FULL}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--server", default="moto")
    parser.add_argument("--size", choices=SIZES, default="usual")
    asked = parser.parse_args()
    found: dict[str, str] = {}
    if asked.json and asked.json.exists():
        found = json.loads(asked.json.read_text())
    bad = 0
    for name in asked.only.split(","):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ucp-reliability-") as place:
            section = SECTIONS[name](asked.server, Path(place), SIZES[asked.size])
        found[name] = section.text
        bad += section.bad
        found |= {"server": asked.server, "notes": f"{machine()}; {load():.0f} processes wanted to run at the end."}
        print(f"{name}, {time.monotonic() - started:.0f} s\n\n{found[name]}\n", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1))
        if asked.out:
            asked.out.write_text(page(found))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
