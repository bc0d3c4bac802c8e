"""Which checkpoint a folder of a run in storage holds: that of the step by which the folder is called, or another one.

Folders get copies of other folders, and universal copies of older saves. What counts is the step that a checkpoint
itself says it is of; one that says none has that of its folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from ucp.catalog import Catalog
from ucp.checkpoint import open_checkpoint
from ucp.errors import ConflictError
from ucp.format.native_manifest import ROOT as NATIVE_ROOT
from ucp.format.records import ROOT as UNIVERSAL_ROOT
from ucp.lifecycle.shelf import folder_name
from ucp.store import open_store
from ucp.train.team import attempt

_log = logging.getLogger("ucp")

FAMILIES = {"native": NATIVE_ROOT, "universal": UNIVERSAL_ROOT}
"""The forms in which a run saves, each with the object that makes it one; of two as good the first is taken."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The `family` in which a folder is to be read, and its catalog; None where nothing could be read there."""

    family: str | None = None
    catalog: Catalog | None = None


def look(url: str, step: int) -> Stored:
    """What the folder at `url`, which is called after `step`, holds of that step.

    A folder may hold a native and a universal checkpoint: the one of its step is taken, of two the native one, and the
    log tells what is left and why. ConflictError if it holds other steps only. What cannot be read is passed over:
    loading tells what is wrong with it, or finds another copy.
    """
    store = open_store(url)
    there = [family for family, root in FAMILIES.items() if store.exists(root)]
    found = {family: attempt(partial(_catalog, url, family)) for family in there}
    catalogs = {family: one for family, one in found.items() if isinstance(one, Catalog)}
    good = [family for family, one in catalogs.items() if one.step in (step, None)]
    if good:
        for left in set(there) - {good[0]}:
            told = _told(left, found[left])
            _log.warning("%s: takes the %s checkpoint of step %d, and leaves %s", url, good[0], step, told)
        return Stored(good[0], catalogs[good[0]])
    if not catalogs or len(catalogs) < len(there):
        return Stored()
    held = " and ".join(f"a {family} checkpoint of step {one.step}" for family, one in catalogs.items())
    own = folder_name(next(iter(catalogs.values())).step or 0)
    raise ConflictError(
        f"{url}: holds {held}, and is called after step {step}",
        hint=f"to go on from it, move it to a folder {own}; else delete it",
    )


def _told(family: str, found: Catalog | Exception) -> str:
    if isinstance(found, Catalog):
        return f"a {family} one of step {found.step}"
    return f"a {family} one, which cannot be read: {found}"


def _catalog(url: str, family: str) -> Catalog:
    return open_checkpoint(url, family=family).catalog
