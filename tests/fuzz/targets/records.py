"""Small records: claims and journals of conversions, what made a checkpoint, and those of a run's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

from tests.fuzz import target as fuzz
from tests.fuzz.target import store_of
from ucp.converter import Target
from ucp.lifecycle.shelf import Shelf
from ucp.run.claim import HEAD, Claim
from ucp.run.crc import crc
from ucp.run.destination import Wanted, examine, record_path
from ucp.run.journal import Journal

_GENERATION = re.compile(r"[0-9a-z]{0,32}")


@dataclass(frozen=True, slots=True)
class _Made:
    """What a conversion would write: an object ``a``."""

    root: str = "root"
    tasks: tuple[SimpleNamespace, ...] = (SimpleNamespace(object="a", size=1),)

    def relocated(self, generation: str) -> _Made:
        assert _GENERATION.fullmatch(generation), f"would write below {generation!r}"
        return self


def _examine(files: Mapping[str, bytes]) -> None:
    wanted = Wanted(cast("Target", _Made()), "plan", replaces=True, restart=True)
    wanted.placed(examine(store_of(files), wanted).generation)


def _head(data: bytes) -> None:
    _examine({HEAD: data})


def _lines(data: bytes) -> None:
    """Lines of a journal, each with the digest that it should have."""
    lines = (b"%08x %s" % (crc("crc32c", line), line) for line in data.splitlines())
    head = HEAD.rpartition("/")[0]
    Journal(store_of({f"{head}/000000.jsonl": b"\n".join(lines)}), Claim("plan")).open()


def _record(data: bytes) -> None:
    _examine({"root": b"x", "a": b"x", record_path(""): data})


def _step(data: bytes) -> None:
    shelf = Shelf("fuzz")
    shelf.store = store_of({"step-00000001.json": data, "step-00000001/ucp.json": b"{}"})
    shelf.contents()


def targets() -> list[fuzz.Target]:
    return [
        fuzz.Target("claim", _head, style="json"),
        fuzz.Target("journal-lines", _lines, style="json"),
        fuzz.Target("conversion-record", _record, style="json"),
        fuzz.Target("step-record", _step, style="json"),
    ]
