"""Names of the parameters of a pipeline's optimizers, which only number them (ZeRO 0).

A stage holds a run of layers and a second copy of each layer that it shares with an earlier stage. Its parameters come
in the order in which deepspeed/runtime/pipe/module.py registers them: tied layers first (``tied_modules``), then the
others by index. No file says where stages begin or which layer is tied; that every parameter of every layer must be in
some stage's optimizer does, or nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ucp.store import Store
from ucp.tree import Tree

from .naming import Candidates, Member, Names, names_of, unnamed

Groups = Sequence[Sequence[Member]]


def stage_names(
    store: Store,
    candidates: Candidates,
    stages: Sequence[Groups],
    hints: Sequence[Sequence[Sequence[Tree]]],
    path: str,
) -> tuple[list[Names], set[str]]:
    """The names of each stage's members, and the names of which stages hold copies.

    `candidates` are named by layer index, ``3.qkv.weight``.
    """
    layers: dict[str, list[str]] = {}
    for name in candidates.leaves:
        layers.setdefault(name.partition(".")[0], []).append(name)
    sizes = [sum(map(len, groups)) for groups in stages]
    ways = [way for tied in ("", *layers) if (way := _cut(layers, sizes, tied)) is not None]
    found = [_deal(store, candidates, way, stages, hints, path) for way in ways]
    fitting = [(way, names) for way, names in zip(ways, found, strict=True) if names is not None]
    if len(fitting) == 1:
        way, names = fitting[0]
        held = [name for stage in way for name in stage]
        tied = {name for name in held if held.count(name) > 1}
        if tied:
            names[0].notes.append(
                f"{path}: the tied layer is named by its index, {min(tied).partition('.')[0]}: no file has its key"
            )
        return names, tied
    why = f"{len(fitting)} ways to cut the layers into {len(stages)} stages fit"
    nothing = [unnamed(list(candidates.leaves), [len(group) for group in groups], path, why) for groups in stages]
    return [nothing[0], *(replace(names, open={}) for names in nothing[1:])], set()


def _cut(layers: dict[str, list[str]], sizes: Sequence[int], tied: str) -> list[list[str]] | None:
    """Names of each stage's parameters in its own order if `tied` is the layer that stages share; None if none fit."""
    waiting = list(layers)
    stages = []
    for stage, size in enumerate(sizes):
        own: list[str] = []
        names = list(layers.get(tied, ())) if stage and tied not in waiting else []
        while waiting and len(names) + sum(len(layers[layer]) for layer in own) < size:
            own.append(waiting.pop(0))
        names += _flat(layers, sorted(own, key=lambda layer: layer != tied))
        if len(names) != size:
            return None
        stages.append(names)
    twice = tied != "" and sum(layers[tied][0] in stage for stage in stages) > 1
    return None if waiting or (tied and not twice) else stages


def _flat(layers: dict[str, list[str]], chosen: Iterable[str]) -> list[str]:
    return [name for layer in chosen for name in layers[layer]]


def _deal(
    store: Store,
    candidates: Candidates,
    way: Sequence[Sequence[str]],
    stages: Sequence[Groups],
    hints: Sequence[Sequence[Sequence[Tree]]],
    path: str,
) -> list[Names] | None:
    """Names of all stages if the stages are cut this `way`; None if one of them cannot be."""
    found = []
    for names, groups, hint in zip(way, stages, hints, strict=True):
        own = Candidates({name: candidates.leaves[name] for name in names})
        dealt = names_of(store, own, groups, hint, path)
        if len(dealt.open) == len(names):
            return None
        found.append(dealt)
    return found
