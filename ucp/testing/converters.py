"""What every converter must do.

A reader inherits `ReaderConformance` and gives it two fixtures, a writer inherits `TargetConformance` and gives it one:

>>> class TestReading(ReaderConformance):
...     @pytest.fixture
...     def converter(self):
...         return CONVERTER
...     @pytest.fixture
...     def sample(self, tmp_path):
...         return Sample(path_of_a_checkpoint, {"embed.weight": {"value": held(array)}})
>>> class TestWriting(TargetConformance):
...     @pytest.fixture
...     def converter(self):
...         return CONVERTER

The framework's own checkpoints are the samples to give. Samples are copied before anything is done to them.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ucp.catalog import Catalog
from ucp.converter import Converter
from ucp.converter import converter as installed
from ucp.errors import StorageError, UcpError, UsageError
from ucp.run.convert import carry_out
from ucp.store import SingleStore, Store, open_store
from ucp.testing.checks import (
    check_places,
    check_tensors,
    copied,
    damages,
    described,
    differing,
    digests,
    left_out,
    opened,
    recovered,
)
from ucp.testing.example import Held, Sample, Truth, example, held, prepared, read_all, write
from ucp.testing.watched import Counted, Refusing

_METADATA_BYTES = 1 << 20
_HOSTILE = (
    "../../outside",
    "/outside",
    "a/b/c",
    "a/../../outside",
    "..",
    "ünï çødé",
    "a b",
    "%2e%2e",
    "x" * 300,
    "*[?]",
)


class ReaderConformance:
    """Tests of `Converter.detect` and `Converter.read`; fixtures ``converter`` and ``sample`` are yours.

    ``large`` is a sample of at least 4 MiB; it is ``sample`` unless you give another.
    """

    @pytest.fixture
    def large(self, sample: Sample) -> Sample:
        """A sample whose data are so large that reading them would show."""
        return sample

    @pytest.fixture
    def store(self, sample: Sample, tmp_path: Path) -> Store:
        """The store of a copy of the sample."""
        return opened(copied(sample, tmp_path / "copy"))

    def test_it_is_recognised(self, converter: Converter, store: Store) -> None:
        """By the converter, which has looked at little of it."""
        counted = Counted(store)
        assert converter.detect(store if isinstance(store, SingleStore) else counted) is True
        assert counted.bytes_read <= _METADATA_BYTES

    def test_what_is_empty_or_missing_is_not_recognised(self, converter: Converter, tmp_path: Path) -> None:
        """And is no error."""
        (tmp_path / "empty" / "inside").mkdir(parents=True)
        for folder in ("empty", "missing"):
            assert converter.detect(open_store(str(tmp_path / folder))) is False

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0" * 600, b"PK\x03\x04" + b"\xff" * 600, b"{" * 600],
        ids=["nothing", "zeros", "zip", "json"],
    )
    def test_garbage_is_no_surprise(
        self, converter: Converter, store: Store, sample: Sample, tmp_path: Path, content: bytes
    ) -> None:
        """Under the names of a real checkpoint: detecting raises nothing, reading only errors of ucp."""
        for entry in store.entries():
            path = tmp_path / "garbage" / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        found = open_store(str(tmp_path / "garbage"))
        assert converter.detect(found) in (True, False)
        with pytest.raises(UcpError):
            read_all(converter.read(found, **sample.options), found)

    def test_reading_is_of_metadata_only(self, converter: Converter, large: Sample, tmp_path: Path) -> None:
        """No tensor's data are read, however large they are."""
        store = opened(copied(large, tmp_path / "large-copy"))
        data = converter.read(store, **large.options).nbytes
        assert data >= 4 * _METADATA_BYTES, "give a sample of at least 4 MiB as `large`"
        counted = Counted(store)
        converter.read(counted, **large.options)
        assert counted.bytes_read <= _METADATA_BYTES + data // 20

    def test_the_catalog_is_consistent(self, converter: Converter, store: Store, sample: Sample) -> None:
        """Every element is covered, every name known, every extent inside its object."""
        catalog = converter.read(store, **sample.options)
        check_tensors(catalog)
        check_places(catalog, store)
        assert (catalog.source.family, catalog.url) == (converter.family, store.url)
        assert all(isinstance(note, str) for note in catalog.notes)
        assert isinstance(catalog.notes, tuple)
        assert catalog.step is None or type(catalog.step) is int
        assert all(isinstance(name, str) for name in catalog.state)

    def test_reading_twice_gives_the_same(self, converter: Converter, store: Store, sample: Sample) -> None:
        """And catalogs cross process boundaries."""
        one, two = (converter.read(store, **sample.options) for _ in range(2))
        assert (one.tensors, one.fragments, one.notes) == (two.tensors, two.fragments, two.notes)
        assert (list(one.tensors), list(one.state)) == (list(two.tensors), list(two.state))
        again: Catalog = pickle.loads(pickle.dumps(one))  # noqa: S301, TID251 - our own object
        assert again.tensors == one.tensors

    def test_values_are_the_truth(self, converter: Converter, store: Store, sample: Sample) -> None:
        """Bit for bit, and no state is missing or made up."""
        catalog = converter.read(store, **sample.options)
        found = read_all(catalog, store)
        for name, states in sample.truth.items():
            assert found[catalog.resolve(name)] == states, name

    def test_everything_converts(self, converter: Converter, store: Store, sample: Sample, tmp_path: Path) -> None:
        """To the universal form, which compares replicas and checks digests; and the source stays as it is."""
        before = digests(tmp_path / "copy")
        catalog = converter.read(store, **sample.options)
        result = write(installed("universal"), catalog, store, tmp_path / "universal")
        universal = installed("universal").read(result)
        assert read_all(universal, result) == read_all(catalog, store)
        assert universal.param_groups == catalog.param_groups
        assert digests(tmp_path / "copy") == before

    def test_damage_is_never_a_wrong_number(self, converter: Converter, sample: Sample, tmp_path: Path) -> None:
        """Objects that are cut, emptied, deleted or changed: an error of ucp, or the right values."""
        folder = copied(sample, tmp_path / "copy")
        store = opened(folder)
        catalog = converter.read(store, **sample.options)
        assert recovered(converter, folder, sample) is not None
        for path, damaged in damages(catalog, store):
            file = folder if folder.is_file() else folder / path
            whole = file.read_bytes()
            file.unlink() if damaged is None else file.write_bytes(damaged)
            wrong = list(differing(sample.truth, recovered(converter, folder, sample) or {}))
            assert not wrong, f"{path}: {described(whole, damaged)}: {wrong}"
            file.write_bytes(whole)

    def test_an_unknown_option_is_refused(self, converter: Converter, store: Store, sample: Sample) -> None:
        """A misspelt option must not be passed over."""
        with pytest.raises(UsageError):
            converter.read(store, **sample.options, no_such_option=1)


