"""Which files a DeepSpeed checkpoint has, and what their names say.

Names: deepspeed/runtime/engine.py (``_get_ckpt_name``, ``_get_zero_ckpt_name``, ``_get_expert_ckpt_name``,
``_get_optimizer_ckpt_name``) and
deepspeed/runtime/pipe/module.py (``ckpt_layer_path``). "pp_rank" in a name is the ZeRO data-parallel rank; "mp_rank"
counts pipeline stages outermost and tensor-parallel ranks innermost. Prefixes of optimizer files are ``bf16_``, none,
and ``fp16_`` in old versions (deepspeed/checkpoint/constants.py), which also left out an underscore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Store

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Rank = TypeVar("Rank")

_MOST_LATEST_BYTES = 4096
_SCRIPT = "zero_to_fp32.py"
_JOURNAL = ".ucp-journal/"


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of one tag, by what their names say. Paths are relative to the store.

    `optim` is keyed by (mp, dp), `model` by mp (one file per model-parallel rank, ZeRO 0 to 2), `shards` by (mp, dp)
    (one model file per rank, ZeRO 3), `layers` by (layer, tp). Of mixtures of experts: `experts` by (mp, MoE layer,
    expert), all experts of a number in one file under layer -1 in old versions; `expert_optims` by (mp, ep).
    """

    path: str
    optim: dict[tuple[int, int], str] = field(default_factory=dict)
    model: dict[int, str] = field(default_factory=dict)
    shards: dict[tuple[int, int], str] = field(default_factory=dict)
    layers: dict[tuple[int, int], str] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], str] = field(default_factory=dict)
    expert_optims: dict[tuple[int, int], str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """Name of the folder; empty where it is the store's own root."""
        return self.path.rstrip("/")

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a tag folder.

        DeepSpeed's universal folders also hold model files, beside a ``zero`` folder
        (deepspeed/checkpoint/ds_to_universal.py), and are none.
        """
        return bool(self.optim) or (bool(self.model or self.shards) and "zero/" not in self.others)


def scan(path: str, names: Iterable[str]) -> Folder:
    """The folder at `path` (empty, or ending in ``/``) that holds `names`.

    CorruptError if two files claim the same rank: what two saves left behind.
    """
    folder = Folder(path)
    others: list[str] = []
    for name in names:
        full = path + name
        if match := _OPTIM.fullmatch(name):
            _claim(folder.optim, (int(match[2]), int(match[1])), full)
        elif match := _MODEL.fullmatch(name):
            _claim(folder.model, int(match[1]), full)
        elif match := _SHARD.fullmatch(name):
            _claim(folder.shards, (int(match[2]), int(match[1])), full)
        elif match := _LAYER.fullmatch(name):
            _claim(folder.layers, (int(match[1]), int(match[2] or 0)), full)
        elif match := _EXPERT.fullmatch(name):
            _claim(folder.experts, (int(match[3]), int(match[1] or -1), int(match[2])), full)
        elif match := _EXPERT_OPTIM.fullmatch(name):
            _claim(folder.expert_optims, (int(match[2]), int(match[1])), full)
        else:
            others.append(name)
    return replace(folder, others=tuple(others))


def _claim(files: dict[Rank, str], rank: Rank, full: str) -> None:
    if rank in files:
        raise CorruptError(
            f"{files[rank]} and {full} are both files of the same rank",
            hint="two saves wrote into one folder; remove the files of the older one",
        )
    files[rank] = full


def detect(store: Store) -> bool:
    """Whether `store` is a tag folder, a save root, or what is left of one.

    A conversion that was cut short before its ``latest`` is none.
    """
    names = store.children()
    if _JOURNAL in names and "latest" not in names:
        return False
    try:
        if scan("", names).is_checkpoint:
            return True
        if "latest" in names:
            return _latest_is_ours(store)
        return _SCRIPT in names or any(True for _ in _tag_folders(store, names))
    except CorruptError:
        return True


def locate(store: Store, tag: str | None = None) -> Folder:
    """The tag folder to read: `tag`, or the folder itself, or what ``latest`` names, or the only one there is.

    NotFoundError naming what there is, where none of these is a checkpoint.
    """
    names = store.children()
    if tag is not None:
        return _named(store, tag, names, f"there is no checkpoint with tag {tag!r}")
    here = scan("", names)
    if here.is_checkpoint:
        return here
    if "latest" in names:
        tag = _latest(store)
        return _named(store, tag, names, f"`latest` names {tag!r}, which is no checkpoint")
    folders = list(_tag_folders(store, names))
    if len(folders) == 1:
        return folders[0]
    raise _nothing_here(store, names, folders)


def _named(store: Store, tag: str, names: list[str], problem: str) -> Folder:
    if not _is_tag(tag):
        raise UsageError(f"{tag!r} is not a tag", hint="a tag is the name of a folder inside the save root")
    folder = scan(f"{tag}/", store.children(tag))
    if folder.is_checkpoint:
        return folder
    tags = [found.tag for found in _tag_folders(store, names)]
    hint = f"complete tags here: {' '.join(tags)}; give one as tag" if tags else "the save did not finish"
    raise NotFoundError(f"{store.url}: {problem}", hint=hint)


def _nothing_here(store: Store, names: list[str], folders: list[Folder]) -> NotFoundError:
    if folders:
        tags = " ".join(folder.tag for folder in folders)
        return NotFoundError(f"{store.url}: several checkpoints and no `latest`", hint=f"give one as tag: {tags}")
    if _SCRIPT in names:
        return NotFoundError(
            f"{store.url}: {_SCRIPT} is here, but no checkpoint files beside it",
            hint="it makes ordinary model files; training state is in the tag folder that DeepSpeed wrote",
        )
    return NotFoundError(
        f"{store.url}: no DeepSpeed checkpoint here", hint="give a tag folder, or the save root with `latest` in it"
    )


def _tag_folders(store: Store, names: Iterable[str]) -> Iterator[Folder]:
    for name in names:
        if name.endswith("/"):
            folder = scan(name, store.children(name.rstrip("/")))
            if folder.is_checkpoint:
                yield folder


def _latest(store: Store) -> str:
    """The tag in ``latest`` (deepspeed/runtime/engine.py, ``save_checkpoint``)."""
    size = store.entry("latest").size
    text = store.read("latest") if size <= _MOST_LATEST_BYTES else b""
    tag = text.decode("utf-8", "replace").strip()
    if not _is_tag(tag):
        raise CorruptError(f"{store.url}/latest: does not hold a tag", hint="give the tag folder's name as tag")
    return tag


def latest_tag(store: Store, names: Iterable[str]) -> str | None:
    """The tag in ``latest`` of a save root that holds `names`; None if there is none."""
    return _latest(store) if "latest" in names else None


def _latest_is_ours(store: Store) -> bool:
    """Whether ``latest`` names a tag folder of ours, or one that is missing (which `locate` explains)."""
    names = store.children(_latest(store))
    return not names or scan("", names).is_checkpoint


def _is_tag(tag: str) -> bool:
    return bool(tag) and not tag.startswith("/") and tag.isprintable() and ".." not in tag.split("/")
