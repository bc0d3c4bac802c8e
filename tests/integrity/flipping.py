"""Flips bits of a checkpoint, one after the other, and tells what is found and what is read then."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integrity.made import objects, url_of
from tests.integrity.reading import WAYS, found_by_verify, outcome

Way = Callable[[str, Path], Any]


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of one object."""

    path: Path
    byte: int
    bit: int

    def apply(self) -> None:
        """Flip it; a second time flips it back."""
        with self.path.open("r+b") as file:
            file.seek(self.byte)
            (old,) = file.read(1)
            file.seek(self.byte)
            file.write(bytes([old ^ 1 << self.bit]))

    def __str__(self) -> str:
        return f"{self.path.name}: bit {self.bit} of byte {self.byte} of {self.path.stat().st_size}"


@dataclass(slots=True)
class Tally:
    """What became of `bits` that were wrong, one at a time.

    Verification found `found`; of the others `same` did not change what a JSON file says. Of all reads, `refused` ended
    in an error, `right` gave the right values, and `wrong` did not.
    """

    bits: int = 0
    found: int = 0
    same: int = 0
    unfound: list[str] = field(default_factory=list)
    refused: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)


def flips(folder: Path, count: int, rng: random.Random) -> Iterator[Flip]:
    """The first and last bytes of every object and `count` others, or all if it has no more; one bit of each."""
    for path in objects(folder):
        size = path.stat().st_size
        ends = {at for at in (0, 7, 8, size // 2, size - 9, size - 1) if 0 <= at < size}
        for byte in sorted(ends | set(rng.sample(range(size), min(count, size)))):
            yield Flip(path, byte, rng.randrange(8))


def disturb(folder: Path, place: Path, found: Iterable[Flip], *, every: int = 1, ways: Sequence[Way] = WAYS) -> Tally:
    """Flip each bit in turn and back again; every so many are read in all `ways`, inside `place`, and all verified."""
    url, tally = url_of(folder), Tally()
    truth = [way(url, place) for way in ways]
    assert not found_by_verify(url)
    for flip in found:
        before = flip.path.read_bytes() if flip.path.suffix == ".json" else b""
        flip.apply()
        tally.bits += 1
        if found_by_verify(url):
            tally.found += 1
        elif _same_document(flip.path, before):
            tally.same += 1
        else:
            tally.unfound.append(str(flip))
        if tally.bits % every == 0:
            for way, true in zip(ways, truth, strict=True):
                _read(tally, outcome(way, url, place), true, f"{flip}: {way.__name__}")
        flip.apply()
    assert not found_by_verify(url)
    return tally


def _read(tally: Tally, got: Any, true: Any, where: str) -> None:
    if got is None:
        tally.refused += 1
    elif got == true:
        tally.right += 1
    else:
        tally.wrong.append(where)


def _same_document(path: Path, before: bytes) -> bool:
    """Whether a JSON file says what it said: ``1e-05`` and ``1E-05`` differ in one bit."""
    try:
        return path.suffix == ".json" and bool(json.loads(path.read_bytes()) == json.loads(before))
    except ValueError:
        return False
