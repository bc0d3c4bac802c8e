"""What the jobs of all layouts tell: losses of each that saved, and of each that went on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.layouts.jobs import Action, run
from tests.layouts.same import differences


@dataclass(frozen=True)
class Saved:
    """A job that saved: where, and its losses before and after, when nothing interrupted it."""

    url: str
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class Resumed:
    """A job that went on from what another one saved: its losses, and what of the loaded state was not the same."""

    losses: list[float]
    differences: list[str]

    def drift(self, expected: list[float]) -> float:
        """Largest relative difference of its losses from the `expected` ones."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, expected, strict=True))


def folder_name(layout: str) -> str:
    """A layout as the name of a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in layout).split())


def saved(folder: Path, layout: str) -> Saved:
    """Train in `layout` and save."""
    url = str(folder / folder_name(layout))
    (told,) = run(layout, [Action("", url)])
    return Saved(url, told["before"], told["after"])


def resumed(folder: Path, layout: str, sources: Mapping[str, Saved]) -> dict[str, Resumed]:
    """Go on in `layout` from each of `sources`; what was loaded is saved again and compared with its source."""
    here = folder / f"{folder_name(layout)}-from"
    actions = [Action(source.url, str(here / folder_name(name))) for name, source in sources.items()]
    told = run(layout, actions, timeout=600)
    return {
        name: Resumed(one["after"], differences(action.source, action.save))
        for name, action, one in zip(sources, actions, told, strict=True)
    }


def everything(folder: Path, layouts: Iterable[str]) -> tuple[dict[str, Saved], dict[str, dict[str, Resumed]]]:
    """All of `layouts` from all of them: by layout what was saved, and by layout and source what went on."""
    names = list(layouts)
    sources = {}
    for name in names:
        sources[name] = saved(folder, name)
        print(f"saved by {name}", flush=True)
    found = {}
    for name in names:
        found[name] = resumed(folder, name, sources)
        print(f"resumed by {name}", flush=True)
    return sources, found
