"""What a job of the elastic demo is to do, as words of a command line and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from ucp.errors import UsageError

JOB = "ucp.demo.elastic.job"


@dataclass(frozen=True, slots=True)
class Settings:
    """A job of `steps` steps whose checkpoints lie at `url`; a batch is `samples`, in micro-batches of at most `micro`.

    `layouts` is ``dp``, ``dp,tp=2`` (two ranks share every layer, the rest is data-parallel), or a JSON object with
    the sizes of the axes by number of ranks: ``{"8": {"dp": 4, "tp": 2}, "6": {"dp": 6}}``. Every `memory` steps the
    state is kept in the nodes' memory, `copies` times; every `disk` steps on their disks, below `disk_root`; every
    `every` steps at `url`; 0 is never. A step takes `pace` seconds at least.
    """

    url: str
    steps: int = 40
    seed: int = 1
    samples: int = 24
    micro: int = 4
    dtype: str = "float64"
    layouts: str = "dp"
    kind: str = "fsdp"
    layers: int = 2
    memory: int = 2
    copies: int = 2
    disk: int = 0
    disk_root: str = ""
    every: int = 10
    timeout: float = 60.0
    pace: float = 0.0

    def arguments(self) -> list[str]:
        """The words with which ``torchrun`` starts the job, after its own."""
        words = ["-m", JOB, self.url]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            words += [] if value == field.default else [f"--{field.name.replace('_', '-')}={value}"]
        return words

    @classmethod
    def parsed(cls, arguments: Sequence[str]) -> Self:
        """From the words after the module's name."""
        parser = argparse.ArgumentParser(JOB)
        for field in fields(cls):
            if field.name == "url":
                parser.add_argument(field.name)
            else:
                name = f"--{field.name.replace('_', '-')}"
                parser.add_argument(name, dest=field.name, type=type(field.default), default=field.default)
        return cls(**vars(parser.parse_args(arguments)))

    def preferred(self) -> dict[int, dict[str, int]] | None:
        """Sizes of the axes by number of ranks, where `layouts` says so."""
        if not self.layouts.startswith("{"):
            return None
        return {int(world): dict(sizes) for world, sizes in json.loads(self.layouts).items()}

    def kept(self) -> dict[str, int]:
        """Sizes of the axes that stay, where `layouts` says so."""
        grows, *words = self.layouts.split(",")
        if grows != "dp":
            raise UsageError(f"layouts={self.layouts!r}", hint="dp, or dp,tp=2, or a JSON object")
        return {name: int(size) for name, _, size in (word.partition("=") for word in words)}
