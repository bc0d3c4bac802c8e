"""Programs read plainly at known sizes: which tensors each coordinate holds and what every element of them is.

Knows nothing of the checker, the solver and the compiler; names are made by trying every number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ucp.lang.ast import Capture, Computed, Pattern, State
from ucp.lang.flat import Equation, Flat, flatten
from ucp.layout import Mesh, Setting, default_targets, without_dims
from ucp.layout.expr import Concat, Dim, Layout
from ucp.testing.oracle import Element, read_dim, read_shard, tensor_paths, value
from ucp.testing.vectors import program_of, setting_of

Held = dict[tuple[tuple[tuple[str, int], ...], str], tuple[tuple[int, ...], list[set[tuple[str, int]]]]]
"""By coordinate and name: the shape, and per element the (tensor, position) it is; more than one where dims lack."""


def read_vector(vector: Mapping[str, Any]) -> Held:
    """Everything that every coordinate holds."""
    flat = flatten(program_of(vector))
    given = setting_of(vector)
    mesh, fine = given["mesh"], _fine_mesh(flat, given["mesh"], given["sizes"])
    setting = Setting(fine, given["sizes"], given["cuts"], given["placements"])
    flags = {**given["flags"], **{axis: n > 1 for axis, n in fine.axes}}
    found: Held = {}
    for coordinate in mesh.coordinates():
        at = {**coordinate, **_fine_coordinate(flat, coordinate, fine)}
        for equation in flat.equations:
            if all(flags[c.flag] == c.wanted for c in equation.conditions) and _here(equation, at, mesh):
                for name, shard in _tensors(equation, flat, setting, at, vector):
                    found[tuple(sorted(coordinate.items())), name] = shard
    return found


def _fine_mesh(flat: Flat, mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    axes = dict(mesh.axes)
    for factor in flat.factors:
        rest = axes[factor.axis] // math.prod(sizes.get(part, 1) for part in factor.parts)
        axes |= {part: sizes.get(part, rest) for part in factor.parts}
    return Mesh(axes)


def _fine_coordinate(flat: Flat, coordinate: Mapping[str, int], mesh: Mesh) -> dict[str, int]:
    found = {}
    for factor in flat.factors:
        parts = Mesh({part: mesh[part] for part in factor.parts})
        found |= parts.coordinate(coordinate[factor.axis])
    return found


def _here(equation: Equation, at: Mapping[str, int], mesh: Mesh) -> bool:
    return all(at[place.axis] == range(mesh[place.axis])[place.index] for place in equation.on)


def _tensors(
    equation: Equation, flat: Flat, setting: Setting, at: Mapping[str, int], vector: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[tuple[int, ...], list[set[tuple[str, int]]]]]]:
    axes = {axis for axis, _ in setting.mesh.axes}
    numbers = [part for part in equation.source.parts if isinstance(part, Capture) and part.name not in axes]
    rows = [[spot.leaves[c.name] for spot in read_dim(Dim(c.name, c.cuts), setting, at, None) if spot] for c in numbers]
    for local in itertools.product(*(range(len(row)) for row in rows)):
        own = dict(zip((c.name for c in numbers), local, strict=True)) | dict(at)
        whole = {c.name: row[k] for c, row, k in zip(numbers, rows, local, strict=True)} | dict(at)
        name = _spell(equation.source, own, setting)
        yield name, _elements(equation, flat, setting, at, whole, vector, name)


def _spell(pattern: Pattern, numbers: Mapping[str, int], setting: Setting) -> str:
    text = ""
    for part in pattern.parts:
        if isinstance(part, Capture):
            text += str(numbers[part.name] + (value(part.offset, setting) if part.offset else 0))
        else:
            text += str(value(part.value, setting)) if isinstance(part, Computed) else str(part)
    return text


def _elements(
    equation: Equation,
    flat: Flat,
    setting: Setting,
    at: Mapping[str, int],
    whole: Mapping[str, int],
    vector: Mapping[str, Any],
    name: str,
) -> tuple[tuple[int, ...], list[set[tuple[str, int]]]]:
    assert equation.layout is not None
    names = [side.name for side in equation.targets]
    layout, targets, parts = _for_state(equation, flat, vector.get("state", "value"))
    saved = vector.get("saved", {}).get(name)
    pad = None if saved is None else _saved_pads(layout, setting, at, saved)
    elements: list[set[tuple[str, int]]] = []
    shape: tuple[int, ...] = ()
    for turn in range(max(parts.count(part) for part in parts)):
        chosen = [[k for k, part in enumerate(parts) if part == b][turn] for b in range(len(tensor_paths(layout)))]
        captured = [frozenset(p.name for p in names[k].parts if isinstance(p, Capture)) for k in chosen]
        shard = read_shard(
            layout,
            [targets[k] for k in chosen],
            setting=setting,
            coordinate=at,
            fixed=whole,
            captured=captured,
            pad=pad,
        )
        shape = shard.shape
        elements = elements or [set() for _ in shard.elements]
        for found, element in zip(elements, shard.elements, strict=True):
            if isinstance(element, Element):
                text = _spell(names[chosen[element.target]], {**whole, **dict(element.names)}, setting)
                found.add((text, element.position))
    return shape, elements


def _for_state(equation: Equation, flat: Flat, state: str) -> tuple[Layout, list[Layout], tuple[int, ...]]:
    layout = equation.layout
    assert layout is not None
    written = [side.layout for side in equation.targets]
    targets = [t for t in written if t is not None] if None not in written else list(default_targets(layout))
    parts = tuple(range(len(targets)))
    found: State | None = next((s for s in flat.states if state in s.names), None)
    if found and found.lacking:
        layout, lacking, parts = without_dims(layout, targets, found.lacking)
        targets = list(lacking)
    if found and found.each:
        targets = [Layout((*(Dim(axis) for axis in found.each), *t.dims)) for t in targets]
    return layout, targets, parts


def _saved_pads(
    layout: Layout, setting: Setting, at: Mapping[str, int], saved: list[int]
) -> dict[tuple[int, int], int]:
    """The padding that gives the saved shape, where the first dim is a padded concatenation that is cut."""
    dim = layout.dims[0]
    assert isinstance(dim, Concat)
    rest = len(read_dim(Concat(dim.parts), setting, at, iter([0])))
    return {(0, 0): saved[0] * math.prod(setting.mesh[cut.axis] for cut in dim.cuts) - rest}
