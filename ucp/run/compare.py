"""Comparison: do two checkpoints, of whatever families, hold the same state bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ucp.catalog import Catalog, Tensor
from ucp.errors import FitError, NotFoundError
from ucp.layout import FlatRange, itemsize
from ucp.plan import BLOCK_BYTES, Cover, Key, Section
from ucp.run.cast import Array
from ucp.run.executor import default_workers
from ucp.run.gather import read_region
from ucp.run.numbers import values
from ucp.run.trees import differences
from ucp.run.verify import Finding, OnProgress, Verdict, run_checks
from ucp.store import Store

Side = tuple[Catalog, Store]


def compare(
    a: Side,
    b: Side,
    *,
    training_state: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Verdict:
    """Compare two checkpoints: step, tensors, states, per-parameter numbers, hyper-parameters, ties, and every byte.

    Aliases count as the tensor they name. With `training_state` the rest of the training state is compared too;
    families may hold it in other forms. Raises what reading raises.
    """
    catalog, other = a[0], b[0]
    verdict = Verdict(findings=list(_described(catalog, other)))
    keys = [
        Key(name, state)
        for name, tensor in catalog.tensors.items()
        for state, spec in tensor.states.items()
        if _spec(other, name, state) == spec
    ]
    total = sum(catalog.tensors[key.name].states[key.state].nbytes for key in keys)

    def check(key: Key, advance: Callable[[int], None]) -> Verdict:
        return _data(a, b, key, advance)

    threads = workers or default_workers(a[1], b[1])
    for part in run_checks(keys, check, total=total, workers=threads, on_progress=on_progress):
        verdict.take(part)
    if training_state:
        differing = differences(dict(catalog.state), dict(other.state), stores=(a[1], b[1]))
        verdict.findings += [Finding("training-state", path, message) for path, message in differing]
    return verdict


def _spec(catalog: Catalog, name: str, state: str) -> Any:
    name = catalog.ties.get(name, name)
    return catalog.tensors[name].states.get(state) if name in catalog.tensors else None


def _described(a: Catalog, b: Catalog) -> Iterator[Finding]:
    """What differs in the descriptions of two checkpoints."""
    if a.step != b.step:
        yield Finding("step", "step", f"{a.step} against {b.step}")
    known_a, known_b = {*a.tensors, *a.ties}, {*b.tensors, *b.ties}
    for name in sorted(known_a ^ known_b):
        yield Finding("tensor", name, "only in the first" if name in known_a else "only in the second")
    common = [name for name in a.tensors if name in known_b]
    for name in common:
        yield from _forms(name, a.tensors[name], b.tensors[b.resolve(name)])
    yield from _together("scalar", ((name, _scalars(a, b, name)) for name in common))
    yield from _together("option", ((name, _options(a, b, name)) for name in common))


def _forms(name: str, one: Tensor, two: Tensor) -> Iterator[Finding]:
    if one.kind != two.kind:
        yield Finding("kind", name, f"{one.kind} against {two.kind}")
    for state in sorted({*one.states, *two.states}):
        first, second, where = one.states.get(state), two.states.get(state), str(Key(name, state))
        if first is None or second is None:
            yield Finding("state", where, f"only in the {'second' if first is None else 'first'}")
        elif first != second:
            yield Finding("form", where, f"{first.dtype}{list(first.shape)} against {second.dtype}{list(second.shape)}")


def _together(kind: str, found: Iterable[tuple[str, Iterable[str]]]) -> Iterator[Finding]:
    """One finding for all the tensors that differ in the same way."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, messages in found:
        for message in messages:
            names[message].append(name)
    for message, where in names.items():
        yield Finding(kind, where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else ""), message)


def _scalars(a: Catalog, b: Catalog, name: str) -> Iterator[str]:
    one, two = a.tensors[name].scalars, b.tensors[b.resolve(name)].scalars
    yield from _values({key: s.value for key, s in one.items()}, {key: s.value for key, s in two.items()})


def _options(a: Catalog, b: Catalog, name: str) -> Iterator[str]:
    yield from _values(_plain_options(a, name), _plain_options(b, b.resolve(name)))


def _values(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*one, *two}):
        if key not in one or key not in two:
            yield f"{key} only in the {'first' if key in one else 'second'}"
        elif one[key] != two[key]:
            yield f"{key} {one[key]} against {two[key]}"


def _plain_options(catalog: Catalog, name: str) -> dict[str, Any]:
    """Hyper-parameters of a parameter that are plain numbers, words or pairs of them."""
    options = (group.options for group in catalog.param_groups if name in group.params)
    merged = {key: _plain(value) for found in options for key, value in found.items()}
    return {key: value for key, value in merged.items() if isinstance(value, int | float | str | tuple | None)}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _data(a: Side, b: Side, key: Key, advance: Callable[[int], None]) -> Verdict:
    """Compare the bytes of one state that both have in the same form."""
    verdict = Verdict()
    try:
        one, two = a[0].cover(*key), b[0].cover(*key)
    except (FitError, NotFoundError) as error:
        verdict.findings.append(Finding("incomplete", str(key), error.message))
        return verdict
    differing, first, largest = 0, None, 0.0
    for block in Section(0, FlatRange(0, one.spec.size), one).blocks(BLOCK_BYTES):
        mine, theirs = read_region(a[1], one, block), read_region(b[1], two, block)
        if not np.array_equal(mine, theirs):
            places, apart = _apart(mine, theirs, one)
            first = block.start + int(places[0]) if first is None else first
            differing, largest = differing + len(places), max(largest, apart)
        verdict.bytes_read += mine.nbytes + theirs.nbytes
        advance(mine.nbytes)
    if first is not None:
        index = [int(i) for i in np.unravel_index(first, one.spec.shape)]
        message = f"{differing} of {one.spec.size} elements differ, first at {index}; largest difference {largest:.3g}"
        verdict.findings.append(Finding("data", str(key), message))
    return verdict


def _apart(mine: Array, theirs: Array, cover: Cover) -> tuple[Array, float]:
    """Positions of differing elements in a block, and the largest absolute difference of finite ones."""
    width = itemsize(cover.spec.dtype)
    places = np.flatnonzero((mine.reshape(-1, width) != theirs.reshape(-1, width)).any(axis=1))
    one, two = (values(side, cover.spec.dtype).astype(np.float64) for side in (mine, theirs))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(one - two)
    finite = apart[np.isfinite(apart)]
    return places, float(finite.max()) if finite.size else 0.0
