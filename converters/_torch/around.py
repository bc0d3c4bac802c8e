"""What Accelerate and Trainer keep beside weights: optimizers, schedulers, random states, and how far training is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ucp.catalog import Catalog
from ucp.container.torchfile import TorchFile, TorchFiles
from ucp.errors import CorruptError, FitError
from ucp.store import Entry, Store
from ucp.tree import Tree

from .files import Files, is_training_folder, number, sort_out
from .optimizer import Numbering, with_optimizers
from .order import module_order
from .spellings import is_optimizer
from .weights import batch_norm_buffers

_MOST_TEXT_BYTES = 1 << 26
_AGAIN = "copy the folder again from where it was written"


@dataclass(slots=True)
class Around:
    """What is beside the weights: state dicts of optimizers by file, training state, and what was read for it."""

    optimizers: dict[str, Mapping[Any, Tree]] = field(default_factory=dict)
    state: dict[str, Tree] = field(default_factory=dict)
    step: int | None = None
    files: list[TorchFile] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def has_training_files(names: Iterable[str]) -> bool:
    """Whether a folder's `names` show training state of Accelerate or Trainer beside weights."""
    return is_training_folder(names)


def read_around(
    store: Store,
    catalog: Catalog,
    *,
    ordered: bool = False,
    model_type: str | None = None,
    frozen: Sequence[str] = (),
    order: Sequence[str] = (),
) -> Catalog:
    """`catalog`, which has the weights in `store`, with the training state that lies beside them.

    States, steps and groups of optimizers go to the tensors they belong to; the rest to `Catalog.state` in the words of
    `ucp.training`; what was read to `objects` and `checksums`. The same catalog where nothing lies there.

    Optimizers number their parameters. `ordered` says that the catalog has its tensors in the module's order, which
    files of safetensors do not keep; without it the order is that of `model_type`, where that is known. `frozen` and
    `order` are patterns as in `ucp.converters.torch_save.TorchSave.read`. What cannot be told is `undecided`.

    FitError for a pattern that matches nothing, or an optimizer of unknown form; whatever the file readers raise.
    """
    found = _read(store, sort_out(store.children()))
    if not found.entries and not found.files:
        return catalog
    catalog = _with_buffers(catalog)
    checksums = [checksum for file in found.files for checksum in file.checksums]
    entries = [*(file.entry for file in found.files), *found.entries]
    whole = replace(
        catalog,
        step=found.step if catalog.step is None else catalog.step,
        state={**catalog.state, **found.state},
        checksums=[*catalog.checksums, *checksums],
        objects={**catalog.objects, **{entry.path: (entry.size, entry.fingerprint) for entry in entries}},
    )
    if not found.optimizers:
        return replace(whole, notes=(*whole.notes, *_without_optimizer(found, catalog)))
    module = list(catalog.tensors) if ordered else module_order(_parameters(catalog), model_type)
    return with_optimizers(whole, store, found.optimizers, Numbering(module, frozen, order), checksums)


def _without_optimizer(found: Around, catalog: Catalog) -> list[str]:
    """A scheduler is saved with an optimizer always: where that is not, it was lost or removed."""
    if "lr_scheduler" not in found.state or catalog.param_groups:
        return []
    return ["a scheduler lies here and no optimizer: its file was not copied or removed, and its states are not read"]


def _with_buffers(catalog: Catalog) -> Catalog:
    """Running statistics of batch norm are no parameters, as files of weights do not say."""
    buffers = {name: replace(catalog.tensors[name], kind="buffer") for name in batch_norm_buffers(catalog.tensors)}
    return replace(catalog, tensors={**catalog.tensors, **buffers})


def _parameters(catalog: Catalog) -> list[str]:
    return [name for name, tensor in catalog.tensors.items() if tensor.kind == "parameter"]


def _read(store: Store, files: Files) -> Around:
    found = Around()
    reader = TorchFiles(store)
    for path in files["optimizer"]:
        tree = _torch(found, reader, path)
        if not is_optimizer(tree):
            raise FitError(f"{store.url}/{path}: not the state dict of a torch optimizer")
        found.optimizers[path] = tree
    schedulers = [_torch(found, reader, path) for path in files["scheduler"]]
    if schedulers:
        found.state["lr_scheduler"] = schedulers[0] if len(schedulers) == 1 else schedulers
    for path in files["scaler"]:
        found.state["loss_scale"] = _torch(found, reader, path)
    ranks = {number(path): _torch(found, reader, path) for path in files["rng"]}
    if ranks:
        found.state["rng"] = ranks[0] if list(ranks) == [0] else {"rank": ranks}
    found.state.update({path: _torch(found, reader, path) for path in files["torch"]})
    for path in files["text"]:
        _read_trainer(store, found, path)
    return found


def _torch(found: Around, reader: TorchFiles, path: str) -> Tree:
    file = reader.read(path)
    found.files.append(file)
    return file.root


def _read_trainer(store: Store, found: Around, path: str) -> None:
    """``trainer_state.json`` as it is, and the step in it (transformers/trainer_callback.py, ``TrainerState``)."""
    entry = store.entry(path)
    where = f"{store.url}/{path}"
    if entry.size > _MOST_TEXT_BYTES:
        raise CorruptError(f"{where}: {entry.size} bytes are too many for such a file", hint=_AGAIN)
    text = store.read(path, 0, entry.size)
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not JSON: {error}", hint=_AGAIN) from None
    step = told.get("global_step") if isinstance(told, dict) else None
    if type(step) is not int:
        raise CorruptError(f"{where}: no global_step in it", hint=_AGAIN)
    found.step = step
    found.state[path] = text
    found.entries.append(entry)
