"""Which files of a folder hold its weights.

Names: transformers/utils/__init__.py (``SAFE_WEIGHTS_NAME`` and its like), peft/utils/constants.py,
torch/distributed/checkpoint/_hf_utils.py (``_gen_file_name``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ucp.errors import NotFoundError
from ucp.store import Store

from .._torch.files import is_training_folder
from .documents import read_document

Kind = Literal["model", "adapter", "distributed"]

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
SAFE = "model.safetensors"
TORCH = "pytorch_model.bin"
ADAPTER = "adapter_model.safetensors"
ADAPTER_TORCH = "adapter_model.bin"
SHARDED = "sharded"
"""Folder of each rank's shards, beside what torch put together of them (hf_storage.py, ``enable_consolidation``)."""

_USUAL = (
    *(CONFIG, ADAPTER_CONFIG, SAFE, TORCH, ADAPTER, ADAPTER_TORCH, "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json", "README.md"),
)
"""What most folders of models have, by transformers/tokenization_utils_base.py and transformers/utils/__init__.py."""

_JOURNAL = ".ucp-journal/"
_PART = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})(\.[\w-]+)?\.(safetensors|bin)")
_SHARD = re.compile(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True, slots=True)
class Places:
    """The files with weights: one or several `paths`, or an `index` that names them.

    *distributed* files each hold regions of tensors, as ranks saved them.
    """

    kind: Kind
    paths: tuple[str, ...] = ()
    index: str | None = None
    ignored: tuple[str, ...] = ()


def variants(name: str, variant: str | None) -> str:
    """`name` with the variant where transformers puts it: before the ending."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def detect(store: Store) -> bool:
    """Whether a folder holds weights as Hugging Face libraries or torch's writer for them name them."""
    names = store.children()
    if _JOURNAL in names and CONFIG not in names and ADAPTER_CONFIG not in names:
        return False  # a conversion that was cut short
    if is_training_folder(names) and CONFIG not in names and ADAPTER_CONFIG not in names:
        return False  # a model of somebody else's, in a folder of family torch
    return _find(names, None) is not None or any(_PART.fullmatch(name) for name in names)


def usual(store: Store) -> list[str]:
    """Names that a model's folder may have, and those that an index in it names, where it cannot be listed."""
    found = list(_USUAL)
    for name in (SAFE, TORCH):
        index = f"{name}.index.json"
        if store.exists(index):
            document, _ = read_document(store, index)
            held = document.get("weight_map")
            named = {str(file) for file in held.values()} if isinstance(held, dict) else set()
            found += [index, *sorted(file for file in named if "/" not in file)]
    return found


def find(store: Store, variant: str | None) -> Places:
    """The weights of a folder; NotFoundError if there are none, or shards without their index."""
    names = store.children()
    found = _find(names, variant)
    if found is not None:
        return found
    parts = [name for name in names if (match := _PART.fullmatch(name)) and match[3] == (variant and f".{variant}")]
    if parts:
        raise NotFoundError(
            f"{store.url}: {parts[0]} is one of several files, and the index that names them is missing",
            hint=f"copy {SAFE}.index.json (or {TORCH}.index.json) as well; --from safetensors reads files without it",
        )
    told = f"of variant {variant!r} " if variant else ""
    raise NotFoundError(f"{store.url}: no weights {told}here", hint=f"expected {SAFE}, {TORCH} or an index of them")


def _find(names: Sequence[str], variant: str | None) -> Places | None:
    """The weights that transformers would take, of those in a folder (modeling_utils.py, ``_get_resolved_...``)."""
    held = [place for name in (SAFE, TORCH) for place in _model(names, name, variant)]
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if shards:
        held.append(Places("distributed", tuple(shards)))
    held += [Places("adapter", (name,)) for name in (ADAPTER, ADAPTER_TORCH) if name in names]
    if not held:
        return None
    others = tuple(place.index or place.paths[0] for place in held[1:])
    return Places(held[0].kind, held[0].paths, held[0].index, others)


def _model(names: Sequence[str], name: str, variant: str | None) -> list[Places]:
    single, index = variants(name, variant), variants(f"{name}.index.json", variant)
    found = [Places("model", (single,))] if single in names else []
    return [*found, Places("model", index=index)] if index in names else found
