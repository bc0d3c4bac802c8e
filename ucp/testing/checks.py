"""What the conformance tests of converters look at: catalogs, files, damage, and what was left out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import fsspec

from ucp.catalog import Catalog, Kind
from ucp.converter import Converter
from ucp.converter import converter as installed
from ucp.errors import UcpError
from ucp.layout.dtypes import ITEMSIZE
from ucp.store import Store, open_source
from ucp.testing.example import Sample, Truth, read_all, write

_MOST_OBJECTS = 8


def check_tensors(catalog: Catalog) -> None:
    """Every name is known, every element covered once."""
    for name, tensor in catalog.tensors.items():
        assert tensor.name == name
        assert tensor.kind in get_args(Kind)
        assert tensor.states, f"{name} has no state"
        for state, spec in tensor.states.items():
            assert spec.dtype in ITEMSIZE
            catalog.cover(name, state)
        catalog.witness(name)
        assert all(scalar.dtype in {*ITEMSIZE, "int", "float", "bool"} for scalar in tensor.scalars.values())
    named = [name for group in catalog.param_groups for name in group.params]
    assert {catalog.ties.get(name, name) for name in named} <= set(catalog.tensors)
    assert len(set(named)) == len(named), "a parameter is in two groups"
    assert set(catalog.ties.values()) <= set(catalog.tensors)
    assert not set(catalog.ties) & set(catalog.tensors)


def check_places(catalog: Catalog, store: Store) -> None:
    """Objects are there with the size and fingerprint told; extents and digests lie in them."""
    for path, told in catalog.objects.items():
        entry = store.entry(path)
        assert (entry.size, entry.fingerprint) == told
    lowest = [fragments for _, fragments in catalog.witnesses.values()]
    for fragments in [*catalog.fragments.values(), *lowest]:
        for fragment in fragments:
            if fragment.extent.size and fragment.extent.object in catalog.objects:
                first, stop = fragment.extent.span
                assert 0 <= first <= stop <= catalog.objects[fragment.extent.object][0]
            elif fragment.extent.size:
                assert not store.exists(fragment.extent.object), f"{fragment.extent.object} is not among the objects"
    for checksum in catalog.checksums:
        assert checksum.offset + checksum.length <= catalog.objects[checksum.object][0]


def copied(sample: Sample, folder: Path) -> Path:
    """A copy of a sample inside `folder`; gives its path."""
    if sample.path.is_file():
        folder.mkdir(parents=True)
        return Path(shutil.copy(sample.path, folder))
    return Path(shutil.copytree(sample.path, folder))


def opened(path: Path) -> Store:
    """The store of a folder or a file."""
    return open_source(str(path))


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damages(catalog: Catalog, store: Store) -> Iterator[tuple[str, bytes | None]]:
    """(object, its damaged bytes, None for a missing one); changed bytes only where something could tell."""
    paths = sorted(catalog.objects)
    for path in paths[:: -(-len(paths) // _MOST_OBJECTS)]:
        whole = store.read(path)
        yield path, None
        yield path, b""
        yield path, whole[: len(whole) // 2]
        size = len(whole)
        spread = {*range(0, size, size // 6 + 1), *(size * k // 64 for k in (1, 2, 62, 63)), 9, size - 9}
        for k, place in enumerate(sorted(place for place in spread if 0 <= place < size)):
            if is_guarded(catalog, path, place):
                mask = 0xFF if k % 2 else 0x01
                yield path, whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]


def is_guarded(catalog: Catalog, path: str, place: int) -> bool:
    """Whether a byte is under a digest, or is no tensor's data at all."""
    if any(c.object == path and c.offset <= place < c.offset + c.length for c in catalog.checksums):
        return True
    extents = (fragment.extent for fragments in catalog.fragments.values() for fragment in fragments)
    spans = (extent.span for extent in extents if extent.object == path)
    return not any(first <= place < stop for first, stop in spans)


def described(whole: bytes, damaged: bytes | None) -> str:
    """What was done to an object."""
    if damaged is None:
        return "deleted"
    if len(damaged) != len(whole):
        return f"cut from {len(whole)} bytes to {len(damaged)}"
    return f"byte {next(k for k, pair in enumerate(zip(whole, damaged, strict=True)) if len(set(pair)) > 1)} changed"


def recovered(converter: Converter, path: Path, sample: Sample) -> Truth | None:
    """What a conversion, which checks all it reads, makes of the checkpoint at `path`; None if it raises an error."""
    memory = fsspec.filesystem("memory")
    try:
        store = opened(path)
        catalog = converter.read(store, **sample.options)
        universal = write(installed("universal"), catalog, store, "memory://ucp-conformance/result")
        return read_all(installed("universal").read(universal), universal)
    except UcpError:
        return None
    finally:
        if memory.exists("/ucp-conformance"):
            memory.rm("/ucp-conformance", recursive=True)


def differing(truth: Truth, found: Truth) -> Iterator[str]:
    """States in both that are not the same."""
    for name, states in truth.items():
        for state, value in states.items():
            if state in found.get(name, {}) and found[name][state] != value:
                yield f"{name}[{state}]"


def left_out(catalog: Catalog, store: Store, again: Catalog, result: Store) -> Iterator[str]:
    """What of `catalog` is not in what was written of it; AssertionError where it is another."""
    truth, found = read_all(catalog, store), read_all(again, result)
    for name, states in truth.items():
        got = found[again.resolve(name)]
        assert got["value"] == states["value"], name
        assert not list(differing({name: states}, {name: got})), name
        yield from (f"{name}[{state}]" for state in states if state not in got)
        scalars = again.tensors[again.resolve(name)].scalars
        for key, scalar in catalog.tensors[name].scalars.items():
            assert key not in scalars or scalars[key].value == scalar.value, name
            if key not in scalars:
                yield f"{name}[{key}]"
    if (again.step or catalog.step) != catalog.step:
        raise AssertionError(f"step {again.step}, not {catalog.step}")
    yield from (f"tie {alias}" for alias in catalog.ties if alias not in again.ties and alias not in again.tensors)
    if again.param_groups and [set(g.params) for g in again.param_groups] != [
        set(g.params) for g in catalog.param_groups
    ]:
        raise AssertionError("the groups are of other parameters")
    yield from ("param_groups" for _ in [0] if catalog.param_groups and not again.param_groups)
    yield from (f"state {name}" for name in catalog.state if name not in again.state)


__all__ = [
    "check_places",
    "check_tensors",
    "copied",
    "damages",
    "described",
    "differing",
    "digests",
    "left_out",
    "opened",
    "recovered",
]
