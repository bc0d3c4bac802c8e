"""Learning-rate schedulers: plain state, whose per-group lists follow the groups by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.lazy import LazyTensor, lazy_tree
from ucp.store import Store
from ucp.train.report import Findings
from ucp.tree import Opaque, Tree, walk

STATE = "lr_scheduler"
"""Where catalogs keep the scheduler's state."""

_MAY_DIFFER = frozenset({"verbose"})
"""Entries that some versions of torch keep and others do not, as are all that begin with an underscore."""


_PER_GROUP = ("base_lrs", "_last_lr")


def plan_scheduler(
    catalog: Catalog, store: Store, scheduler: Any, homes: Sequence[Sequence[int]] | None, findings: Findings
) -> dict[str, Any]:
    """The state to hand to ``scheduler.load_state_dict``.

    `homes` gives the source groups of each group of the scheduler's optimizer, None where they are not known; lists
    with one entry per source group (``base_lrs``, ``_last_lr``) are put in the target's order. Problems go to
    `findings`.
    """
    if not isinstance(catalog.state.get(STATE), dict):
        findings.missing(STATE, STATE, catalog.state)
        return {}
    tree: dict[str, Tree] = lazy_tree(store, catalog.state[STATE], STATE)
    opaque = [path for path, node in walk(tree, where=STATE) if isinstance(node, Opaque)]
    if opaque:
        findings.add("map", STATE, f"holds objects that are never built: {', '.join(opaque[:3])}")
        return {}
    _compare_keys(tree, scheduler.state_dict(), findings)
    count = len(catalog.param_groups)
    return {key: _by_group(key, _read(value), count, homes, findings) for key, value in tree.items()}


def _compare_keys(tree: Mapping[str, Tree], own: Mapping[str, Any], findings: Findings) -> None:
    for key in sorted(str(key) for key in own.keys() ^ tree.keys()):
        if not key.startswith("_") and key not in _MAY_DIFFER:
            findings.add("missing" if key in own else "unexpected", f"{STATE}.{key}", "another kind of scheduler?")


def _read(value: Tree) -> Any:
    if isinstance(value, LazyTensor):
        return value[...]
    if isinstance(value, dict):
        return {key: _read(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_read(entry) for entry in value)
    return value


def _by_group(key: str, value: Any, count: int, homes: Sequence[Sequence[int]] | None, findings: Findings) -> Any:
    if not isinstance(value, list) or homes is None:
        return value
    ordered = value
    if len(value) == count and [list(group) for group in homes] != [[i] for i in range(count)]:
        ordered = []
        for number, group in enumerate(homes):
            entries = [value[home] for home in group if home >= 0]
            if not entries or any(entry != entries[0] for entry in entries):
                findings.add("hyper-parameters", f"{STATE}.{key} of group {number}", f"source groups say {entries}")
                return value
            ordered.append(entries[0])
    if key in _PER_GROUP and len(ordered) != len(homes):
        findings.add("hyper-parameters", f"{STATE}.{key}", f"{len(value)} entries for {len(homes)} groups")
    return ordered
