"""The conformance suite fails on converters that are wrong in one way each."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ucp.catalog import Catalog
from ucp.converter import Converter, converter
from ucp.errors import UcpError
from ucp.plan import Key
from ucp.store import SingleStore, Store, open_store
from ucp.testing.converters import ReaderConformance, Sample, TargetConformance, example, read_all, write

Change = Callable[[Catalog, Store], Catalog]
FAILURES = (AssertionError, UcpError, pytest.fail.Exception)


class Wrong:
    """Family ``torch``, with something changed."""

    family = "torch"

    def __init__(
        self, *, read: Change | None = None, target: Callable[[Any], Any] | None = None, **others: Any
    ) -> None:
        self._converter = converter("torch")
        self._read, self._target, self._others = read, target, others

    def detect(self, store: Store) -> bool:
        return self._others.get("detect", self._converter.detect)(store)

    def read(self, store: Store, **options: Any) -> Catalog:
        if self._others.get("lenient"):
            options = {}
        if self._others.get("blind"):
            store = SingleStore(store, "checkpoint.pt")
        catalog = self._converter.read(store, **options)
        return self._read(catalog, store) if self._read else catalog

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Any:
        if self._others.get("lenient"):
            options = {}
        target = self._converter.target(catalog, store, **options)
        return self._target(target) if self._target else target


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return made(tmp_path / "made", 24)


def made(folder: Path, width: int) -> Sample:
    catalog, store = example(folder / "source", width=width)
    write(converter("torch"), catalog, store, folder / "written")
    return Sample(folder / "written", read_all(catalog, store))


def swapped(catalog: Catalog, store: Store) -> Catalog:
    one, two = Key("layer.weight", "exp_avg"), Key("layer.weight", "exp_avg_sq")
    fragments = catalog.fragments
    return replace(catalog, fragments={**fragments, one: fragments[two], two: fragments[one]})


def without(name: str) -> Change:
    def change(catalog: Catalog, store: Store) -> Catalog:
        return replace(catalog, tensors={key: value for key, value in catalog.tensors.items() if key != name})

    return change


def uncovered(catalog: Catalog, store: Store) -> Catalog:
    return replace(catalog, fragments={**catalog.fragments, Key("mean", "value"): ()})


def trusting(catalog: Catalog, store: Store) -> Catalog:
    """Digests made of whatever is there now."""
    made = [replace(c, value=zlib.crc32(store.read(c.object, c.offset, c.length))) for c in catalog.checksums]
    return replace(catalog, checksums=made)


def hungry(catalog: Catalog, store: Store) -> Catalog:
    for path in catalog.objects:
        store.read(path)
    return catalog


def meddling(catalog: Catalog, store: Store) -> Catalog:
    store.put("seen", b"")
    return catalog


@pytest.mark.parametrize(
    ("test", "wrong"),
    [
        ("test_values_are_the_truth", Wrong(read=swapped)),
        ("test_values_are_the_truth", Wrong(read=without("mean"))),
        ("test_the_catalog_is_consistent", Wrong(read=uncovered)),
        ("test_the_catalog_is_consistent", Wrong(read=without("layer.bias"))),
        ("test_everything_converts", Wrong(read=meddling)),
        ("test_it_is_recognised", Wrong(detect=lambda store: False)),
        ("test_an_unknown_option_is_refused", Wrong(lenient=True)),
    ],
)
def test_wrong_readers(test: str, wrong: Converter, sample: Sample, tmp_path: Path) -> None:
    def run(one: Converter, folder: Path) -> None:
        (folder / "copy").parent.mkdir()
        write(converter("torch"), *example(folder / "source"), folder / "copy")
        given = {"store": open_store(str(folder / "copy")), "sample": sample, "tmp_path": folder}
        method = getattr(ReaderConformance(), test)
        wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        method(**{name: one if name == "converter" else given[name] for name in wanted})

    run(converter("torch"), tmp_path / "right")
    with pytest.raises(FAILURES):
        run(wrong, tmp_path / "wrong")


def test_a_reader_that_takes_whatever_is_empty(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        ReaderConformance().test_what_is_empty_or_missing_is_not_recognised(Wrong(detect=lambda store: True), tmp_path)


def test_a_reader_that_reads_the_data(tmp_path: Path) -> None:
    large = made(tmp_path / "large", 1024)
    ReaderConformance().test_reading_is_of_metadata_only(converter("torch"), large, tmp_path / "right")
    with pytest.raises(AssertionError):
        ReaderConformance().test_reading_is_of_metadata_only(Wrong(read=hungry), large, tmp_path / "wrong")


def test_a_reader_that_believes_damaged_data(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"checkpoint.pt: byte \d+ changed: \['"):
        ReaderConformance().test_damage_is_never_a_wrong_number(Wrong(read=trusting), sample, tmp_path)


@pytest.mark.parametrize(
    ("test", "wrong"),
    [
        ("test_what_a_target_says", Wrong(target=lambda target: replace(target, notes=["a list"]))),
        ("test_what_a_target_says", Wrong(target=lambda target: replace(target, root="checkpoint.pt"))),
        ("test_what_is_written_is_read_back", Wrong(read=swapped)),
        ("test_what_is_written_is_read_back", Wrong(read=without("mean"))),
        ("test_what_is_written_is_read_back", Wrong(read=lambda catalog, store: replace(catalog, step=4))),
        ("test_what_is_written_is_read_back", Wrong(read=lambda catalog, store: replace(catalog, state={}))),
        ("test_without_its_root_it_is_no_checkpoint", Wrong(detect=lambda store: bool(store.children()), blind=True)),
        ("test_an_unknown_option_is_refused", Wrong(lenient=True)),
    ],
)
def test_wrong_writers(test: str, wrong: Converter, tmp_path: Path) -> None:
    def run(one: Converter, folder: Path) -> None:
        given = {"source": example(folder / "source"), "tmp_path": folder}
        method = getattr(TargetConformance(), test)
        wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        method(**{name: one if name == "converter" else given[name] for name in wanted})

    run(converter("torch"), tmp_path / "right")
    with pytest.raises(FAILURES):
        run(wrong, tmp_path / "wrong")
