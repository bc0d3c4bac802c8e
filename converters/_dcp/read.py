"""The catalog of a folder of DCP."""

from __future__ import annotations

import re
from dataclasses import replace

from ucp.catalog import Catalog, Source
from ucp.converter import Sharded
from ucp.errors import FitError, NotFoundError
from ucp.layout import Mesh
from ucp.store import Store

from .._hf.names import known_of
from .assemble import Choices, build
from .folder_kind import is_megatron, rank_metadata
from .folders import is_accelerate, read_parts, with_meta, with_model_files, with_training_files
from .metadata import METADATA, Metadata, read_metadata
from .pieces import read_contents
from .told import Told

# checkpoint/filesystem.py: the rank that wrote the file, and that rank's number for it.
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def read_catalog(store: Store, choices: Choices) -> Catalog:
    """See `ucp.converters.dcp.Dcp.read`."""
    if is_megatron(store):
        raise FitError(f"{store.url}: Megatron-Core wrote this folder", hint="read it as what it is: family megatron")
    if METADATA not in store.children():
        if not is_accelerate(store):
            raise _without_metadata(store)
        source = Source("dcp", "", Mesh({}), {"folders": "Accelerate's"})
        return with_training_files(store, build(store, read_parts(store), source, choices))
    entry = store.entry(METADATA)
    metadata = read_metadata(store)
    told = Told.of(metadata, store.url)
    contents = read_contents(store, told.without_aliases(metadata))
    contents = replace(contents, entries=(entry, *contents.entries))
    catalog = told.applied(build(store, contents, _source(metadata), replace(choices, kinds=told.kinds)))
    return with_model_files(store, with_meta(store, catalog))


def read_sharded(store: Store, choices: Choices) -> Sharded:
    """The same, with the program that fits the names where a ``config.json`` beside tells."""
    catalog = read_catalog(store, choices)
    sharded = Sharded([({}, catalog)], Mesh({}))
    known = known_of(catalog, catalog.state.get("hf_config"))
    if known is None:
        return sharded
    return replace(sharded, config=known.sizes, flags=known.flags, program=known.program)


def _source(metadata: Metadata) -> Source:
    files = {stored.object for _, stored in metadata.stored()}
    chunks = sum(len(entry.chunks) for entry in metadata.tensors.values())
    version = metadata.version or ""
    ranks = {found[1] for path in files if (found := _RANK_FILE.fullmatch(path))}
    detail = {"dcp_version": version or None, "files": len(files), "writers": len(ranks) or None, "chunks": chunks}
    return Source("dcp", version, Mesh({}), detail)


def _without_metadata(store: Store) -> NotFoundError | FitError:
    ranks = rank_metadata(store)
    if ranks:
        return FitError(
            f"{store.url}: every rank wrote metadata of its own ({ranks[0]} …): such a save can only be loaded by as "
            "many ranks",
            hint="save with collectives (use_collectives=True, the default of torch.distributed.checkpoint.save)",
        )
    return NotFoundError(
        f"{store.url}: there is no {METADATA} beside the .distcp files",
        hint="it is written last, so this save was cut short or the copy left out hidden files: use an earlier "
        "checkpoint, or copy the whole folder again",
    )
