"""Stock libraries open what we write: no adapter, no option of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr
import zarr.storage
from safetensors import safe_open
from safetensors.torch import load_file

import ucp.zarr  # noqa: F401 - registers bfloat16 and float8
from tests.format.build import universal
from ucp.format.names import component
from ucp.format.records import ROOT
from ucp.store import LocalStore

Open = Callable[[Path], "np.ndarray"]
DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "uint8",
    "bool",
]
DTYPES += ["int8", "int16", "uint16", "uint32", "uint64", "complex64"]
STATES = ("value", "exp_avg", "exp_avg_sq")


def native(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def values(shape: tuple[int, ...], dtype: str = "float32", *, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {state: (random.standard_normal(shape) * 5).astype(native(dtype)) for state in STATES}


SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (1024,),
    "prime": (10007,),
    "matrix": (96, 40),
    "prime rows": (1009, 24),
    "stacked": (6, 30, 16),
    "four dims": (5, 3, 5, 7),
    "empty": (0,),
    "empty rows": (0, 4),
    "empty columns": (3, 0),
    "odd/../name": (5, 3),
    "Weight": (2, 2),
    "weight": (2, 2),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, np.ndarray]]:
    shaped = {name: values(shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    return shaped | {f"of {dtype}": values((6, 4), dtype) for dtype in DTYPES} | {"cut": values((5 * 67, 1024))}


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """All shapes and dtypes; ``cut`` lies in several objects, of which the last is shorter."""
    return universal(tmp_path_factory.mktemp("checkpoint"), tensors, shard_bytes=1 << 20)


def folder(store: LocalStore, name: str) -> Path:
    return Path(store.root, "tensors", component(name))


def with_zarr(path: Path) -> zarr.Array:
    return zarr.open_array(str(path), mode="r")


def with_tensorstore(path: Path) -> object:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result()


@pytest.fixture
def zarrs() -> Iterator[None]:
    """zarr-python with the zarrs pipeline, which hands float8 on to zarr-python with a warning."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Array is unsupported by ZarrsCodecPipeline: .*float8")
        yield


def check(path: Path, expected: dict[str, np.ndarray], opened: object) -> None:
    """Whole, by state, by row, by column and by a block."""
    stacked = np.stack(list(expected.values()))
    assert tuple(opened.shape) == stacked.shape
    cuts: list[tuple[slice | int, ...]] = [()]
    if stacked.size:
        cuts += [(1,)]
    if stacked.ndim > 1 and stacked.shape[1] >= 5:
        cuts += [(slice(None), slice(1, 3)), (2, slice(3, None, 2))]
        if stacked.ndim > 2:
            cuts += [(slice(None), slice(None), slice(1, 2)), (0, slice(1, 3), slice(0, 2))]
    for cut in cuts:
        found = opened[cut] if isinstance(opened, zarr.Array) else opened[cut].read().result()
        wanted = stacked[cut]
        assert np.asarray(found).dtype == wanted.dtype
        assert np.asarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes(), f"{path}{cut}"


def test_zarr_python(checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    for name, expected in tensors.items():
        check(folder(checkpoint, name), expected, with_zarr(folder(checkpoint, name)))


def test_zarrs(zarrs: None, checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    for name, expected in tensors.items():
        check(folder(checkpoint, name), expected, with_zarr(folder(checkpoint, name)))


def test_zarrs_itself_reads_and_does_not_hand_on(
    zarrs: None, checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]
) -> None:
    with zarr.config.set({"codec_pipeline.strict": True}):
        for name in ("matrix", "stacked", "cut", "prime rows", "of float16", "of int64"):
            opened = with_zarr(folder(checkpoint, name))
            assert opened[1:2].tobytes() == tensors[name]["exp_avg"].tobytes()
            assert opened[2:3, 1:3].tobytes() == tensors[name]["exp_avg_sq"][1:3].tobytes()


def test_tensorstore(checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    for name, expected in tensors.items():
        check(folder(checkpoint, name), expected, with_tensorstore(folder(checkpoint, name)))


def objects(path: Path) -> list[Path]:
    """Object files in order of their number along dim 0."""
    found = [file for file in (path / "c").rglob("*") if file.is_file()] if (path / "c").is_dir() else []
    return sorted(found, key=lambda file: [int(part) for part in file.relative_to(path / "c").parts])


def test_safetensors_load_file(checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    for name, expected in tensors.items():
        parts = [load_file(file) for file in objects(folder(checkpoint, name))]
        assert bool(parts) == bool(expected["value"].size)
        for state, array in expected.items() if parts else ():
            held = [part[state] for part in parts]
            whole = torch.cat(held) if array.ndim else held[0]
            assert tuple(whole.shape) == array.shape
            assert str(whole.dtype) == f"torch.{array.dtype.name}"
            assert whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_safetensors_slices(checkpoint: LocalStore, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    for name in ("matrix", "stacked", "of bfloat16"):
        with safe_open(objects(folder(checkpoint, name))[0], "pt") as file:
            assert file.metadata()["tensor"] == name
            part = file.get_slice("exp_avg")[1:3, 1:2]
            assert part.contiguous().view(torch.uint8).numpy().tobytes() == tensors[name]["exp_avg"][1:3, 1:2].tobytes()


def test_objects_are_cut_and_the_last_is_shorter(checkpoint: LocalStore) -> None:
    sizes = [file.stat().st_size for file in objects(folder(checkpoint, "cut"))]
    assert len(sizes) > 2
    assert sizes[-1] < sizes[0] == sizes[1]


def test_data_is_aligned(checkpoint: LocalStore) -> None:
    for file in objects(Path(checkpoint.root, "tensors", "cut")) + objects(folder(checkpoint, "matrix")):
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert start % (4096 if file.stat().st_size > 1 << 20 else 8) == 0


def test_the_group_lists_every_array(tmp_path: Path) -> None:
    store = universal(tmp_path, {"a": values((2, 3)), "b/c": values(())})
    group = zarr.open_group(store.root, mode="r")
    assert group.metadata.consolidated_metadata is not None
    assert sorted(name for name, _ in group["tensors"].arrays()) == ["a", "b=2fc"]
    assert group["tensors/b=2fc"].attrs["ucp"]["tensor"] == "b/c"
    assert group["tensors/a"].metadata.dimension_names == ("state", None, None)


def test_a_group_with_extension_types_opens_in_stock_zarr(checkpoint: LocalStore) -> None:
    assert "consolidated_metadata" not in checkpoint.read(ROOT).decode()
    group = zarr.open_group(checkpoint.root, mode="r")
    assert group["tensors/weight"].shape == (3, 2, 2)
