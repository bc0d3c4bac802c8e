"""The elastic demo: a job on three nodes that are struck, taken away and given back, and its account."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ucp.demo.elastic import records
from ucp.demo.elastic.campaign import Campaign, account_of, undisturbed
from ucp.demo.elastic.killer import read_strikes
from ucp.demo.elastic.outcome import Outcome, story
from ucp.demo.elastic.phases import OPTIMIZER, RECOVERY, REPLICATION
from ucp.demo.elastic.picture import picture
from ucp.demo.elastic.settings import Settings

NODES = {"a": 2, "b": 1, "c": 1}
COURSE = (("a", "b", "c"), ("a", "b"), ("a", "b", "c"))
LAYOUTS = {4: {"dp": 2, "tp": 2}, 3: {"dp": 3}, 2: {"dp": 2}, 1: {"dp": 1}}
KILLS, STEPS, FIRST_STRUCK, LAST_STRUCK, PACE = 4, 60, 12, 45, 0.1
IN_MEMORY, IN_STORAGE = 2, 5
"""Steps between saves: before the first blow there is one in storage, for what memory does not survive."""
TOLERANCE = 1e-9
"""What the order of float64 additions explains in the mean loss of a step."""
PATIENCE = 300.0
"""Seconds that a recovery may take, on a machine that has much else to do."""


def run(folder: Path, *, seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run the job undisturbed, then with kills that `seed` chooses, below `folder`, and account for it.

    UcpError if the job does not go on in time, or does not end; nothing of it is left running.
    """
    begun = time.monotonic()
    alone, struck = folder / "undisturbed", folder / "run"
    say(f"{STEPS} steps that nothing happens to")
    undisturbed(alone, _settings(alone, seed, pace=0.0).arguments(), seconds=3 * PATIENCE)
    campaign = Campaign(
        nodes=NODES,
        course=COURSE,
        kills=KILLS,
        first=FIRST_STRUCK,
        until=LAST_STRUCK,
        seed=seed,
        phases=(OPTIMIZER, REPLICATION, RECOVERY),
        patience=PATIENCE,
    )
    campaign.run(struck, _settings(struck, seed, pace=PACE).arguments(), say=say)
    account, strikes = account_of(struck, alone), read_strikes(struck)
    told = story(records.read(struck), records.read(alone), strikes)
    (folder / "picture.svg").write_text(picture(told, "A job whose nodes are killed, taken away and given back"))
    return Outcome(
        account=account,
        strikes=strikes,
        story=told,
        tolerance=TOLERANCE,
        broken=(*account.broken(tolerance=TOLERANCE, seconds=PATIENCE), *campaign.missed(account, tier="memory")),
        seconds=time.monotonic() - begun,
        seed=seed,
    )


def _settings(folder: Path, seed: int, *, pace: float) -> Settings:
    return Settings(
        f"file://{folder}/checkpoints",
        steps=STEPS,
        seed=seed,
        layouts=json.dumps(LAYOUTS),
        memory=IN_MEMORY,
        every=IN_STORAGE,
        pace=pace,
    )
