"""Targets that are laid out as asked, refused where they would not be exact, and written in another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import ucp.converter
from tests.cli import shards
from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import ConflictError, FitError, UsageError
from ucp.layout import itemsize
from ucp.run.cast import cast
from ucp.run.convert import carry_out, prepare
from ucp.store import Store

ARRAYS = {"wide": np.random.default_rng(0).standard_normal((40, 6)).astype("<f4"), "short": np.ones(3, "<f4")}


class Rounding(shards.Shards):
    """The family of `shards`, with a layout to choose and values that may be rounded."""

    family = "rounding"
    asked: ClassVar[list[Layout | None]] = []

    def target(self, catalog: Catalog, store: Store, *, layout: Layout | None = None, **options: Any) -> Any:
        self.asked.append(layout)
        made, dtype = super().target(catalog, store), options.get("dtype", "")
        if not dtype:
            return made
        tasks = [replace(task, sections=(replace(task.sections[0], dtype=dtype),)) for task in made.tasks]
        sized = [replace(t, size=t.nbytes, frame=shards.Raw(size=t.nbytes, block_bytes=100)) for t in tasks]
        return replace(made, tasks=tuple(sized), losses=(f"values are rounded to {dtype}",))


CONVERTER = Rounding()


@pytest.fixture(autouse=True)
def families(monkeypatch):
    entry = EntryPoint("rounding", "tests.run.test_laying_out:CONVERTER", "ucp.converters")
    monkeypatch.setattr(ucp.converter, "_entries", lambda: {**shards.entries(), "rounding": entry})
    ucp.converter.converter.cache_clear()
    yield
    ucp.converter.converter.cache_clear()


def source(tmp_path: Path, arrays: Mapping[str, np.ndarray] = ARRAYS) -> str:
    return str(shards.write(tmp_path / "source", arrays))


def converter() -> Rounding:
    found = ucp.converter.converter("rounding")
    assert isinstance(found, Rounding) or type(found).__name__ == "Rounding"
    return found


def test_what_would_not_be_exact_is_refused_and_can_be_accepted(tmp_path):
    there = str(tmp_path / "there")
    with pytest.raises(FitError, match="values are rounded to bfloat16") as refused:
        prepare(source(tmp_path), there, to="rounding", dtype="bfloat16")
    assert "--lossy" in str(refused.value.hint)
    assert not Path(there).exists()
    conversion = prepare(source(tmp_path), there, to="rounding", dtype="bfloat16", lossy=True)
    assert "not exact: values are rounded to bfloat16" in conversion.notes
    report = carry_out(conversion)
    assert report.bytes_read == sum(2 * array.nbytes for array in ARRAYS.values())
    for name, array in ARRAYS.items():
        raw = np.fromfile(tmp_path / "there" / "data" / f"{name}.value.bin", "<u2")
        np.testing.assert_array_equal(raw, cast(array, "float32", "bfloat16").ravel())


def test_weights_that_nothing_can_write_are_a_loss_but_in_the_universal_form(tmp_path):
    """A dtype that is not known is carried as it was pickled, which only the universal form can."""
    held = {"a": torch.ones(3, dtype=torch.complex128), "b": torch.ones(2)}
    torch.save(held, tmp_path / "weights.pt")
    for to in ("dcp", "torch", "safetensors", "deepspeed", "deepspeed-universal"):
        with pytest.raises(FitError, match="left out: a"):
            prepare(str(tmp_path / "weights.pt"), str(tmp_path / to), to=to)
        notes = prepare(str(tmp_path / "weights.pt"), str(tmp_path / to), to=to, lossy=True).notes
        assert any("left out: a" in note for note in notes if note.startswith("not exact: "))
    assert not any("left out" in n for n in prepare(str(tmp_path / "weights.pt"), str(tmp_path / "u")).notes)


def test_copies_are_compared_before_values_are_rounded(tmp_path):
    folder = Path(source(tmp_path))
    raw = bytearray((folder / "rank0.bin").read_bytes())
    held = next(f for f in ucp.open(str(folder)).catalog.fragments["wide", "value"] if f.replica)
    raw[held.extent.offset] ^= 1  # the lowest bit: no rounded value shows it
    (folder / "rank0.bin").write_bytes(raw)
    with pytest.raises(ConflictError, match="replica"):
        carry_out(prepare(str(folder), str(tmp_path / "there"), to="rounding", dtype="bfloat16", lossy=True), workers=1)


def test_a_plan_counts_bytes_as_they_are_read_and_written(tmp_path):
    elements = sum(2 * array.size for array in ARRAYS.values())
    for dtype in ("bfloat16", "float64"):
        cost = prepare(source(tmp_path), str(tmp_path / dtype), to="rounding", dtype=dtype, lossy=True).plan.cost
        assert (cost.bytes_read, cost.bytes_written) == (4 * elements, itemsize(dtype) * elements)
        assert cost.peak_bytes_per_worker > 0


def test_a_layout_reaches_the_family_that_has_one(tmp_path):
    prepare(source(tmp_path), str(tmp_path / "a"), to="rounding", mesh={"tp": 2}, to_program="hf_llama")
    (layout,) = converter().asked[-1:]
    assert layout is not None
    assert (layout.mesh["tp"], layout.program is None) == (2, False)
    prepare(source(tmp_path), str(tmp_path / "b"), to="rounding")
    assert converter().asked[-1] is None


@pytest.mark.parametrize("asked", [{"mesh": {"tp": 2}}, {"to_sizes": {"hidden": 4}}, {"to_program": "hf_llama"}])
def test_a_family_without_layouts_refuses_one(tmp_path, asked):
    with pytest.raises(UsageError, match="universal checkpoints have no layout"):
        prepare(source(tmp_path), str(tmp_path / "there"), to="universal", **asked)
    assert not (tmp_path / "there").exists()


def test_a_file_that_an_option_names_is_part_of_what_was_asked_for(tmp_path):
    named, written, prints = tmp_path / "config.json", source(tmp_path), set()
    for text in ("{}", "{} ", "{}  "):
        named.write_text(text)
        asked, again = (
            prepare(written, str(tmp_path / "there"), to="rounding", config=str(named)).wanted for _ in range(2)
        )
        assert asked.fingerprint == again.fingerprint
        prints.add(asked.fingerprint)
    assert len(prints) == 3


def test_auto_is_the_name_of_what_the_source_tells(tmp_path):
    told = prepare(source(tmp_path), str(tmp_path / "there"), program="auto").catalog
    assert set(told.tensors) == set(ARRAYS)
    with pytest.raises(UsageError, match="none is given"):
        prepare(source(tmp_path), str(tmp_path / "there"), program="auto", sizes={"hidden": 3})
