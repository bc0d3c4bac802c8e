"""One cell of the matrix: convert, read the result back, compare every bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.matrix.sources import Source
from tests.matrix.targets import Target
from ucp.catalog import Catalog
from ucp.errors import FitError, UsageError
from ucp.layout import FlatRange
from ucp.mapping import AUTO, is_logical, read_source
from ucp.run.convert import Conversion, carry_out, prepare
from ucp.run.gather import read_region
from ucp.store import Store
from ucp.training import progress

ALL, TENSORS, WEIGHTS = "all", "tensors", "weights"
"""The result holds all; or every state and step but no hyper-parameters; or values alone. What it holds is exact."""


def outcome(source: Source, target: Target, folder: Path, there: Path) -> str:
    """What comes of the conversion: `ALL`, `TENSORS`, `WEIGHTS`, or the message of the refusal.

    AssertionError where the result differs from the source in what it holds, or lacks what its form has a place for.
    """
    options = {**target.options, **(source.reading if target.logical else {})}
    if target.family == "hf" and source.config is not None:
        there.mkdir(parents=True)
        (there / "config.json").write_text(json.dumps(source.config))
        options["config"] = str(there / "config.json")
    try:
        conversion = prepare(str(folder / source.place), str(there / "result"), to=target.family, **options)
    except (FitError, UsageError) as refused:
        assert not (there / "result").exists()
        if not refused.hint:
            raise AssertionError(f"no remedy: {refused}") from refused
        return (
            str(refused.message)
            .replace(str(folder / source.place), "the source")
            .removeprefix("the source: ")
            .partition("; ")[0]
        )
    carry_out(conversion, workers=1)
    again = prepare(str(folder / source.place), str(there / "result"), to=target.family, **options)
    assert again.state == "done"
    return _compared(conversion, target)


def _compared(conversion: Conversion, target: Target) -> str:
    catalog, store = conversion.catalog, conversion.source
    program = AUTO if is_logical(catalog) and target.family in ("hf", "megatron") else None
    made, made_store = read_source(conversion.destination_url, family=target.family, program=program)
    left: set[str] = set()
    for name, tensor in catalog.tensors.items():
        held = made.tensors[made.ties.get(name, name)]
        for state in tensor.states:
            if state != "value" and state not in held.states:
                left.add(state)
                continue
            one, two = _bits(catalog, store, name, state), _bits(made, made_store, held.name, state)
            assert one[0] == two[0], f"{name}[{state}]: {one[0]} became {two[0]}"
            np.testing.assert_array_equal(one[1], two[1], err_msg=f"{name}[{state}]")
        if not target.weights and any(state != "value" for state in tensor.states):
            assert _number(held.scalars) == _number(tensor.scalars), name
    _check_progress(conversion, made)
    extra = {made.ties.get(n, n) for n in made.tensors} - {catalog.ties.get(n, n) for n in catalog.tensors}
    assert not extra - set(catalog.ties), f"made up: {extra}"
    if target.weights:
        return WEIGHTS
    assert not left, f"lost: {left}"
    trained = any(state != "value" for tensor in catalog.tensors.values() for state in tensor.states)
    if trained and not target.tensors:
        assert dict(_groups(made)) == dict(_groups(catalog))
        assert made.step == catalog.step or catalog.step is None
    return WEIGHTS if not trained else TENSORS if target.tensors else ALL


_WORDS = {
    "iteration": ("iteration", "step"),
    "consumed_samples": ("samples",),
    "loss_scale": ("loss scale", "loss_scale", "scaler"),
    "lr_scheduler": ("scheduler",),
    "rng": ("rng", "random"),
}
"""How a note may call what is left out."""


def _check_progress(conversion: Conversion, made: Catalog) -> None:
    """Training state is in the result, or a note says that it is left out."""
    before, after = progress(conversion.catalog), progress(made)
    notes = " ".join(conversion.notes).lower()
    for field, words in _WORDS.items():
        one, two = getattr(before, field), getattr(after, field)
        if field == "loss_scale" and one is not None:
            one, two = one["scale"], two["scale"] if two else None
        said = any(word in notes for word in words)
        if one is not None and two is None:
            assert said, f"{field} is lost, and no note says so: {notes}"
        elif one is not None and field in ("iteration", "consumed_samples", "loss_scale"):
            assert one == two or said, f"{field}: {one} became {two}"


def _bits(catalog: Catalog, store: Store, name: str, state: str) -> tuple[Any, Any]:
    """Shape and dtype, and the bytes."""
    cover = catalog.cover(name, state)
    return (cover.spec.shape, cover.spec.dtype), read_region(store, cover, FlatRange(0, cover.spec.size))


def _number(scalars: Mapping[str, Any]) -> dict[str, float]:
    """Numbers per parameter by value: frameworks keep them in dtypes of their own."""
    return {key: float(scalar.value) for key, scalar in scalars.items()}


def _groups(catalog: Catalog) -> Iterator[tuple[str, Any]]:
    """The hyper-parameters that every optimizer has, of each parameter."""
    for group in catalog.param_groups:
        for name in group.params:
            told = {key: group.options[key] for key in ("lr", "weight_decay", "eps") if key in group.options}
            yield catalog.ties.get(name, name), told
