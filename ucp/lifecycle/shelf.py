"""The folder of a run: one folder per step, one small record beside each, and how they are listed and deleted.

A step is complete when its folder holds the root object of a checkpoint, which every save puts last and every deletion
takes first. Nothing is renamed and nothing links, so that an object store serves as well as a file system.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.format.native_manifest import ROOT as NATIVE_ROOT
from ucp.format.records import ROOT as UNIVERSAL_ROOT
from ucp.store import Store, open_store

ROOTS = (NATIVE_ROOT, UNIVERSAL_ROOT)
"""The objects that make a folder a checkpoint."""

_FOLDER = re.compile(r"step-(\d{8,18})/")
_RECORD = re.compile(r"step-(\d{8,18})\.json(\.\d+-\d+\.tmp)?")
_VERSION = 1
_FORMAT = "step"


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint of a run. `metrics` are those given when it was saved.

    `aside` says that the run was later resumed from an earlier one: it belongs to a history that was given up.
    """

    step: int
    url: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Contents:
    """What lies in the folder of a run, by step: complete checkpoints, and folders that are none (yet, or any more).

    `others` are those of the incomplete that have no record, which every save writes first: somebody else's.
    """

    saved: tuple[Saved, ...] = ()
    incomplete: tuple[int, ...] = ()
    others: frozenset[int] = frozenset()

    @property
    def live(self) -> tuple[Saved, ...]:
        """Those of the history that is gone on with."""
        return tuple(saved for saved in self.saved if not saved.aside)


def folder_name(step: int) -> str:
    """Name of the folder of a step, such as ``step-00001000``: sorting names sorts steps."""
    if not 0 <= step < 10**18:
        raise UsageError(f"{step} is no number of steps")
    return f"step-{step:08}"


def remove_folder(store: Store, name: str) -> None:
    """Delete the checkpoint in folder `name`, or what there is of one, the object that makes it one first."""
    for root in ROOTS:
        store.delete(f"{name}/{root}")
    if store.children(name):
        store.flush([name])
    for entry in list(store.entries(f"{name}/")):
        store.delete(entry.path)
    if store.children(name):  # folders that a deletion left which was cut short
        store.child(name).tidy()
        store.delete(f"{name}/{ROOTS[0]}")


def is_record(store: Store, path: str) -> bool:
    """Whether the object at `path` is a record of a step, and not something that others call so."""
    try:
        doc = json.loads(store.read(path))
    except (NotFoundError, ValueError, RecursionError):
        return False
    return isinstance(doc, dict) and doc.get("format") == _FORMAT and "metrics" in doc


class Shelf:
    """The folder of a run at `url`."""

    def __init__(self, url: str) -> None:
        self.address = url.rstrip("/") or url
        self.store: Store = open_store(url)

    def where(self, step: int) -> str:
        """URL of the checkpoint of a step."""
        return f"{self.address}/{folder_name(step)}"

    def contents(self) -> Contents:
        """What is there now; CorruptError for a record that is none."""
        names = self.store.children()
        steps = {int(found[1]): False for name in names if (found := _FOLDER.fullmatch(name))}
        recorded = {int(found[1]) for name in names if (found := _RECORD.fullmatch(name))}
        for step in steps:
            steps[step] = self.complete(step)
        return Contents(
            tuple(self.saved(step) for step, complete in sorted(steps.items()) if complete),
            tuple(step for step, complete in sorted(steps.items()) if not complete),
            frozenset(
                step
                for step, complete in steps.items()
                if not complete and not (step in recorded and is_record(self.store, f"{folder_name(step)}.json"))
            ),
        )

    def complete(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`, and not just a part of one."""
        return any(self.store.exists(f"{folder_name(step)}/{root}") for root in ROOTS)

    def saved(self, step: int) -> Saved:
        """The checkpoint of `step` with what its record says."""
        metrics, aside = self._read(step)
        return Saved(step, self.where(step), metrics, aside)

    def record(self, step: int, metrics: Mapping[str, float], *, aside: bool = False) -> None:
        """Write what is known of a step beside its folder."""
        # Numbers that JSON lacks (nan, inf) are written as text.
        kept = {name: value if abs(value) < float("inf") else str(value) for name, value in metrics.items()}
        doc = {"format": _FORMAT, "version": _VERSION, "step": step, "metrics": kept, "aside": aside}
        self.store.put(f"{folder_name(step)}.json", json.dumps(doc, allow_nan=False, indent=1).encode())

    def mark(self, saved: Saved, *, aside: bool) -> None:
        """Say whether a checkpoint belongs to a history that was given up."""
        self.record(saved.step, saved.metrics, aside=aside)

    def copies(self, saved: Saved) -> tuple[Saved, ...]:
        """The checkpoint wherever it lies, the nearest first."""
        return (saved,)

    def remove(self, step: int) -> None:
        """Delete a step, root first: whatever happens on the way, what is left never opens."""
        remove_folder(self.store, folder_name(step))
        self.store.delete(f"{folder_name(step)}.json")

    def strays(self, before: int) -> list[str]:
        """Records of earlier steps that have no folder, and what was left of writing a record that was cut short."""
        names = self.store.children()
        folders = {int(found[1]) for name in names if (found := _FOLDER.fullmatch(name))}
        records = [(found, int(found[1])) for name in names if (found := _RECORD.fullmatch(name))]
        return [
            found[0]
            for found, step in records
            if step < before and (found[2] or (step not in folders and is_record(self.store, found[0])))
        ]

    def _read(self, step: int) -> tuple[dict[str, float], bool]:
        path = f"{folder_name(step)}.json"
        try:
            data = self.store.read(path)
        except NotFoundError:
            return {}, False
        try:
            doc = json.loads(data)
            if (doc["format"], doc["version"], doc["step"]) != (_FORMAT, _VERSION, step):
                raise ValueError("another format, version or step")
            return {str(name): float(value) for name, value in doc["metrics"].items()}, doc["aside"] is True
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptError(
                f"{self.address}/{path}: no record of step {step} ({error})",
                hint="delete it: the checkpoint stays, its metrics are lost",
            ) from error
