"""How far a job is, from the records of its ranks while they are written."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ucp.demo.elastic.records import End, Reader, Record, Start, Step


class Progress:
    """What the ranks of the job in `folder` have told; `look` reads what is new."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self.step = 0
        self._ended: set[tuple[int, int]] = set()
        self._starts: dict[int, dict[int, Start]] = defaultdict(dict)
        self._steps: dict[int, dict[int, float]] = defaultdict(dict)
        self._first: dict[int, float] = {}

    def look(self) -> None:
        """Read what is new."""
        for record in self._reader.more():
            self._take(record)

    @property
    def epoch(self) -> int:
        """The newest epoch of which a rank has told; 0 before the first."""
        return max(self._starts, default=0)

    @property
    def world(self) -> int:
        """Ranks of the newest epoch."""
        return max(self._newest(), key=lambda start: start.time).world if self._starts else 0

    def works(self, world: int, since: float) -> bool:
        """Whether all ranks of the newest epoch, which are `world`, have done a step after the time `since`."""
        self.look()
        starts = self._newest()
        active = {start.rank for start in starts if not start.spare}
        done = {rank for rank, time in self._steps[self.epoch].items() if time > since}
        return self.world == world == len(starts) and active <= done

    def over(self) -> bool:
        """Whether all ranks of the newest epoch have come to the end."""
        self.look()
        starts = self._newest()
        active = {(start.epoch, start.pid) for start in starts if not start.spare}
        return bool(active) and self.world == len(starts) and active <= self._ended

    def _newest(self) -> list[Start]:
        """The ranks of the newest epoch; a start that left no trace but these may have had the same number."""
        starts = self._starts.get(self.epoch, {})
        last = max(starts.values(), key=lambda start: start.time, default=None)
        return [start for rank, start in starts.items() if last is not None and rank < last.world]

    def _take(self, record: Record) -> None:
        if isinstance(record, Start):
            known = self._starts[record.epoch].get(record.rank)
            if known is None or known.time < record.time:
                self._starts[record.epoch][record.rank] = record
        elif isinstance(record, Step):
            self.step = max(self.step, record.step)
            self._steps[record.epoch][record.rank] = record.time
        elif isinstance(record, End):
            self._ended.add((record.epoch, record.pid))
