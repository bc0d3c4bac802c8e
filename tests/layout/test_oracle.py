"""Compiled blocks against the element-by-element reading of random equations."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import HealthCheck, given, settings

from ucp.layout import Compiled, branches, compile_layout, local_shape, saved_pads
from ucp.layout.pads import count_pads, smallest
from ucp.testing.equations import Equation, equations
from ucp.testing.oracle import expand, gather, read_shard, scatter

mixed = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def values(equation: Equation) -> dict[str, int]:
    """Some value of each fixed leaf."""
    sizes = equation.setting.sizes
    return {name: sizes[name] - 1 for name in equation.fixed if name in sizes}


def compiled(equation: Equation, coordinate: dict[str, int], fixed: dict[str, int], **more: object) -> Compiled:
    return compile_layout(
        equation.source,
        equation.targets,
        setting=equation.setting,
        coordinate=coordinate,
        fixed=fixed,
        captured=equation.captured,
        **more,
    )


@mixed
@given(equations())
def test_blocks_are_what_the_oracle_reads(equation: Equation) -> None:
    for coordinate in equation.setting.mesh.coordinates():
        fixed = equation.fixed_at(coordinate, values(equation))
        told = read_shard(
            equation.source,
            equation.targets,
            setting=equation.setting,
            coordinate=coordinate,
            fixed=fixed,
            captured=equation.captured,
        )
        assert expand(compiled(equation, coordinate, fixed)) == told
        assert local_shape(equation.source, equation.setting, coordinate) == told.shape


@mixed
@given(equations())
def test_gather_undoes_scatter(equation: Equation) -> None:
    """All coordinates together hold each logical element once per replica, and gathering brings it back."""
    mesh = equation.setting.mesh
    shards = []
    for coordinate in mesh.coordinates():
        for chosen in itertools.product(*(range(equation.setting.sizes[n]) for n in sorted(values(equation)))):
            fixed = equation.fixed_at(coordinate, dict(zip(sorted(values(equation)), chosen, strict=True)))
            shards.append(compiled(equation, coordinate, fixed))
    logical, back, times = {}, {}, {}
    for number, view in enumerate(shards[0].views):
        sizes = {name: equation.setting.number(name) for name in equation.captured[number]}
        for chosen in itertools.product(*(range(sizes[name]) for name in sorted(sizes))):
            key = (number, tuple(zip(sorted(sizes), chosen, strict=True)))
            logical[key] = np.arange(math.prod(view.tensor)).reshape(view.tensor)
            logical[key][...] += 1000 * len(logical)
            back[key], times[key] = np.zeros_like(logical[key]), np.zeros_like(logical[key])
    for shard in shards:
        gather(shard, scatter(shard, logical), back)
        gather(shard, np.ones(shard.shape, np.int64), times)
    for key, tensor in logical.items():
        replicas = replicas_of(equation, key[0])
        assert (times[key] % replicas == 0).all() if equation.replicated else (times[key] == replicas).all()
        assert (times[key] > 0).all()
        assert (back[key] == tensor * times[key]).all()


def replicas_of(equation: Equation, target: int) -> int:
    cut = {*branches(equation.source)[target].axes, *equation.fixed}
    return math.prod(size for axis, size in equation.setting.mesh.axes if axis not in cut)


@mixed
@given(equations())
def test_padding_is_inferred_from_the_saved_shape(equation: Equation) -> None:
    setting = equation.setting
    for coordinate in setting.mesh.coordinates():
        shape = local_shape(equation.source, setting, coordinate)
        found = saved_pads(equation.source, shape, setting=setting, coordinate=coordinate)
        assert local_shape(equation.source, setting, coordinate, pad=found) == shape
        for number, dim in enumerate(equation.source.dims):
            sizes = smallest(dim, setting, coordinate) if count_pads(dim) else []
            if len(sizes) != 1 or shape[number]:
                assert [found[number, k] for k in range(len(sizes))] == sizes
