"""The file that our own target writes: what is where in it, so that nothing is lost on the way back.

``{"model": {name: tensor}, "optimizer": {"state": {number: {…}}, "param_groups": [{…, "params": [number],
"param_names": [name]}]}, "step": …, <training state>,
"ucp": {"version": 1, "kinds": {name: kind}, "groups": number, "state": {…}}}``.
``kinds`` has what is no trained parameter, ``groups`` the number of groups that the source had (a last one may hold
parameters that were in none), ``state`` the training state whose names are taken by other entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from ucp.catalog import Kind
from ucp.errors import CorruptError, FitError
from ucp.store import Store
from ucp.tree import Tree

from .._deepspeed import nodes
from .files import ROOT, is_ours
from .spellings import Parts, is_optimizer

FILE = "checkpoint.pt"
ENTRY = "ucp"
VERSION = 1
TAKEN = frozenset({"model", "optimizer", "step", "module", ENTRY})
"""Entries that training state of the same name cannot have."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_AGAIN = "copy the folder again from where it was written"


def is_own(root: Tree) -> bool:
    """Whether a saved dict is one of ours."""
    return isinstance(root, Mapping) and isinstance(root.get(ENTRY), Mapping) and "kinds" in root[ENTRY]


@dataclass(frozen=True, slots=True)
class Own:
    """What is in a file of ours, the kinds of its tensors, and how many of its groups the source had."""

    parts: Parts
    kinds: dict[str, Kind]
    groups: int


def own_parts(root: Mapping[str, Tree], where: str) -> Own:
    """What is in a file of ours; FitError for one of a later version, CorruptError for one that is none."""
    told = root[ENTRY]
    if told.get("version") != VERSION:
        raise FitError(f"{where}: of version {told.get('version')!r}", hint="a newer ucp reads it")
    kinds = nodes.mapping(told["kinds"], f"{where}: kinds")
    if not all(kind in _KINDS for kind in kinds.values()):
        raise CorruptError(f"{where}: kinds of tensors that there are not")
    optimizer = root.get("optimizer")
    if optimizer is not None and not is_optimizer(optimizer):
        raise CorruptError(f"{where}: optimizer: not the state dict of an optimizer")
    state = {key: value for key, value in root.items() if key not in TAKEN}
    step = root.get("step")
    parts = Parts(
        {str(name): node for name, node in nodes.mapping(root.get("model"), f"{where}: model").items()},
        {} if optimizer is None else {"optimizer": optimizer},
        step if type(step) is int else None,
        {**state, **nodes.mapping(told.get("state", {}), f"{where}: state")},
    )
    groups = nodes.integer(told.get("groups", 0), f"{where}: groups")
    return Own(parts, {str(name): kind for name, kind in kinds.items()}, groups)


def root_document(size: int) -> bytes:
    """``checkpoint.json``: that the file is whole."""
    return json.dumps({"ucp": {"family": "torch", "version": VERSION, "files": {FILE: size}}}, indent=1).encode()


def check_root(store: Store) -> None:
    """CorruptError where ``checkpoint.json`` is there and contradicts the file."""
    if not store.exists(ROOT) or not is_ours(store):
        return
    try:
        told = json.loads(store.read(ROOT, 0, min(store.entry(ROOT).size, 1 << 16)))["ucp"]["files"][FILE]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CorruptError(f"{store.url}/{ROOT}: damaged", hint=_AGAIN) from None
    if told != store.entry(FILE).size:
        raise CorruptError(
            f"{store.url}/{FILE}: {store.entry(FILE).size} bytes and not {told!r:.40}, as {ROOT} says", hint=_AGAIN
        )
