"""The model that weights are of: its configuration and what goes with it, wherever these are to be had."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.plan import TensorSpec
from ucp.store import open_store
from ucp.tree import Tree

from .beside import DOCUMENTS, read_beside
from .documents import read_document
from .options import CASTABLE, rounds
from .places import ADAPTER_CONFIG, CONFIG

_TOLD = ("dtype", "torch_dtype")
_ADAPTED = "base_model.model."


def is_adapter(catalog: Catalog) -> bool:
    """Whether the tensors are those of a PEFT adapter (peft/utils/save_and_load.py, ``get_peft_model_state_dict``)."""
    return bool(catalog.tensors) and all(name.startswith(_ADAPTED) for name in catalog.tensors)


def with_model(catalog: Catalog, path: str | None) -> Catalog:
    """`catalog` with configuration and small files in its state as the reader of folders puts them there.

    They are those of `path`, a configuration or the folder of a model; or those that the source carries; or those that
    Trainer left around a checkpoint of DeepSpeed. UsageError for a path that has none.
    """
    if path is None:
        return replace(catalog, state={**_around(catalog.state.get("around")), **catalog.state})
    own = {name: tree for name, tree in catalog.state.items() if name not in DOCUMENTS.values()}
    try:
        return replace(catalog, state={**own, **_given(path)})
    except (NotFoundError, CorruptError) as error:
        raise UsageError(
            f"config={path}: {error.message}", hint="give the model's config.json, or its folder"
        ) from None


def config_of(catalog: Catalog) -> dict[str, Any]:
    """The configuration of the model or adapter in `catalog`; UsageError if it carries none."""
    name = ADAPTER_CONFIG if is_adapter(catalog) else CONFIG
    found = catalog.state.get(DOCUMENTS[name])
    if isinstance(found, dict):
        return found
    raise UsageError(
        f"{catalog.url}: carries no {name}, which from_pretrained needs",
        hint=f"give the model's: -t config=path/to/{name}; --to safetensors writes plain files without one",
    )


def with_dtype(config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the dtype that most of the tensors to be written have, and remarks.

    ``from_pretrained`` makes the model in the dtype that the configuration tells, and would round wider tensors. A few
    tensors may well be wider, as routers are, so that only a dtype that is wrong for most is changed.
    """
    counts: Counter[str] = Counter()
    for spec in specs:
        counts[spec.dtype] += spec.size if spec.dtype in CASTABLE else 0
    floats = [dtype for dtype, count in counts.most_common() if count]
    made, notes = dict(config), []
    for key in _TOLD:
        told = made.get(key)
        if not floats or told not in CASTABLE or told == floats[0]:
            continue
        if len(floats) == 1 or rounds(floats[0], told):
            notes.append(f"{CONFIG} says {key} {told}, the tensors are {floats[0]}: the copy says {floats[0]}")
            made[key] = floats[0]
    return made, notes


def _given(path: str) -> dict[str, Tree]:
    """What a folder of a model has beside its weights, or the one document that `path` names."""
    store = open_store(path)
    names = store.children()
    if CONFIG in names or ADAPTER_CONFIG in names:
        return read_beside(store, names).state
    folder, _, name = path.rpartition("/")
    document, _ = read_document(open_store(folder or ("/" if path.startswith("/") else ".")), name)
    return {DOCUMENTS[ADAPTER_CONFIG if "peft_type" in document else CONFIG]: document}


def _around(files: Tree) -> dict[str, Tree]:
    """Documents among files kept whole; what is no JSON object is none of them."""
    found: dict[str, Tree] = {}
    for name, key in DOCUMENTS.items():
        text = files.get(name) if isinstance(files, dict) else None
        with suppress(ValueError, RecursionError):
            document = json.loads(text) if isinstance(text, str | bytes) else None
            if isinstance(document, dict):
                found[key] = document
    return found
