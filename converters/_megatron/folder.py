"""Where a checkpoint lies: the tracker file, the folder of an iteration, and which of the two formats it is in.

megatron/training/checkpointing.py: ``get_checkpoint_tracker_filename``, ``get_checkpoint_name``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ucp.errors import CorruptError, FitError, NotFoundError, UcpError
from ucp.store import Store

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
METADATA_JSON = "metadata.json"
MODEL = "model_optim_rng.pt"
PARAMETERS = "distrib_optim.pt"

Kind = Literal["torch_dist", "legacy"]
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?/")
_DIGITS = re.compile(r"[0-9]{1,18}")
_SPLIT = re.compile(r"mp_rank_\d+(_\d+)*/(model_rng\.pt|optim\.pt)")


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one iteration: `path` is empty or ends in a slash, `iteration` is None if the name tells none."""

    path: str
    kind: Kind
    iteration: int | None = None
    names: tuple[str, ...] = ()


def detect(store: Store) -> bool:
    """Whether `store` is a Megatron checkpoint, or a root whose tracker file names one."""
    try:
        return _kind(store) is not None or _kind(store.child(_tracked(store))) is not None
    except FitError:  # a checkpoint of Megatron that cannot be read: reading says why
        return True
    except UcpError:
        return False


def locate(store: Store, iteration: str | int | None = None) -> Folder:
    """The folder of one iteration: `store` itself, or under a root the one asked for, by default the latest.

    NotFoundError where there is none, CorruptError for a tracker file that is none.
    """
    kind = _kind(store)
    if kind is not None:
        if iteration is not None and _number(store.url.rstrip("/").rpartition("/")[2]) != _asked(iteration):
            raise NotFoundError(f"{store.url}: is not iteration {iteration}", hint="leave `iteration` out")
        return Folder("", kind, None, tuple(store.children()))
    name = _tracked(store) if iteration is None else _name(iteration)
    child = store.child(name)
    kind = _kind(child)
    if kind is None:
        told = f"{TRACKER} names" if iteration is None else "there is no"
        raise NotFoundError(
            f"{store.url}: {told} {name}, which is no checkpoint",
            hint="the save was cut short or the folder is not there: choose another with iteration=N",
        )
    return Folder(f"{name}/", kind, _number(name), tuple(child.children()))


def ranks(folder: Folder, store: Store) -> Mapping[tuple[int, ...], str]:
    """Folders of model-parallel ranks by the numbers in their names."""
    found = {}
    for name in folder.names:
        if match := _RANK.fullmatch(name):
            found[tuple(int(number) for number in match.groups() if number is not None)] = folder.path + name
    if len({len(numbers) for numbers in found}) > 1:
        raise CorruptError(
            f"{store.url}/{folder.path}: folders of several kinds: {' '.join(sorted(found.values()))}",
            hint="two saves wrote into one folder; remove the files of the older one",
        )
    return found


def _kind(store: Store) -> Kind | None:
    names = store.children()
    if METADATA_JSON in names and COMMON in names:
        return "torch_dist" if _backend(store) == "torch_dist" else None
    held = [name for name in names if _RANK.fullmatch(name)]
    if not held:
        return None
    inside = store.child(held[0].rstrip("/")).children()
    if MODEL in inside:
        return "legacy"
    if any(_SPLIT.fullmatch(held[0] + name) for name in inside) and "model_rng.pt" in inside:
        raise FitError(
            f"{store.url}: model_rng.pt and optim.pt apart, as Megatron-LM of late 2022 saved them, cannot be read",
            hint="load and save it with a later Megatron-LM",
        )
    return None


def _backend(store: Store) -> str | None:
    try:
        told = json.loads(store.read(METADATA_JSON))
    except (ValueError, RecursionError):
        return None
    backend = told.get("sharded_backend") if isinstance(told, dict) else None
    if backend == "zarr":
        raise FitError(
            f"{store.url}: torch_dist's predecessor `zarr`, which Megatron-Core removed in 0.13, cannot be read",
            hint="load it with an earlier Megatron-Core and save it as torch_dist",
        )
    return backend if isinstance(backend, str) else None


def _tracked(store: Store) -> str:
    if TRACKER not in store.children():
        raise NotFoundError(f"{store.url}: not a Megatron checkpoint")
    text = store.read(TRACKER).decode("utf-8", "replace").strip()
    if text != "release" and not _DIGITS.fullmatch(text):
        raise CorruptError(f"{store.url}/{TRACKER}: {text!r:.40} is no iteration", hint="choose one with iteration=N")
    return _name(text)


def _name(iteration: str | int) -> str:
    asked = _asked(iteration)
    return "release" if asked is None else f"iter_{asked:07d}"


def _asked(iteration: str | int) -> int | None:
    text = str(iteration)
    if text == "release":
        return None
    if not _DIGITS.fullmatch(text):
        raise NotFoundError(f"iteration {text!r}: neither a number nor `release`")
    return int(text)


def _number(name: str) -> int | None:
    match = re.fullmatch(r"iter_(\d{7,})", name)
    return int(match[1]) if match else None