class TargetConformance:
    """Tests of `Converter.target`; the fixture ``converter`` is yours.

    `options` go to every target. `source` is what is written: override it for a family that asks for more than tensors
    with plain names.
    """

    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def source(self, tmp_path: Path) -> tuple[Catalog, Store]:
        """A catalog with something of everything, and the store that it lies in."""
        return example(tmp_path / "source")

    def test_what_is_written_is_read_back(
        self, converter: Converter, source: tuple[Catalog, Store], tmp_path: Path
    ) -> None:
        """Bit for bit; what is left out is in the notes, and the source stays as it is."""
        catalog, store = source
        before = digests(Path(store.url))
        target = converter.target(catalog, store, **self.options)
        result = write(converter, catalog, store, tmp_path / "result", **self.options)
        assert digests(Path(store.url)) == before
        assert converter.detect(result)
        again = converter.read(result)
        check_tensors(again)
        check_places(again, result)
        missing = list(left_out(catalog, store, again, result))
        assert not missing or target.notes or target.losses, missing

    def test_what_a_target_says(self, converter: Converter, source: tuple[Catalog, Store]) -> None:
        """Texts for people; the same plan each time, or nothing could be resumed; tasks cross process boundaries."""
        one, two = (converter.target(*source, **self.options) for _ in range(2))
        assert one.family == converter.family
        for texts in (one.notes, one.losses):
            assert isinstance(texts, tuple)
            assert all(type(text) is str for text in texts)
            assert "" not in texts
        assert [(task.object, task.size) for task in one.tasks] == [(task.object, task.size) for task in two.tasks]
        assert len({task.object for task in one.tasks}) == len(one.tasks)
        assert one.root not in {task.object for task in one.tasks}
        assert pickle.loads(pickle.dumps(one.tasks))  # noqa: S301, TID251 - our own objects

    def test_without_its_root_it_is_no_checkpoint(
        self, converter: Converter, source: tuple[Catalog, Store], tmp_path: Path
    ) -> None:
        """Whatever else was written; and what was interrupted there is completed by the next run."""
        catalog, store = source
        target, whole = converter.target(catalog, store, **self.options), open_store(str(tmp_path / "result"))
        with pytest.raises(StorageError, match="stopped here"):
            carry_out(prepared(target, catalog, store, Refusing(whole, target.root)), workers=1)
        assert not whole.exists(target.root)
        if converter.detect(whole):  # as what is left of one, which reading explains
            with pytest.raises(UcpError):
                converter.read(whole)
        report = carry_out(prepared(target, catalog, store, whole), workers=1)
        assert report.resumed_objects == len(target.tasks)
        assert converter.detect(whole) is True

    @pytest.mark.parametrize("name", _HOSTILE)
    def test_names_are_data(self, converter: Converter, tmp_path: Path, name: str) -> None:
        """Whatever a tensor is called, nothing is written elsewhere, and it is read back or was refused."""
        catalog, store = example(tmp_path / "at" / "source", names={"layer.weight": name})
        try:
            result = write(converter, catalog, store, tmp_path / "at" / "result", **self.options)
            again = read_all(converter.read(result), result)
        except UcpError:
            again = {name: read_all(catalog, store)[name]}
        assert again[name]["value"] == read_all(catalog, store)[name]["value"]
        assert {path.name for path in tmp_path.iterdir()} == {"at"}
        assert {path.name for path in (tmp_path / "at").iterdir()} <= {"source", "result"}

    def test_an_unknown_option_is_refused(self, converter: Converter, source: tuple[Catalog, Store]) -> None:
        """A misspelt option must not be passed over."""
        with pytest.raises(UsageError):
            converter.target(*source, **self.options, no_such_option=1)


__all__ = [
    "Held",
    "ReaderConformance",
    "Sample",
    "TargetConformance",
    "Truth",
    "example",
    "held",
    "read_all",
    "write",
]
