"""What lies beside the weights and goes with the model: configuration, tokenizer, custom code, model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.store import Entry, Store
from ucp.tree import Tree

from .documents import read_document
from .places import ADAPTER_CONFIG, CONFIG

GENERATION_CONFIG = "generation_config.json"
DOCUMENTS = {CONFIG: "hf_config", ADAPTER_CONFIG: "adapter_config", GENERATION_CONFIG: "generation_config"}
"""Files kept as their content, under these names in `Catalog.state`."""

FILES = "files"
"""Name in `Catalog.state` of the other files, kept whole."""

_CARRIED = re.compile(r"[\w.-]+\.(json|txt|model|spm|bpe|jinja|tiktoken|py|md|yaml)|LICENSE|NOTICE")
_NOT = re.compile(r".*\.index(\.[\w-]+)?\.json|trainer_state\.json|all_results\.json|ucp-.*\.json|\..*")
MOST_FILE_BYTES = 64 << 20
MOST_BYTES = 256 << 20


@dataclass(slots=True)
class Beside:
    """Training state made of files, what was read for it, and remarks."""

    state: dict[str, Tree] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's configuration, if there is one."""
        return self.state.get("hf_config")


def read_beside(store: Store, names: Sequence[str]) -> Beside:
    """The files of a folder that are carried; CorruptError for a configuration that is no JSON object."""
    found = Beside()
    files: dict[str, bytes] = {}
    for name in names:
        if name in DOCUMENTS:
            document, entry = read_document(store, name)
            found.state[DOCUMENTS[name]] = document
            found.entries.append(entry)
        elif carries(name):
            entry = store.entry(name)
            if entry.size > MOST_FILE_BYTES or entry.size + sum(map(len, files.values())) > MOST_BYTES:
                found.notes.append(f"not carried, too large for a file beside the weights: {name} ({entry.size} bytes)")
                continue
            files[name] = store.read(name, 0, entry.size)
            found.entries.append(entry)
    if files:
        found.state[FILES] = files
    return found


def carries(name: str) -> bool:
    """Whether a file of this name goes with the model."""
    return bool(_CARRIED.fullmatch(name)) and not _NOT.fullmatch(name) and name not in DOCUMENTS
