"""Folders of ByteCheckpoint (bytecheckpoint/checkpointer/base_checkpointer.py, meta_type.py).

``<root>/latest_checkpointed_iteration.txt`` and ``<root>/global_step_N/{model,optimizer,extra_state,loader_ckpt}``; the
first two hold ``.metadata`` and ``.distcp`` files. Megatron writes a file of that name as well.
"""

from __future__ import annotations

import re

from ucp.errors import NotFoundError
from ucp.store import Store

from .._dcp.folder_kind import root_class
from .._dcp.metadata import METADATA

LATEST = "latest_checkpointed_iteration.txt"
PARTS = ("model", "optimizer")
_STEP = re.compile(r"global_step_(\d+)/")


def is_bytecheckpoint(store: Store) -> bool:
    """Whether `store` is a step folder of ByteCheckpoint, or a root with the step that its latest file names."""
    if _is_step(store, ""):
        return True
    names = store.children()
    if LATEST not in names:
        return False
    return any(_STEP.fullmatch(name) and _is_step(store, name) for name in reversed(names))


def locate(store: Store, step: int | str | None) -> str:
    """The path of the step folder, empty or ending in ``/``: the one of `step`, else the latest.

    NotFoundError if there is none, or it was not finished.
    """
    if step is None and _is_step(store, ""):
        return ""
    names = [name for name in store.children() if _STEP.fullmatch(name)]
    wanted = _latest(store) if step is None else str(step)
    folder = f"global_step_{wanted}/"
    if folder not in names or not _is_step(store, folder):
        has = " ".join(name[:-1] for name in names) or "none"
        raise NotFoundError(
            f"{store.url}/{folder}model: no checkpoint of ByteCheckpoint",
            hint=f"its .metadata is written last, so a save may have been cut short; step folders here: {has}",
        )
    return folder


def _is_step(store: Store, folder: str) -> bool:
    return root_class(store, f"{folder}model/{METADATA}").startswith("bytecheckpoint.")


def _latest(store: Store) -> str:
    try:
        return store.read(LATEST).decode("ascii", "replace").strip()[:40]
    except NotFoundError as error:
        raise NotFoundError(
            f"{store.url}: neither model/{METADATA} nor {LATEST} is here", hint="give the folder of one step"
        ) from error
