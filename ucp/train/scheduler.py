"""Learning-rate schedulers: plain state, whose per-group lists follow the groups by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.lazy import lazy_tree, read_tree
from ucp.store import Store
from ucp.train.report import Findings
from ucp.tree import Opaque, Tree, walk

STATE = "lr_scheduler"
"""Where catalogs keep the scheduler's state."""

_MAY_DIFFER = frozenset({"verbose"})
"""Entries that some versions of torch keep and others do not, as are all that begin with an underscore."""


_PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})
"""Lists with one entry per group of the optimizer, in torch/optim/lr_scheduler.py."""

_NOT_PER_GROUP = frozenset({"_milestones", "milestones"})
_NESTED = "_schedulers"
"""States of the parts of a ``SequentialLR`` or ``ChainedScheduler``."""


def plan_scheduler(
    catalog: Catalog,
    store: Store,
    scheduler: Any,
    homes: Sequence[Sequence[int]] | None,
    findings: Findings,
    *,
    name: str = STATE,
) -> dict[str, Any]:
    """The state to hand to ``scheduler.load_state_dict``, kept by the catalog as `name`; empty where there is none.

    `homes` gives the source groups of each group of the scheduler's optimizer, None where they are not known; lists
    with one entry per source group (``base_lrs``, ``_last_lr``) are put in the target's order. Problems go to
    `findings`.
    """
    if not isinstance(catalog.state.get(name), dict):
        findings.missing(name, name, catalog.state)
        return {}
    tree: dict[str, Tree] = lazy_tree(catalog, store, catalog.state[name], name)
    opaque = [path for path, node in walk(tree, where=name) if isinstance(node, Opaque)]
    if opaque:
        findings.add("map", name, f"holds objects that are never built: {', '.join(opaque[:3])}")
        return {}
    _compare_keys(name, tree, scheduler.state_dict(), findings)
    count = len(catalog.param_groups)
    return _by_group(read_tree(tree), count, homes, findings)


def _compare_keys(name: str, tree: Mapping[str, Tree], own: Mapping[str, Any], findings: Findings) -> None:
    for key in sorted(str(key) for key in own.keys() ^ tree.keys()):
        if not key.startswith("_") and key not in _MAY_DIFFER:
            findings.add("missing" if key in own else "unexpected", f"{name}.{key}", "another kind of scheduler?")


def _by_group(
    tree: Mapping[str, Any], count: int, homes: Sequence[Sequence[int]] | None, findings: Findings
) -> dict[str, Any]:
    """The state with what it keeps per group in the target's order, in schedulers made of schedulers too."""
    if homes is None:
        return dict(tree)
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == _NESTED and isinstance(value, list):
            found[key] = [_by_group(part, count, homes, findings) for part in value]
        else:
            found[key] = _ordered(key, value, count, homes, findings) if isinstance(value, list) else value
    return found


def _ordered(key: str, value: list[Any], count: int, homes: Sequence[Sequence[int]], findings: Findings) -> list[Any]:
    # An optimizer of several has some of the source's groups, one after the other.
    start = homes[0][0] if homes and homes[0] else -1
    same = [list(group) for group in homes] == [[start + i] for i in range(len(value))]
    if key in _NOT_PER_GROUP or (same and start >= 0) or (len(value) != count and key not in _PER_GROUP):
        return value
    subject = f"{STATE}.{key}"
    if key not in _PER_GROUP:
        findings.add("hyper-parameters", subject, "may be by group, and the target's groups are not the source's")
        return value
    if len(value) != count:
        findings.add("hyper-parameters", subject, f"{len(value)} entries for {count} groups of the source")
        return value
    ordered = []
    for number, group in enumerate(homes):
        entries = [value[home] for home in group if home >= 0]
        if not entries or any(entry != entries[0] for entry in entries):
            findings.add("hyper-parameters", f"{subject} of group {number}", f"source groups say {entries}")
            return value
        ordered.append(entries[0])
    return ordered
