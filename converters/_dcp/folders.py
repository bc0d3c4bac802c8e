"""Folders around DCP's: Accelerate and Trainer save an FSDP model and its optimizer as two of them.

``pytorch_model_fsdp_0/`` and ``optimizer_0/`` (accelerate/utils/fsdp_utils.py, ``save_fsdp_model`` and
``save_fsdp_optimizer`` with SHARDED_STATE_DICT), beside the files that both keep for anything else. Lightning keeps
what is no tensor in ``meta.pt`` beside ``.metadata`` (lightning/fabric/strategies/fsdp.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ucp.catalog import Catalog
from ucp.container.torchfile import read_torch_file
from ucp.errors import FitError, NotFoundError
from ucp.store import Store

from .._hf.beside import read_beside
from .._hf.places import CONFIG
from .._hf.tied import folded, is_tied
from .._torch.around import read_around
from .around import renamed
from .contents import Contents, joined
from .folder_kind import root_class
from .metadata import METADATA, moved, read_metadata
from .pieces import read_contents

META = "meta.pt"
_MODEL = re.compile(r"pytorch_model_fsdp_\d+/")
_OPTIMIZER = re.compile(r"optimizer_\d+/")


def is_accelerate(store: Store) -> bool:
    """Whether `store` is a folder of Accelerate or Trainer with an FSDP model saved by DCP."""
    models = [name for name in store.children() if _MODEL.fullmatch(name)]
    return any(root_class(store, f"{name}{METADATA}").startswith("torch.distributed.checkpoint.") for name in models)


def read_parts(store: Store) -> Contents:
    """The contents of the model's folder and of the optimizers'.

    FitError where there are several models, NotFoundError where one of the folders was not finished.
    """
    names = store.children()
    models = [name for name in names if _MODEL.fullmatch(name)]
    if len(models) > 1:
        raise FitError(
            f"{store.url}: holds the models {' '.join(name[:-1] for name in models)}", hint="name the folder of one"
        )
    folders = [name[:-1] for name in (*models, *names) if name in models or _OPTIMIZER.fullmatch(name)]
    parts: dict[str, Contents] = {}
    for folder in dict.fromkeys(folders):
        if METADATA not in store.children(folder):
            raise NotFoundError(
                f"{store.url}/{folder}/{METADATA}: no such file",
                hint="it is written last, so this save was cut short: use an earlier checkpoint",
            )
        path = f"{folder}/{METADATA}"
        contents = read_contents(store, moved(read_metadata(store, path), folder), path=path)
        parts[folder] = replace(contents, entries=(store.entry(path), *contents.entries))
    return joined(store.url, parts)


def with_training_files(store: Store, catalog: Catalog) -> Catalog:
    """`catalog` with the schedulers, random states and progress that Accelerate or Trainer keep beside."""
    return with_model_files(store, read_around(store, catalog))


def with_model_files(store: Store, catalog: Catalog) -> Catalog:
    """`catalog` with the files of a Hugging Face model beside it: configuration, tokenizer and their like.

    Where the configuration ties the head to the embedding, a head that was saved as well is a replica. CorruptError
    for a configuration that is none, FitError for a head of another shape.
    """
    names = store.children()
    if CONFIG not in names:
        return catalog
    beside = read_beside(store, names)
    objects = {entry.path: (entry.size, entry.fingerprint) for entry in beside.entries}
    whole = replace(
        catalog,
        state={**beside.state, **catalog.state},
        objects={**catalog.objects, **objects},
        notes=(*catalog.notes, *beside.notes),
    )
    joined_head = folded(whole) if beside.config is not None and is_tied(beside.config) else whole
    lost = whole.tensors.keys() - joined_head.tensors.keys()
    return whole if any(len(whole.tensors[name].states) > 1 for name in lost) else joined_head


def with_meta(store: Store, catalog: Catalog) -> Catalog:
    """`catalog` with what Lightning keeps in ``meta.pt``, if that is there."""
    if META not in store.children():
        return catalog
    file = read_torch_file(store, META)
    root = file.root if isinstance(file.root, dict) else {"meta": file.root}
    told: Mapping[str, object] = renamed(root)
    step = root.get("global_step")
    return replace(
        catalog,
        step=step if catalog.step is None and type(step) is int else catalog.step,
        state={**told, **catalog.state},
        checksums=[*catalog.checksums, *file.checksums],
        objects={**catalog.objects, META: (file.entry.size, file.entry.fingerprint)},
    )
