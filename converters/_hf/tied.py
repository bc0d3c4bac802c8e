"""Tied weights as transformers files them: one name in the files, the others made again when they are loaded.

transformers/modeling_utils.py, ``remove_tied_weights_from_state_dict`` and ``tie_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import FitError
from ucp.plan import Key

from .._programs import PROGRAMS, from_config

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
_TIED = _HEADS + _EMBEDDINGS


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether it is known that ``from_pretrained`` ties the head to the embedding under this configuration.

    Not known is taken for no: then both names are written, which serves either way.
    """
    told = config.get("tie_word_embeddings")
    if isinstance(told, bool):
        return told
    return config.get("model_type") in PROGRAMS and bool(from_config(config).flags["tied"])


def written_names(catalog: Catalog, *, tied: bool) -> dict[str, str]:
    """What to call each tensor in the files, with the name it has in `catalog`.

    Where the model is tied, the embedding gives its name and those of the head and other embeddings are left out. Any
    other alias becomes a tensor of its own.
    """
    names = {name: name for name in catalog.tensors}
    for alias, name in catalog.ties.items():
        if not tied or not alias.endswith(_TIED) or not name.endswith(_TIED):
            names[alias] = name
        elif name.endswith(_HEADS) and not alias.endswith(_HEADS) and name in names:
            del names[name]
            names[alias] = name
    return names


def folded(catalog: Catalog) -> Catalog:
    """`catalog` of a tied model in which a head kept as a tensor of its own becomes a replica of the embedding.

    So the two are compared when they are copied, and one is written. FitError if their shapes or dtypes differ.
    """
    heads = [name for name in catalog.tensors if name.endswith(_HEADS)]
    embeddings = [name for name in catalog.tensors if name.endswith(_EMBEDDINGS)]
    if len(heads) != 1 or len(embeddings) != 1:
        return catalog
    (head,), (embedding,) = heads, embeddings
    specs = [catalog.tensors[name].states["value"] for name in (embedding, head)]
    if specs[0] != specs[1]:
        raise FitError(
            f"{catalog.url}: config.json ties {head} to {embedding}, and they are {specs[1]} and {specs[0]}",
            hint="give the config.json of this model: config=PATH",
        )
    keys = [Key(name, "value") for name in (embedding, head)]
    views, reductions = ({held.get(key) for key in keys} for held in (catalog.views, catalog.reductions))
    if len(views) > 1 or reductions != {None}:
        return catalog
    held, theirs = (catalog.fragments[key] for key in keys)
    last = max((fragment.replica for fragment in held), default=0) + 1
    copies = () if held == theirs else tuple(replace(one, replica=last + one.replica) for one in theirs)
    return replace(
        catalog,
        tensors={name: tensor for name, tensor in catalog.tensors.items() if name != head},
        fragments={**catalog.fragments, keys[0]: held + copies},
        witnesses={name: held for name, held in catalog.witnesses.items() if name != head},
        ties={alias: embedding if name == head else name for alias, name in catalog.ties.items()} | {head: embedding},
    )
