"""The small files of a Hugging Face folder, and what of a catalog such a folder has no place for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import FitError

from .beside import DOCUMENTS, FILES, carries
from .places import ADAPTER_CONFIG, CONFIG


def document(content: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers writes them."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def small_files(catalog: Catalog, taken: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Generation configuration, tokenizer and whatever else was carried; `taken` are names that are in use."""
    for name, key in DOCUMENTS.items():
        if name not in (CONFIG, ADAPTER_CONFIG) and isinstance(catalog.state.get(key), dict):
            yield name, document(catalog.state[key])
    files = catalog.state.get(FILES)
    for name, data in files.items() if isinstance(files, dict) else ():
        if not isinstance(name, str) or not carries(name) or name in taken or not isinstance(data, bytes):
            raise FitError(f"{catalog.url}: a file {name!r:.80} cannot be put beside weights", hint="leave it out")
        yield name, data


def left_out(catalog: Catalog, written: Sequence[str] = ("value",), *, numbers: bool = True) -> Iterator[str]:
    """One remark that lists what `catalog` has beside the states `written`; `numbers`: those of parameters as well."""
    states = {state: None for tensor in catalog.tensors.values() for state in tensor.states if state not in written}
    scalars = {number: None for tensor in catalog.tensors.values() for number in tensor.scalars if numbers}
    carried = {*DOCUMENTS.values(), FILES}
    parts = [
        (" ".join(states), "optimizer states {}"),
        (" ".join(scalars), "{} of each parameter"),
        (str(len(catalog.param_groups) or ""), "{} param groups"),
        (" ".join(sorted(str(name) for name in catalog.state if name not in carried)), "training state {}"),
    ]
    told = [text.format(found) for found, text in parts if found]
    if told:
        yield f"left out, there is no place for it in this form: {', '.join(told)}"
