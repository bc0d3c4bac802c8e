"""A small, real checkpoint family, so that the command line can be tested without any framework.

``index.json`` describes tensors and fragments; the fragments are raw bytes in ``*.bin``. `write` cuts arrays over
ranks, with replicas, low-precision copies and checksums; `CONVERTER` reads the folder and lays catalogs out as one.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, Checksum, ParamGroup, Scalar, Source, Tensor
from ucp.errors import CorruptError
from ucp.layout import Box, FlatRange, Mesh, Region
from ucp.plan import BLOCK_BYTES, Digests, Extent, Fragment, Key, Section, Task, TensorSpec
from ucp.run.cast import cast
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf

FAMILY = "shards"


def write(folder: Path, arrays: Mapping[str, np.ndarray], *, ranks: int = 2, step: int = 7) -> Path:
    """Write float32 `arrays` with the states value and exp_avg, cut in flat ranges over `ranks`.

    Arrays with two dims also have a replica cut in boxes by column, and a bfloat16 copy of the value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blobs: dict[str, bytearray] = {f"rank{rank}.bin": bytearray() for rank in range(ranks)}
    blobs["copies.bin"] = bytearray()
    fragments: list[Any] = []
    witnesses: dict[str, Any] = {}
    for name, array in arrays.items():
        for state, data in (("value", array), ("exp_avg", array * np.float32(0.5))):
            fragments += _flat(blobs, name, state, data, ranks)
            fragments += _boxes(blobs, name, state, data) if data.ndim == 2 else []
        if array.ndim == 2:
            witnesses[name] = _append(blobs, "copies.bin", cast(array, "float32", "bfloat16"))
    for object, data in blobs.items():
        (folder / object).write_bytes(data)
    index = {
        "step": step,
        "ranks": ranks,
        "tensors": {name: {"shape": a.shape, "states": ["value", "exp_avg"]} for name, a in arrays.items()},
        "fragments": fragments,
        "witnesses": witnesses,
        "checksums": [[object, len(data), zlib.crc32(data)] for object, data in blobs.items()],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _flat(blobs: dict[str, bytearray], name: str, state: str, data: np.ndarray, ranks: int) -> Iterator[list[Any]]:
    for rank, part in enumerate(np.array_split(data.ravel(), ranks)):
        start = sum(len(p) for p in np.array_split(data.ravel(), ranks)[:rank])
        object, offset = _append(blobs, f"rank{rank}.bin", part)
        yield [name, state, {"flat": [start, len(part)]}, object, offset, 0]


def _boxes(blobs: dict[str, bytearray], name: str, state: str, data: np.ndarray) -> Iterator[list[Any]]:
    middle = data.shape[1] // 2
    for start, stop in ((0, middle), (middle, data.shape[1])):
        object, offset = _append(blobs, "rank0.bin", data[:, start:stop])
        yield [name, state, {"box": [[0, start], [data.shape[0], stop - start]]}, object, offset, 1]


def _append(blobs: dict[str, bytearray], object: str, data: np.ndarray) -> tuple[str, int]:
    offset = len(blobs[object])
    blobs[object] += np.ascontiguousarray(data).tobytes()
    return object, offset


@dataclass(frozen=True, slots=True)
class Raw:
    """A frame with nothing but the data."""

    block_bytes: int = BLOCK_BYTES
    needs_crc32: bool = False
    size: int = 0

    def literals(self) -> Iterable[tuple[int, bytes]]:
        return ()

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        return self.size, b""


@dataclass(frozen=True, slots=True)
class ShardsTarget:
    catalog: Catalog
    tasks: tuple[Task, ...]
    family: str = FAMILY
    root: str = "index.json"
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        tensors = {
            name: {"shape": tensor.states["value"].shape, "states": list(tensor.states)}
            for name, tensor in self.catalog.tensors.items()
        }
        fragments = [
            [*task.sections[0].cover.key, {"flat": [0, task.sections[0].region.length]}, task.object, 0, 0]
            for task in self.tasks
        ]
        index = {"step": self.catalog.step, "ranks": 1, "tensors": tensors, "fragments": fragments}
        yield "index.json", json.dumps({**index, "witnesses": {}, "checksums": []}).encode()


class Shards:
    family = FAMILY

    def detect(self, store: Store) -> bool:
        return store.exists("index.json")

    def read(self, store: Store, **options: Any) -> Catalog:
        try:
            index = json.loads(store.read("index.json"))
        except ValueError as error:
            raise CorruptError(f"{store.url}/index.json: not JSON ({error})", hint="restore it") from error
        return _catalog(store, index, options)

    def target(self, catalog: Catalog, store: Store, **options: Any) -> ShardsTarget:
        tasks = []
        for name, tensor in catalog.tensors.items():
            for state, spec in tensor.states.items():
                witness = catalog.witness(name) if state == "value" else None
                section = Section(0, FlatRange(0, spec.size), catalog.cover(name, state), witness)
                tasks.append(Task(f"data/{name}.{state}.bin", spec.nbytes, Raw(size=spec.nbytes), (section,)))
        return ShardsTarget(catalog, tuple(tasks))


def _catalog(store: Store, index: dict[str, Any], options: dict[str, Any]) -> Catalog:
    specs = {name: TensorSpec(tuple(info["shape"]), "float32") for name, info in index["tensors"].items()}
    fragments: dict[Key, list[Fragment]] = {}
    for name, state, region, object, offset, replica in index["fragments"]:
        fragment = _fragment(_region(region), object, offset, "float32", replica)
        fragments.setdefault(Key(name, state), []).append(fragment)
    witnesses = {
        name: (
            TensorSpec(specs[name].shape, "bfloat16"),
            (_fragment(Box.whole(specs[name].shape), *place, "bfloat16", 0),),
        )
        for name, place in index["witnesses"].items()
    }
    names = tuple(specs)
    return Catalog(
        url=store.url,
        source=Source(FAMILY, "1", Mesh({"dp": index["ranks"]}), {"zero_stage": 1, "fancy": True}),
        tensors={
            name: Tensor(
                name,
                "buffer" if name.endswith("running") else "parameter",
                dict.fromkeys(info["states"], specs[name]),
                {"step": Scalar(index["step"], "float32")},
            )
            for name, info in index["tensors"].items()
        },
        fragments={key: tuple(found) for key, found in fragments.items()},
        step=index["step"],
        witnesses=witnesses,
        ties={"head.weight": names[0]} if names else {},
        param_groups=(ParamGroup(names, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}),),
        state={
            "lr_scheduler": {"last_epoch": 7, "base_lrs": [0.01, 0.02]},
            "client": {
                "args": Opaque("argparse", "Namespace", state={"hidden": 33}),
                "rng": TensorLeaf(Extent.contiguous("rank0.bin", 0, (4,), "uint8")),
                "nested": {"tuple": (1, "two"), 3: b"abc"},
            },
        },
        checksums=tuple(Checksum(object, 0, length, "crc32", value) for object, length, value in index["checksums"]),
        objects={
            entry.path: (entry.size, entry.fingerprint) for entry in store.entries() if entry.path.endswith(".bin")
        },
        notes=("the data-parallel size was inferred from file names",) if index["ranks"] > 1 else (),
        options=options,
    )


def _region(stored: dict[str, Any]) -> Region:
    if "flat" in stored:
        return FlatRange(*stored["flat"])
    start, shape = stored["box"]
    return Box(tuple(start), tuple(shape))


def _fragment(region: Region, object: str, offset: int, dtype: str, replica: int) -> Fragment:
    shape = (region.length,) if isinstance(region, FlatRange) else region.shape
    return Fragment(region, Extent.contiguous(object, offset, shape, dtype), replica)


CONVERTER = Shards()


def entries() -> dict[str, EntryPoint]:
    """The installed converters and this one, as if its package were installed."""
    entry = EntryPoint(FAMILY, "tests.cli.shards:CONVERTER", "ucp.converters")
    return {**{found.name: found for found in entry_points(group="ucp.converters")}, FAMILY: entry}


def main() -> None:
    """``ucp`` with this family too."""
    import ucp.converter
    from ucp.cli import main as run

    ucp.converter._entries = entries

    run()


if __name__ == "__main__":
    sys.argv[0] = "ucp"
    main()
