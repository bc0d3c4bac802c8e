"""What ByteCheckpoint keeps beside model and optimizer: a file of extra state for each rank, and the data loader's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import Checksum
from ucp.container.leaves import with_bytes
from ucp.container.torchfile import TorchFiles
from ucp.store import Entry, Store
from ucp.tree import Tree

from .._dcp.optimizer import comparable

_EXTRA = re.compile(r"extra_state_rank_(\d+)\.pt")
_LARGE = 1 << 24
_NAMES = {"torch_rng_state": "rng", "rng_state": "rng", "rng": "rng", "scheduler": "lr_scheduler"}


@dataclass(slots=True)
class Extra:
    """The state, the files that it came from, and remarks."""

    state: dict[str, Tree] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    checksums: list[Checksum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_extra(store: Store, folder: str) -> Extra:
    """Everything in ``extra_state`` and ``loader_ckpt`` of the step at `folder`."""
    extra = Extra()
    ranks = _read_ranks(store, f"{folder}extra_state", extra)
    if ranks and all(isinstance(tree, dict) for tree in ranks.values()):
        for key in dict.fromkeys(key for tree in ranks.values() for key in tree):
            extra.state[_NAMES.get(str(key), str(key))] = _joined({rank: tree.get(key) for rank, tree in ranks.items()})
    elif ranks:
        extra.state["extra_state"] = _joined(ranks)
    _read_loader(store, f"{folder}loader_ckpt", extra)
    return extra


def _read_ranks(store: Store, folder: str, extra: Extra) -> dict[int, Any]:
    files, ranks = TorchFiles(store), {}
    for name in store.children(folder):
        found = _EXTRA.fullmatch(name)
        if found:
            file = files.read(f"{folder}/{name}")
            ranks[int(found[1])] = with_bytes(store, file.root)
            extra.entries.append(file.entry)
            extra.checksums += file.checksums
    return dict(sorted(ranks.items()))


def _joined(ranks: Mapping[int, Tree]) -> Tree:
    """What all ranks have, or what each has where they differ."""
    first = next(iter(ranks.values()))
    same = repr(comparable(first))
    return first if all(repr(comparable(tree)) == same for tree in ranks.values()) else {"rank": dict(ranks)}


def _read_loader(store: Store, folder: str, extra: Extra) -> None:
    held: dict[str, Tree] = {}
    for entry in store.entries(f"{folder}/"):
        if entry.size > _LARGE:
            extra.notes.append(f"left out: {entry.path} ({entry.size} bytes)")
            continue
        held[entry.path.removeprefix(f"{folder}/")] = store.read(entry.path)
        extra.entries.append(entry)
    if held:
        extra.state["loader_ckpt"] = held
