"""A catalog laid out as a Megatron-Core checkpoint: what can be chosen, and which of the two forms makes of it what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout, Sharded
from ucp.errors import UsageError
from ucp.store import Store

from .write_around import Around
from .write_choice import FAMILY, MOMENTS, Choice, choose, is_trained
from .write_dist import DistTarget, make_dist
from .write_groups import regroup
from .write_legacy import LegacyTarget, make_legacy
from .write_scatter import scattered

_ENGINE = "names are those of layers of Transformer Engine; --to-flag te=no writes those of Megatron-Core's own"
_OPTIONS = "form optimizer dtype layers stages"
_WIDTHS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of the significand."""


def make_target(
    catalog: Catalog,
    store: Store,
    *,
    layout: Layout | None = None,
    form: str = "torch_dist",
    optimizer: str | None = None,
    dtype: str | None = None,
    layers: str = "stacked",
    stages: str | None = None,
    **unknown: Any,
) -> DistTarget | LegacyTarget:
    """Lay `catalog`, which has logical names and lies in `store`, out as a root with one checkpoint of Megatron-Core.

    `form` is ``torch_dist``, which is loaded at any number of ranks, or ``legacy``: a folder per model-parallel rank,
    for exactly the ranks that `layout` says. `optimizer` is that of the job: ``distributed``, ``float16`` (fp32 masters
    on every rank), ``fp32``, or ``none`` to write weights alone. `dtype` is that of the model's weights beside fp32
    masters. `layers` is ``each`` for keys of torch_dist that name the layer, where layers are alike. `stages` are the
    layers of each pipeline stage, such as ``7,8,8,7``, of the legacy form.

    UsageError for options that are none; FitError for sizes that the ranks do not divide, tensors that Megatron-Core's
    GPT has not, and states of some parameters only.
    """
    if unknown:
        raise UsageError(f"{FAMILY}: unknown option {next(iter(unknown))!r}", hint=f"known: {_OPTIONS}")
    choice = choose(
        catalog, layout or Layout(), form=form, optimizer=optimizer, dtype=dtype, layers=layers, stages=stages
    )
    grouped = None if choice.optimizer == "none" else regroup(catalog, ep=choice.degrees["ep"])
    held = scattered(grouped.catalog if grouped else catalog, choice)
    around = Around.of(catalog, store, choice, grouped, held.config, _rows(held, choice))
    if "transformer_impl" not in choice.args.values and (layout is None or "te" not in layout.flags):
        around = replace(around, notes=(*around.notes, _ENGINE))
    losses = tuple(_rounded(catalog, choice))
    if choice.form == "legacy":
        return make_legacy(around, held, losses=losses)
    return make_dist(around, held.parts[0][1], losses=losses)


def _rows(held: Sharded, choice: Choice) -> int:
    """Rows of the embedding with padding."""
    for _, part in held.parts:
        if "embedding.word_embeddings.weight" in part.tensors:
            rows = part.tensors["embedding.word_embeddings.weight"].states["value"].shape[0]
            return rows if choice.form == "torch_dist" else rows * choice.degrees["tp"]
    return 0


def _rounded(catalog: Catalog, choice: Choice) -> list[str]:
    """What would be rounded and is not kept exactly beside it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, tensor in catalog.tensors.items():
        for state, spec in tensor.states.items():
            if state == "value":
                masters = choice.optimizer in ("distributed", "float16") and is_trained(tensor)
                to = "float32" if masters else choice.weight_dtype(name, spec.dtype)
            elif state in MOMENTS and choice.optimizer != "none" and is_trained(tensor):
                to = "float32"
            else:
                continue
            if _narrower(to, spec.dtype):
                found.setdefault((state, spec.dtype, to), []).append(name)
    return [
        f"{state} of {len(names)} tensors, such as {names[0]}, rounded from {own} to {to}"
        for (state, own, to), names in found.items()
    ]


def _narrower(to: str, own: str) -> bool:
    """Whether some value of dtype `own` is none of `to`."""
    if to == own or to not in _WIDTHS or own not in _WIDTHS:
        return to != own
    # bfloat16 reaches as far as float32, float16 does not: neither of the two holds the other.
    return _WIDTHS[to] < _WIDTHS[own] or (own == "bfloat16" and to == "float16")
