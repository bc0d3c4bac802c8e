"""The catalog of a step folder of ByteCheckpoint."""

from __future__ import annotations

from dataclasses import replace

from ucp.catalog import Catalog, Source
from ucp.errors import NotFoundError
from ucp.layout import Mesh
from ucp.store import Store

from .._dcp.assemble import Choices, build
from .._dcp.contents import joined
from .._dcp.metadata import METADATA, Metadata
from .extra import read_extra
from .folders import PARTS, locate
from .pieces import read_part


def read_catalog(store: Store, *, step: int | str | None, choices: Choices) -> Catalog:
    """See `ucp.converters.bytecheckpoint.ByteCheckpoint.read`."""
    folder = locate(store, step)
    found = {part: read_part(store, f"{folder}{part}") for part in PARTS if _has(store, f"{folder}{part}")}
    contents = joined(store.url, {part: contents for part, (contents, _) in found.items()})
    extra = read_extra(store, folder)
    contents = replace(
        contents,
        entries=(*contents.entries, *extra.entries),
        checksums=(*contents.checksums, *extra.checksums),
    )
    told = extra.state.get("step", extra.state.get("global_step"))
    prefixed = replace(choices, model=f"model.{choices.model or ''}")
    catalog = build(store, contents, _source(found["model"][1], folder), prefixed)
    options = {
        name: value for name, value in {**catalog.options, "model": choices.model, "step": step}.items() if value
    }
    return replace(
        catalog,
        step=told if catalog.step is None and isinstance(told, int) else catalog.step,
        state={**catalog.state, **extra.state},
        notes=(*catalog.notes, *extra.notes),
        options=options,
    )


def _has(store: Store, folder: str) -> bool:
    """Whether a part was saved; NotFoundError if it was begun and not finished."""
    names = store.children(folder)
    if names and METADATA not in names:
        raise NotFoundError(
            f"{store.url}/{folder}/{METADATA}: no such file",
            hint="it is written last, so this save was cut short: use an earlier checkpoint",
        )
    return bool(names)


def _source(metadata: Metadata, folder: str) -> Source:
    told = metadata.extra.get("bytecheckpoint_version")
    version = told if isinstance(told, str) else ""
    return Source("bytecheckpoint", version, Mesh({}), {"folder": folder.removesuffix("/") or None})
