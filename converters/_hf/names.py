"""The names that a model's files have, from logical names or from those of a module in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import FitError, ProgramError
from ucp.layout import Mesh

from .._programs import Known, from_config

_FUSED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
_NUMBER = re.compile(r"(\d+)")
_MESH = Mesh({})


def known_of(catalog: Catalog, config: Mapping[str, Any] | None) -> Known | None:
    """What `config` says of the names in `catalog`, if it is of a model that has a program."""
    with suppress(FitError):
        return None if config is None else from_config(config, in_memory=in_memory(catalog, config))
    return None


def in_memory(catalog: Catalog, config: Mapping[str, Any]) -> bool:
    """Whether names are those of a transformers 5 module's ``state_dict()`` where its files have others.

    Modules fuse a layer's experts, and GPT-NeoX calls its head as all models do (transformers/conversion_mapping.py).
    """
    if any(_FUSED.fullmatch(name) for name in catalog.tensors):
        return True
    head = "lm_head.weight" in catalog.tensors or "lm_head.weight" in catalog.ties
    return config.get("model_type") == "gpt_neox" and head


def to_files(catalog: Catalog, config: Mapping[str, Any], layout: Layout) -> Catalog:
    """`catalog` under the names of the files of the model that `config` describes.

    Logical tensors are laid out by the program of `layout`, or the one that fits the model; tensors named as in memory
    are named as in files; all others keep their names. FitError if no program is shipped for the model, or the tensors
    do not fit it.
    """
    from ucp.mapping import is_logical

    if layout.program is not None or is_logical(catalog):
        return _scattered(catalog, config, layout)
    known = known_of(catalog, config)
    if known is None or not known.flags.get("in_memory"):
        return catalog
    return _scattered(_logical(catalog, known), config, layout)


def misfit(catalog: Catalog, config: Mapping[str, Any]) -> str | None:
    """What of `catalog`, whose names are those of files, is not as the model of `config` has it; None if all is.

    Only models that have a program are known. ``from_pretrained`` makes up what it misses.
    """
    known = known_of(catalog, config)
    if known is None:
        return None
    try:
        _logical(catalog, known)
    except (FitError, ProgramError) as error:
        return error.message
    return None


def _logical(catalog: Catalog, known: Known) -> Catalog:
    from ucp.lang import load_program
    from ucp.mapping import consolidate

    program = load_program(known.program)
    return consolidate([({}, catalog)], program, mesh=_MESH, config=known.sizes, flags=known.flags)


def _scattered(catalog: Catalog, config: Mapping[str, Any], layout: Layout) -> Catalog:
    from ucp.lang import load_program
    from ucp.mapping import scatter

    known = from_config(config) if layout.program is None else Known("")
    program = layout.program or load_program(known.program)
    flags = {**known.flags, **layout.flags}
    sharded = scatter(catalog, program, mesh=_MESH, sizes=layout.sizes, config=known.sizes, flags=flags)
    ((_, part),) = sharded.parts
    # Layer after layer, as modules have them: so few files hold what one stage of a pipeline needs.
    return replace(part, tensors=dict(sorted(part.tensors.items(), key=lambda item: _natural(item[0]))))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(name)]
