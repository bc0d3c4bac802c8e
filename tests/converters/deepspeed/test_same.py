"""What ranks have in common is kept once, and what differs is kept by rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ucp.container.torchfile import read_torch_file
from ucp.converters._deepspeed.same import Comparison
from ucp.store import open_store
from ucp.tree import TensorLeaf


def compare(folder: Path, *roots: Any) -> tuple[Comparison, list[Any]]:
    """Save each value in a file of its own and read them as trees."""
    store = open_store(str(folder))
    for i, root in enumerate(roots):
        torch.save(root, folder / f"{i}.pt")
    files = [read_torch_file(store, f"{i}.pt") for i in range(len(roots))]
    return Comparison(store, [c for f in files for c in f.checksums]), [f.root for f in files]


@pytest.mark.parametrize("size", [3, 100_000])
def test_tensors_are_compared_by_content(tmp_path: Path, size: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    other = tensor.clone()
    other[-1] += 1
    comparison, (a, b, c) = compare(tmp_path, tensor, tensor.clone(), other)
    assert comparison.equal(a, b)
    assert not comparison.equal(a, c)
    assert not comparison.equal(a, {"a": a})


def test_arrays_numbers_and_objects(tmp_path: Path) -> None:
    values = {"a": np.arange(4), "n": float("nan"), "t": (1, True), "s": {1, 2}, "d": torch.float16}
    other = {**values, "t": (1, 1)}
    comparison, (a, b, c) = compare(tmp_path, values, values, other)
    assert comparison.equal(a, b)
    assert not comparison.equal(a, c)


def test_split_descends_into_dicts(tmp_path: Path) -> None:
    roots = [{"same": 1, "rng": torch.tensor([i]), "deep": {"x": 7, "rank": i}} for i in range(3)]
    comparison, trees = compare(tmp_path, *roots)
    common, own = comparison.split(dict(enumerate(trees)))
    assert common == {"same": 1, "deep": {"x": 7}}
    assert [own[i]["deep"] for i in range(3)] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert all(isinstance(own[i]["rng"], TensorLeaf) for i in range(3))


def test_what_only_some_ranks_have_is_kept_by_rank(tmp_path: Path) -> None:
    comparison, trees = compare(tmp_path, {"a": 1, "b": 2}, {"a": 1})
    assert comparison.split(dict(enumerate(trees))) == ({"a": 1}, {0: {"b": 2}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16, torch.bool])
def test_scalars_have_their_value(tmp_path: Path, dtype: torch.dtype) -> None:
    values = [torch.tensor(v, dtype=dtype) for v in (1, 0, 1)]
    comparison, trees = compare(tmp_path, *values)
    assert [comparison.scalar(tree) for tree in trees] == [v.item() for v in values]


def test_equal_scalars_are_read_once(tmp_path: Path) -> None:
    comparison, trees = compare(tmp_path, *[torch.tensor(5.0) for _ in range(3)])
    assert comparison.scalar(trees[0]) == 5.0
    (tmp_path / "2.pt").unlink()
    assert comparison.scalar(trees[2]) == 5.0
