"""Reads the optimizers of a mixture of experts without ZeRO.

Every rank of the largest expert-parallel group saves the whole optimizer as it has it: what is no expert, and its own
experts (deepspeed/runtime/engine.py, ``_save_moe_checkpoint``); rank 0 saves it in the model file once more. What
several ranks hold is one parameter with replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice, product

from ucp.errors import ConflictError, CorruptError, FitError
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from . import nodes
from .autoep import stacked_of
from .experts import Experts, experts_of, layer_of, named_degree
from .found import Found
from .load import MIXED_HINT, RankFile, Save
from .naming import candidates_of
from .pipeline import add_replicas
from .same import Comparison
from .stage0 import base_groups_of, read_plain_optimizers
from .weights import buffer_names

_MOST_WAYS = 4096
_HINT = "save with ZeRO 1, which saves names"


def read_expert_optimizers(
    store: Store, save: Save, comparison: Comparison, entries: Mapping[str, Tree], frozen: Sequence[str]
) -> Found:
    """The optimizer of all ranks; `entries` are all of the module's tensors in its order.

    ConflictError for files of different saves, FitError if it cannot be told which layer's experts are whose.
    """
    model, files = save.model(0), [file for _, file in sorted(save.expert_optims.items())]
    if stacked_of(save):
        raise FitError(f"{files[0].path}: experts of AutoEP without ZeRO cannot be read", hint=_HINT)
    if save.mesh["pp"] > 1:
        raise FitError(f"{files[0].path}: experts in a pipeline without ZeRO cannot be read", hint=_HINT)
    if not comparison.equal(model.root.get("optimizer"), files[0].root.get("optimizer")):
        raise ConflictError(f"{model.path} and {files[0].path} hold different optimizers", hint=MIXED_HINT)
    if save.dp % len(files):
        raise ConflictError(
            f"{files[0].path}: {len(files)} expert-parallel ranks do not divide {save.dp} ranks", hint=MIXED_HINT
        )
    experts, buffers = experts_of(save), buffer_names(save)
    leaves = candidates_of(entries, buffers, frozen).leaves
    degrees = _degrees(files[0], experts, leaves, len(files))
    found = []
    for number, file in enumerate(files):
        own = {name: leaf for name, leaf in leaves.items() if _holds(experts, degrees, name, number, len(files))}
        rank = replace(save, models={(0, 0): file})
        patterns = [pattern for pattern in frozen if any(fnmatchcase(name, pattern) for name in own)]
        chosen = candidates_of(own, buffers, patterns)
        by_name = {name: degrees[layer] for name in own if (layer := layer_of(name)[0]) is not None}
        found.append(read_plain_optimizers(store, rank, comparison, chosen, degrees=by_name)[0])
    merged = _merged(found, save.dp // len(files) if experts.data_first else 1)
    merged.degrees = set(degrees.values())
    return merged


def _holds(experts: Experts, degrees: Mapping[str, int], name: str, number: int, largest: int) -> bool:
    """Whether rank `number` of the largest expert-parallel group, of `largest` ranks, holds the parameter."""
    layer, expert = layer_of(name)
    if layer is None:
        return True
    ep = degrees[layer]
    e = number * ep // largest if experts.data_first else number % ep
    return expert // (experts.counts[layer] // ep) == e


def _degrees(file: RankFile, experts: Experts, leaves: Mapping[str, TensorLeaf], largest: int) -> dict[str, int]:
    """Expert-parallel degree of every layer: the only way that gives each of the optimizer's groups its parameters."""
    wanted: Counter[int] = Counter()
    for group in base_groups_of(file):
        if (ep := named_degree(group)) is not None:
            wanted[ep] += len(nodes.sequence(group.get("params", ()), file.path))
    known = sorted(wanted) or [largest]
    sizes = Counter(layer for name in leaves if (layer := layer_of(name)[0]) is not None)
    choices = [[ep for ep in known if not experts.counts[layer] % ep] for layer in experts.counts]
    ways = [dict(zip(experts.counts, way, strict=True)) for way in islice(product(*choices), _MOST_WAYS)]
    if len(known) > 1:
        ways = [way for way in ways if _filled(way, sizes) == wanted]
    if len(ways) != 1:
        raise FitError(f"{file.path}: {len(ways)} ways to spread experts over ranks fit the optimizer", hint=_HINT)
    return ways[0]


def _filled(way: Mapping[str, int], sizes: Mapping[str, int]) -> Counter[int]:
    filled: Counter[int] = Counter()
    for layer, ep in way.items():
        filled[ep] += sizes[layer] // ep
    return filled


def _merged(found: Sequence[Found], apart: int) -> Found:
    """One optimizer out of those of the expert-parallel ranks, whose data-parallel ranks are so many `apart`."""
    merged = found[0]
    for number, other in enumerate(found[1:], 1):
        merged.notes += [note for note in other.notes if note not in merged.notes]
        merged.rest[number * apart] = other.rest[0]
        for name, shape in other.shapes.items():
            if name not in merged.shapes:
                merged.shapes[name], merged.states[name] = shape, other.states[name]
                merged.scalars[name] = other.scalars.get(name, {})
            elif merged.scalars.get(name, {}) != other.scalars.get(name, {}):
                raise ConflictError(f"{name}: ranks stand at different steps", hint=MIXED_HINT)
            elif name not in other.undecided and name not in merged.undecided:
                add_replicas(merged.states[name], other.states[name])
        merged.undecided.update(other.undecided)
        _add_groups(merged, other)
    return merged


def _add_groups(merged: Found, other: Found) -> None:
    pairs = list(zip(merged.groups, other.groups, strict=False))
    if len(merged.groups) != len(other.groups) or any(a.options != b.options for a, b in pairs):
        raise CorruptError("expert-parallel ranks have other groups of parameters", hint=MIXED_HINT)
    merged.groups = [replace(a, params=tuple(dict.fromkeys((*a.params, *b.params)))) for a, b in pairs]
