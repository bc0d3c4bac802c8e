"""What a run tells of one of its starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.layout import Mesh


@dataclass(frozen=True, slots=True)
class RunReport:
    """One start of the job: `world` ranks, of which `spares` wait, in the layout `mesh`.

    `step` is the one that it went on from (0: the first one is the next), out of `tier` (None: nothing was there), with
    the checkpoint resharded if `reconfigured`. `steps_lost` were done before the failure and are done again, if
    `at_least` maybe more: every node was lost that knew. `unsaved` are, by tier, saves that were due and were left out,
    or failed. `parts` are the seconds that the parts of the recovery took on this rank (`ucp.elastic.timeline.PARTS`).
    `done` is the last step, once the run has ended in the ordinary way.
    """

    epoch: int
    world: int
    mesh: Mesh
    spares: int
    step: int = 0
    tier: str | None = None
    reconfigured: bool = False
    steps_lost: int = 0
    at_least: bool = False
    unsaved: Mapping[str, int] = field(default_factory=dict)
    done: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def doc(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "epoch": self.epoch,
            "world": self.world,
            "mesh": dict(self.mesh.axes),
            "spares": self.spares,
            "step": self.step,
            "tier": self.tier,
            "reconfigured": self.reconfigured,
            "steps_lost": self.steps_lost,
            "at_least": self.at_least,
            "unsaved": dict(self.unsaved),
            "done": self.done,
            "parts": dict(self.parts),
        }

    def __str__(self) -> str:
        spares = f", {self.spares} spare" if self.spares else ""
        came = f"from step {self.step} in {self.tier}" if self.tier else "from the beginning"
        least = "at least " if self.at_least else ""
        lost = f", {least}{self.steps_lost} steps lost" if self.steps_lost or self.at_least else ""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.parts.items())
        return f"epoch {self.epoch}: {self.mesh} on {self.world} ranks{spares}, {came}{lost} (seconds: {parts})"
