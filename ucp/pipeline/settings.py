"""What a pipeline is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import UsageError
from ucp.pipeline.control import FOLDER
from ucp.pipeline.proof import Check


@dataclass(frozen=True, slots=True)
class Settings:
    """What a pipeline does: checkpoints in the folders of `source` become ones in folders of `destination`.

    `options` are those of `ucp.prepare`, such as ``to``. The newest `keep` results are kept (None: all), others are
    removed `grace` seconds after newer ones have taken their place. A source that has no object `ready` is not looked
    at. `pointer` is the path of the pointer. A watcher that says nothing for `lease` seconds is taken for dead.
    """

    source: str
    destination: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: int | None = None
    grace: float = 0.0
    ready: str | None = None
    check: Check = "auto"
    pointer: str = "latest.json"
    lease: float = 120.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"keep={self.keep}: must be at least 1")
        if not self.pointer or self.pointer.startswith(("/", FOLDER)) or ".." in self.pointer.split("/"):
            raise UsageError(f"{self.pointer!r} is no path of a pointer", hint="latest.json is one")
