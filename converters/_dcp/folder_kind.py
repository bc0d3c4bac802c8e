"""Which folders are DCP's: Megatron-Core and ByteCheckpoint write files of the same names."""

from __future__ import annotations

import re

from ucp.errors import NotFoundError
from ucp.store import Store

from .metadata import METADATA

_HEAD = 256
_RANK_METADATA = re.compile(r"__\d+\.metadata")
_MEGATRON = ("metadata.json", "common.pt")


def is_dcp(store: Store) -> bool:
    """Whether `store` is a folder of DCP, whole or cut short; a listing and at most one small read."""
    names = store.children()
    if is_megatron(store):
        return False
    if METADATA in names:
        return root_class(store).startswith("torch.distributed.checkpoint.")
    return any(name.endswith(".distcp") or _RANK_METADATA.fullmatch(name) for name in names)


def is_megatron(store: Store) -> bool:
    """Whether Megatron-Core wrote the folder (megatron/core/dist_checkpointing/core.py), with keys of its own."""
    names = store.children()
    return any(name in names for name in _MEGATRON)


def rank_metadata(store: Store) -> list[str]:
    """``__{rank}.metadata`` files, which ranks write that save without talking to each other."""
    return [name for name in store.children() if _RANK_METADATA.fullmatch(name)]


def root_class(store: Store, path: str = METADATA) -> str:
    """``module.name`` of the class that the pickle at `path` starts with; "" if it starts with none."""
    try:
        head = store.read(path, 0, min(_HEAD, store.entry(path).size))
    except NotFoundError:
        return ""
    found = re.search(rb"(?:\x8c.|c)([A-Za-z_][\w.]*)(?:\n|\x94?\x8c.)([A-Za-z_]\w*)", head, re.DOTALL)
    return b".".join(found.groups()).decode() if found else ""
