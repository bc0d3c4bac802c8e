"""What came of a run of the elastic demo, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.demo.elastic.ledger import Account, Strike, lineage, losses, newest
from ucp.demo.elastic.picture import Done, Story
from ucp.demo.elastic.records import Record, Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`account` of a job struck by `strikes`; `broken` are the promises that did not hold, in words."""

    account: Account
    strikes: Sequence[Strike]
    story: Story
    tolerance: float
    broken: tuple[str, ...]
    seconds: float
    seed: int

    @property
    def held(self) -> bool:
        """Whether every promise held."""
        return not self.broken

    @property
    def kills(self) -> list[Strike]:
        """What was killed."""
        return [strike for strike in self.strikes if strike.kills]


def story(records: Sequence[Record], reference: Sequence[Record], strikes: Sequence[Strike]) -> Story:
    """The story of a job, for its picture, from its first record on: nodes that come before that are its beginning."""
    records = newest(records)
    begun = min((record.time for record in records), default=0.0)
    done, counted = losses(records), lineage(records)
    alone = {step: loss for (_, step), (_, loss) in losses(reference).items()}
    shown = [Done(time - begun, step, loss, counted.get(step) == epoch) for (epoch, step), (time, loss) in done.items()]
    starts = {start.epoch: start for start in records if isinstance(start, Start) and start.rank == 0}
    return Story(
        worlds=list(_stretches(starts, {key: time - begun for key, (time, _) in done.items()})),
        steps=sorted(shown, key=lambda one: one.time),
        marks=[(strike.time - begun, strike.words) for strike in strikes if strike.time >= begun],
        undisturbed=[alone[step] for step in sorted(alone)],
    )


def _stretches(
    starts: Mapping[int, Start], done: Mapping[tuple[int, int], float]
) -> Iterator[tuple[float, float, int, str]]:
    for epoch, start in sorted(starts.items()):
        times = [time for (its, _), time in done.items() if its == epoch]
        if times:
            layout = " ".join(f"{name}={size}" for name, size in start.mesh.items())
            yield min(times), max(times), start.world, layout
