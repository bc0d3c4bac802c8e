"""The long proof: a job is killed a hundred times and more, and loses nothing.

    python -m tests.elastic.soak --kills 100 --json soak.json

Nodes come and go (8, 6, 7, 4, 8 ranks), layouts change with the number of ranks, and ranks, agents, nodes and links are
struck at random moments and phases that the seed tells. Exits with 0 only if every promise held, all kills were made,
all numbers of ranks trained, and all phases were struck.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from ucp.demo.elastic.campaign import Campaign, account_of, undisturbed
from ucp.demo.elastic.killer import read_strikes
from ucp.demo.elastic.ledger import Account, Strike
from ucp.demo.elastic.network import can_divide
from ucp.demo.elastic.settings import Settings
from ucp.errors import UcpError

Say = Callable[[str], None]
NODES = {"a": 2, "b": 2, "c": 2, "d": 1, "e": 1}
COURSE = (("a", "b", "c", "d", "e"), ("a", "b", "c"), ("a", "b", "c", "d"), ("b", "c"), ("a", "b", "c", "d", "e"))
"""8, 6, 7, 4 and 8 ranks."""
SMALL = {"a": 2, "b": 1, "c": 1}
SMALL_COURSE = (("a", "b", "c"), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"))
"""4, 3, 3, 2 and 4 ranks."""
LAYOUTS = {
    8: {"dp": 4, "tp": 2},
    6: {"dp": 6},
    4: {"dp": 2, "tp": 2},
    3: {"dp": 3},
    2: {"dp": 2},
    1: {"dp": 1},
}
"""By ranks: FSDP with and without tensor parallelism; one of seven is spare, and one of five."""
FIRST = 25
"""Until then there is a version in storage, which alone survives that two nodes are lost at once."""
EACH = 6
"""With so many kills for each phase, and more, every phase has to come."""
TOLERANCE = 1e-9
"""Of the mean loss of a step in float64: what the order of a reduction may change."""


def settings(folder: Path, *, steps: int, seed: int, tiers: str, timeout: float = 30.0, pace: float = 0.1) -> Settings:
    """The job of a soak below `folder`; `tiers` are letters: m(emory), l(ocal); it saves to storage in any case."""
    return Settings(
        url=f"file://{folder}/checkpoints",
        steps=steps,
        seed=seed,
        layouts=json.dumps(LAYOUTS),
        memory=2 if "m" in tiers else 0,
        disk=5 if "l" in tiers else 0,
        disk_root=str(folder / "local"),
        every=10,
        timeout=timeout,
        pace=pace,
    )


def soak(folder: Path, campaign: Campaign, *, steps: int, tiers: str, say: Say) -> tuple[Account | None, str]:
    """Run a soak in `folder`; its account, if the undisturbed job came to its end, and what went wrong on the way."""
    alone, struck = folder / "alone", folder / "job"
    failure = ""
    try:
        campaign.run(struck, settings(struck, steps=steps, seed=campaign.seed, tiers=tiers).arguments(), say=say)
    except UcpError as error:
        failure = str(error)
    try:
        undisturbed(alone, settings(alone, steps=steps, seed=campaign.seed, tiers="", pace=0).arguments(), seconds=900)
    except UcpError as error:
        return None, failure or str(error)
    return account_of(struck, alone), failure


def broken(account: Account, campaign: Campaign, strikes: Sequence[Strike]) -> tuple[str, ...]:
    """Promises that did not hold, and what was to be done to the job and was not."""
    unstruck = [phase for phase in campaign.phases if phase not in {strike.phase for strike in strikes}]
    few = campaign.kills < EACH * len(campaign.phases)
    cut = any(strike.what == "cut" for strike in strikes)
    return (
        *account.broken(tolerance=TOLERANCE, seconds=campaign.patience),
        *campaign.missed(account, tier="memory"),
        *(() if few else (f"nobody was struck in {phase}" for phase in unstruck)),
        *(["no node was cut off"] if campaign.divided and not few and not cut else ()),
    )


def told(account: Account | None, failure: str, campaign: Campaign, folder: Path) -> dict[str, Any]:
    """All there is to tell, as JSON."""
    strikes = read_strikes(folder / "job")
    kinds = Counter(f"{strike.what} in {strike.phase or 'no phase'}" for strike in strikes)
    wrong = broken(account, campaign, strikes) if account else ("no account",)
    times = sorted(one.seconds for one in account.recoveries) if account else []
    return {
        "held": not failure and not wrong,
        "failure": failure,
        "broken": wrong,
        "strikes": dict(sorted(kinds.items())),
        "kills": sum(strike.kills for strike in strikes),
        "tiers": dict(Counter(one.tier for one in account.recoveries)) if account else {},
        "recovery_seconds": {"median": median(times), "longest": times[-1]} if times else {},
        **(asdict(account) if account else {}),
    }


def main() -> int:
    """Run a soak by the words of the command line."""
    parser = argparse.ArgumentParser("soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="4 ranks at most, in place of 8")
    parser.add_argument("--shared-network", action="store_true", help="nodes have no addresses of their own, no cuts")
    parser.add_argument("--tiers", default="ml", help="letters: m(emory), l(ocal disks); storage comes with all")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds that a recovery may take")
    parser.add_argument("--again", type=float, default=0.4, help="part of blows that come while the job recovers")
    parser.add_argument("--minutes", type=float, default=math.inf, help="strike no longer than that")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--keep", type=Path, default=None)
    words = parser.parse_args()
    seed = random.randrange(10**6) if words.seed is None else words.seed
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {line}", flush=True)

    say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="ucp-soak-") as temporary:
        folder = words.keep or Path(temporary)
        steps = words.steps or 100 + 8 * words.kills
        campaign = Campaign(
            nodes=SMALL if words.small else NODES,
            course=SMALL_COURSE if words.small else COURSE,
            kills=words.kills,
            until=steps - 30,
            seed=seed,
            divided=not words.shared_network and can_divide(),
            first=FIRST,
            apart=2,
            again=words.again,
            patience=words.patience,
            limit=60 * words.minutes,
        )
        account, failure = soak(folder, campaign, steps=steps, tiers=words.tiers, say=say)
        found = {
            "seed": seed,
            "seconds": time.monotonic() - begun,
            "divided": campaign.divided,
            **told(account, failure, campaign, folder),
        }
    text = json.dumps(found, indent=1)
    if words.json is not None:
        words.json.write_text(text + "\n")
    say(text)
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
