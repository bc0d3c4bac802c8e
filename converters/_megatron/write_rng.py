"""Random states of ranks, which go on where the result has the ranks of the source.

One for each (pp, tp), as ``get_rng_state`` in megatron/training/checkpointing.py has them; where these differ,
Megatron-LM leaves them alone too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from ucp.catalog import Catalog
from ucp.training import progress
from ucp.tree import Tree

from .._deepspeed_universal.carry import Drop, carry
from .write_choice import Choice

_PLACE = re.compile(r"(pp|tp|ep|dp)=(\d+)")

Place = tuple[int, int]
"""Place along pp and tp."""


def rng_states(catalog: Catalog, choice: Choice, drop: Drop) -> dict[Place, Tree]:
    """The states to be written, by rank; empty where the source has none of Megatron's, or other ranks."""
    told = progress(catalog).rng
    ranks = told.get("rank") if isinstance(told, dict) else None
    held: Mapping[str, Tree] = ranks if isinstance(ranks, dict) else {"": told}
    found: dict[Place, Tree] = {}
    for name, tree in held.items():
        place = {axis: int(index) for axis, index in _PLACE.findall(str(name))}
        if place.get("ep") or place.get("dp") or not _of_megatron(tree):
            return {}
        found[place.get("pp", 0), place.get("tp", 0)] = carry({"rng": tree}, "rng", drop).get("rng")
    degrees = choice.degrees
    wanted = set(itertools.product(range(degrees["pp"]), range(degrees["tp"])))
    return found if found.keys() == wanted and None not in found.values() else {}


def _of_megatron(tree: Tree) -> bool:
    return (
        isinstance(tree, list)
        and bool(tree)
        and all(isinstance(one, dict) and "rng_tracker_states" in one for one in tree)
    )
