"""A catalog laid out as ``from_pretrained`` takes it: safetensors files, index, small files, the configuration last.

A folder without ``config.json`` (or ``adapter_config.json``) is no model to any of the libraries, so that this is the
root: it is put when everything else is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import FitError, UsageError
from ucp.plan import Digests, Task
from ucp.store import Store

from .model import config_of, is_adapter, with_dtype, with_model
from .names import misfit, to_files
from .options import cast_to, dtype_of, rounds
from .places import ADAPTER, ADAPTER_CONFIG, CONFIG, SAFE
from .small import document, left_out, small_files
from .split import Item, file_names, file_task, split
from .tied import folded, is_tied, written_names

FAMILY = "hf"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class HfFolder:
    """A folder of weights to be written. `config` is the content of its root."""

    catalog: Catalog
    tasks: tuple[Task, ...]
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    root: str = CONFIG
    family: str = FAMILY

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """Tokenizer and other small files, the index, the configuration."""
        del digests
        taken = [self.root, *(task.object for task in self.tasks)]
        yield from small_files(self.catalog, taken)
        if self.index is not None:
            yield f"{SAFE}.index.json", (json.dumps(self.index, indent=2, sort_keys=True) + "\n").encode()
        yield self.root, document(self.config)


def make_target(
    catalog: Catalog, store: Store, *, layout: Layout, shard_bytes: int, dtype: str | None, config: str | None
) -> HfFolder:
    """Lay `catalog` out; see `ucp.converters.hf.HuggingFace.target`."""
    del store
    if layout.mesh.axes:
        raise UsageError(f"{FAMILY}: files hold whole tensors and no ranks' shards", hint="leave --mesh out")
    catalog = with_model(catalog, config)
    told = config_of(catalog)
    if is_adapter(catalog):
        return _adapter(catalog, told, dtype_of(dtype))
    tied = is_tied(told)
    named = to_files(catalog, told, layout)
    named = folded(named) if tied else named
    items = _items(named, written_names(named, tied=tied), dtype_of(dtype))
    files = split(items, shard_bytes)
    names = file_names(SAFE, len(files))
    made, notes = with_dtype(told, (item.spec for item in items))
    odd = misfit(named, told) if layout.program is None else None
    if odd is not None:
        notes.append(f"{CONFIG} is of a model that these tensors do not quite fit: {odd}")
    return HfFolder(
        catalog,
        tuple(file_task(name, held, _METADATA) for name, held in zip(names, files, strict=True)),
        made,
        _index(named, names, files) if len(files) > 1 else None,
        (*left_out(catalog), *notes),
        tuple(_losses(items)),
    )


def _adapter(catalog: Catalog, config: Mapping[str, Any], dtype: str | None) -> HfFolder:
    """An adapter is one file, whatever its size (peft/peft_model.py, ``save_pretrained``)."""
    items = _items(catalog, written_names(catalog, tied=False), dtype)
    return HfFolder(
        catalog,
        (file_task(ADAPTER, items, _METADATA),),
        config,
        None,
        tuple(left_out(catalog)),
        tuple(_losses(items)),
        root=ADAPTER_CONFIG,
    )


def _items(catalog: Catalog, names: Mapping[str, str], dtype: str | None) -> list[Item]:
    """The tensors by the names they will have."""
    items = []
    for written, name in names.items():
        if "value" not in catalog.tensors[name].states:
            raise FitError(f"{catalog.url}: {name} has no value", hint="it cannot be written as weights")
        cover = catalog.cover(name, "value")
        items.append(Item(written, cover, cast_to(cover.spec.dtype, dtype), catalog.witness(name)))
    return items


def _index(catalog: Catalog, names: Sequence[str], files: Sequence[Sequence[Item]]) -> dict[str, Any]:
    """The index as transformers writes it (modeling_utils.py, ``save_pretrained``)."""
    items = [item for held in files for item in held]
    trained = [item for item in items if catalog.tensors[item.cover.key.name].kind != "buffer"]
    return {
        "metadata": {
            "total_parameters": sum(item.spec.size for item in trained),
            "total_size": sum(item.spec.nbytes for item in items),
        },
        "weight_map": {item.name: name for name, held in zip(names, files, strict=True) for item in held},
    }


def _losses(items: Sequence[Item]) -> Iterator[str]:
    rounded = [item for item in items if rounds(item.cover.spec.dtype, item.dtype)]
    if rounded:
        first = rounded[0]
        yield (f"rounded: {len(rounded)} tensors, such as {first.name} from {first.cover.spec.dtype} to {first.dtype}")
