"""One Megatron checkpoint as a catalog, or as its ranks hold it, and the program that gives it logical names."""

from __future__ import annotations

import re
from dataclasses import replace

from ucp.catalog import Catalog
from ucp.converter import Sharded
from ucp.errors import FitError, UsageError
from ucp.layout import Mesh
from ucp.store import Store

from .dist import read_dist
from .folder import locate
from .sizes import sizes_of

_NUMBERED = re.compile(r"decoder\.layers\.\d+\.")
_TABLE = "embedding.word_embeddings.weight"


def read_catalog(
    store: Store, *, names: str = "logical", iteration: str | int | None = None, vocab: str | int | None = None
) -> Catalog:
    """The catalog of the checkpoint; see `ucp.converters.megatron.Megatron.read`."""
    sharded = read_sharded(store, iteration=iteration, vocab=vocab)
    given = {"names": names, "iteration": iteration, "vocab": vocab}
    options = {option: value for option, value in given.items() if value not in (None, "logical")}
    if names == "stored":
        return replace(_alone(sharded, store), options=options)
    if names != "logical":
        raise UsageError(f"megatron: names is `logical` or `stored`, not {names!r}")
    from ucp.mapping import as_program, consolidate, known_flags

    assert sharded.program is not None
    program = as_program(sharded.program)
    catalog = consolidate(
        sharded.parts,
        program,
        mesh=sharded.mesh,
        config=sharded.config,
        flags=known_flags(program, sharded.flags),
        cuts=sharded.cuts,
    )
    return replace(catalog, options={**catalog.options, **options})


def read_sharded(store: Store, *, iteration: str | int | None = None, vocab: str | int | None = None) -> Sharded:
    """The checkpoint by mesh coordinates; see `ucp.converters.megatron.Megatron.sharded`."""
    folder = locate(store, iteration)
    given = _vocab(vocab)
    if folder.kind == "legacy":
        from .legacy import read_legacy

        return read_legacy(store, folder, vocab=given)
    catalog, dist = read_dist(store, folder)
    layered = any(_NUMBERED.match(key) for key in dist.model)
    sizes, notes = sizes_of(dist.args, dist.model[_TABLE].shape[0] if _TABLE in dist.model else None, vocab=given)
    catalog = replace(catalog, notes=(*catalog.notes, *notes))
    program = "megatron_core_layers" if layered else "megatron_core_stacked"
    # Norms before experts are spelled otherwise with Transformer Engine; in all else keys are the same.
    flags = {**dist.args.flags(), "te": any("pre_mlp_layernorm." in key for key in dist.model)}
    return Sharded([({}, catalog)], Mesh({}), config=sizes, flags=flags, program=program)


def _alone(sharded: Sharded, store: Store) -> Catalog:
    if len(sharded.parts) != 1:
        raise FitError(
            f"{store.url}: {len(sharded.parts)} ranks hold tensors of the same names",
            hint="read it with logical names, or through a program of your own",
        )
    return sharded.parts[0][1]


def _vocab(vocab: str | int | None) -> int | None:
    if vocab is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", str(vocab)) or not int(vocab):
        raise UsageError(f"megatron: vocab is a number of tokens, not {vocab!r}")
    return int(vocab)
