"""Checkpoints of the pipeline engine: weights by layer, one optimizer per stage, tied layers in several stages.

Files and names: deepspeed/runtime/pipe/module.py (``_build``, ``save_state_dict``): a layer's file has local names; in
the module a layer is called by its index, and a tied one ``tied_modules.<key>``. The engine keeps only a tied layer's
``tied_weight_attr`` in step between stages (``_synchronize_tied_weights``); anything else in it trains by itself in
each stage, and only the first stage's copy is in the layer's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ucp.catalog import ParamGroup
from ucp.container.torchfile import leaf_bytes
from ucp.errors import CorruptError, FitError, NotFoundError
from ucp.layout import Box, FlatRange, Shape, itemsize
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .found import Found, Stored
from .load import MISSING_HINT, RankFile, Save
from .weights import buffer_names

TIED = "tied_modules."
_SAMPLES = 16
_SAMPLE_LENGTH = 64


def layer_entries(save: Save, optimized: Mapping[str, Shape]) -> dict[str, Tree]:
    """The weights of all layers by the name that the whole module gives them.

    NotFoundError if the layer of an optimized parameter has no file, FitError if a file could be of two tied layers.
    """
    known = [*optimized, *buffer_names(save)]
    entries: dict[str, Tree] = {}
    for layer, file in save.layers.items():
        prefix = _prefix(layer, file, known)
        for name, node in file.root.items():
            entries[f"{prefix}{name}"] = node
    for name in optimized:
        if name not in entries:
            raise _missing_layer(save, name)
    return entries


def local_entries(save: Save) -> dict[str, Tree]:
    """The weights of all layers named by layer index, tied layers too."""
    return {f"{layer}.{name}": node for layer, file in save.layers.items() for name, node in file.root.items()}


def _prefix(layer: int, file: RankFile, known: Sequence[str]) -> str:
    plain = f"{layer}."
    if any(name.startswith(plain) for name in known):
        return plain
    tied = {".".join(name.split(".")[:2]) + "." for name in known if name.startswith(TIED)}
    fitting = [prefix for prefix in sorted(tied) if _locals(known, prefix) <= file.root.keys()]
    if len(fitting) > 1:
        raise FitError(f"{file.path}: could be any of the tied layers {' '.join(fitting)}")
    return fitting[0] if fitting else plain


def _locals(known: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in known if name.startswith(prefix)}


def _missing_layer(save: Save, name: str) -> NotFoundError:
    index = name.partition(".")[0]
    layer = f"layer_{int(index):02d}-model_states.pt" if index.isdigit() else "a layer file"
    return NotFoundError(f"{save.folder.path}{layer}: missing; it holds {name}", hint=MISSING_HINT)


def merge_stages(
    store: Store, stages: Sequence[Found], *, replicated: Callable[[str], bool]
) -> tuple[Found, dict[int, dict[str, dict[str, Tree]]]]:
    """One optimizer out of those of all stages; `replicated` tells of parameters whether several may hold them.

    A tied parameter that several stages hold is one parameter with replicas. Where a later stage trained its own copy,
    the first stage's is the parameter, and the other is given back: {stage: {name: {state: pieces}}}.
    """
    merged = Found(groups=_merge_groups([stage.groups for stage in stages]))
    own: dict[int, dict[str, dict[str, Tree]]] = {}
    for number, stage in enumerate(stages):
        merged.notes += [note for note in stage.notes if note not in merged.notes]
        merged.undecided.update(stage.undecided)
        merged.degrees |= stage.degrees
        for name, shape in stage.shapes.items():
            if name not in merged.shapes:
                merged.shapes[name] = shape
                merged.states[name] = stage.states[name]
                merged.scalars[name] = stage.scalars.get(name, {})
            elif not (name.startswith(TIED) or name in stage.tied or replicated(name)) or merged.shapes[name] != shape:
                raise CorruptError(f"{name} is in the optimizer of two pipeline stages, and no tied layer")
            elif any(
                _trained_apart(store, merged.states[name][state], stored)
                for state, stored in stage.states[name].items()
                if state in merged.states[name]
            ):
                own.setdefault(number, {})[name] = {s: _pieces(stored) for s, stored in stage.states[name].items()}
            else:
                add_replicas(merged.states[name], stage.states[name])
    if own:
        names = sorted({name for copies in own.values() for name in copies})
        merged.notes.append(
            f"pipeline stages trained their own copies of {' '.join(names)}: the first stage's is the parameter, "
            "the others are carried"
        )
    return merged, own


def _merge_groups(stages: Sequence[Sequence[ParamGroup]]) -> list[ParamGroup]:
    """Groups with the same number and options in all stages are one; else every stage keeps its own."""
    if len({len(groups) for groups in stages}) == 1:
        rows = list(zip(*stages, strict=True))
        if all(group.options == row[0].options for row in rows for group in row):
            return [
                replace(row[0], params=tuple(dict.fromkeys(n for group in row for n in group.params))) for row in rows
            ]
    seen: set[str] = set()
    found: list[ParamGroup] = []
    for groups in stages:
        found += [replace(group, params=tuple(n for n in group.params if n not in seen)) for group in groups]
        seen.update(_names(groups))
    return [group for group in found if group.params]


def _names(groups: Iterable[ParamGroup]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group.params))


def add_replicas(states: dict[str, Stored], copies: Mapping[str, Stored]) -> None:
    """Add another rank's `copies` of a parameter to its `states`; CorruptError if it has others."""
    for state, stored in copies.items():
        if state not in states or states[state].spec != stored.spec:
            raise CorruptError(f"a parameter that several ranks hold has another {state} in one of them")
        replica = 1 + max((fragment.replica for fragment in states[state].fragments), default=0)
        added = tuple(replace(fragment, replica=replica) for fragment in stored.fragments)
        states[state] = Stored(stored.spec, states[state].fragments + added)


def _pieces(stored: Stored) -> list[TensorLeaf]:
    return [TensorLeaf(fragment.extent) for fragment in stored.fragments]


def _trained_apart(store: Store, first: Stored, other: Stored) -> bool:
    """Whether two copies of a state hold wholly different values somewhere, seen from a few short samples of them.

    Damage to a copy that is in step is found when the replicas are compared in full.
    """
    width = itemsize(first.spec.dtype)
    for start in range(0, first.spec.size, max(first.spec.size // _SAMPLES, 1)):
        one, two = (_sample(store, stored, start) for stored in (first, other))
        cut = range(0, min(len(one), len(two)), width)
        if 2 * sum(one[i : i + width] != two[i : i + width] for i in cut) > len(cut):
            return True
    return False


def _sample(store: Store, stored: Stored, start: int) -> bytes:
    """Bytes of a few elements from position `start` on, out of the primary fragment that holds it."""
    for fragment in stored.fragments:
        flat = fragment.as_flat(stored.spec.shape)
        if fragment.replica or flat is None or not isinstance(flat.region, FlatRange):
            continue
        if flat.region.start <= start < flat.region.stop:
            length = min(_SAMPLE_LENGTH, flat.region.stop - start)
            return leaf_bytes(store, TensorLeaf(flat.extent.sub(Box((start - flat.region.start,), (length,)))))
    return b""
