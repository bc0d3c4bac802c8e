"""ByteCheckpoint folders, EMULATED: see tests/support/bytecheckpoint_emulated.py for why and how."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import ucp
from tests.support import bytecheckpoint_emulated as emulated
from ucp.catalog import Catalog
from ucp.container.torchfile import leaf_numpy
from ucp.converter import find_converter
from ucp.converters.bytecheckpoint import CONVERTER
from ucp.converters.dcp import CONVERTER as DCP
from ucp.errors import CorruptError, FitError, NotFoundError, UcpError, UnsafeError, UsageError
from ucp.layout import Box
from ucp.run.gather import read_region
from ucp.store import open_store

SHAPES = {"embed.weight": (7, 4), "norm.weight": (4,), "scale": (1,)}
GROUPS = [{"params": ["embed.weight"], "lr": 0.5}, {"params": ["norm.weight", "scale"], "lr": 0.25}]


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()} | {"calls": torch.tensor(3)}


def states(names: list[str]) -> dict[tuple[str, ...], Any]:
    """Optimizer state under `names`, one for each of the parameters."""
    torch.manual_seed(4)
    made: dict[tuple[str, ...], Any] = {}
    for name, shape in zip(names, SHAPES.values(), strict=True):
        made["state", name, "step"] = torch.tensor(6.0)
        made["state", name, "exp_avg"] = torch.randn(shape)
        made["state", name, "exp_avg_sq"] = torch.rand(shape)
    return made


def extra(rank: int) -> dict[str, Any]:
    return {"step": 6, "torch_rng_state": torch.full((3,), rank, dtype=torch.uint8), "scheduler": {"last_epoch": 6}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    optimizer = {**states(list(SHAPES)), ("param_groups",): GROUPS}
    emulated.save(tmp_path / "run", model=weights(), optimizer=optimizer, extra=[extra(0), extra(1)])
    return tmp_path / "run"


def read(folder: Path, **options: object) -> Catalog:
    return CONVERTER.read(open_store(str(folder)), **options)


def data(catalog: Catalog, name: str, state: str) -> bytes:
    cover = catalog.cover(name, state)
    return read_region(open_store(catalog.url), cover, Box.whole(cover.spec.shape)).tobytes()


@pytest.mark.parametrize("inside", ["", "global_step_5"])
def test_every_state(root: Path, inside: str) -> None:
    converter, _ = find_converter(str(root / inside))
    assert converter.family == "bytecheckpoint"
    catalog = read(root / inside)
    assert list(catalog.tensors) == [*SHAPES, "calls"]
    made = states(list(SHAPES))
    for name, tensor in weights().items():
        assert data(catalog, name, "value") == tensor.numpy().tobytes()
    for (_, name, state), tensor in made.items():
        if state == "step":
            assert catalog.tensors[name].scalars["step"].value == 6.0
        else:
            assert data(catalog, name, state) == tensor.numpy().tobytes()
    assert [(group.params, group.options) for group in catalog.param_groups] == [
        (("embed.weight",), {"lr": 0.5}),
        (("norm.weight", "scale"), {"lr": 0.25}),
    ]
    assert catalog.step == 6
    assert catalog.tensors["calls"].kind == "buffer"


def test_extra_state_of_ranks(root: Path) -> None:
    catalog = read(root)
    assert (catalog.state["step"], catalog.state["lr_scheduler"]) == (6, {"last_epoch": 6})
    ranks = catalog.state["rng"]["rank"]
    store = open_store(catalog.url)
    assert {rank: leaf_numpy(store, leaf).tolist() for rank, leaf in ranks.items()} == {0: [0, 0, 0], 1: [1, 1, 1]}


def test_the_loaders_files_come_along(root: Path) -> None:
    (root / "global_step_5" / "loader_ckpt").mkdir()
    (root / "global_step_5" / "loader_ckpt" / "rank_0.bin").write_bytes(b"rows")
    assert read(root).state["loader_ckpt"] == {"rank_0.bin": b"rows"}


def test_numbers_and_the_wrapper_of_ddp(tmp_path: Path) -> None:
    model = {f"module.{name}": tensor for name, tensor in weights().items()}
    groups = [{"params": [0, 1, 2], "lr": 0.5}]
    optimizer = {**states(["0", "1", "2"]), ("param_groups",): groups}
    emulated.save(tmp_path, model=model, optimizer=optimizer, extra=[extra(0)])
    catalog = read(tmp_path)
    assert list(catalog.tensors) == [*SHAPES, "calls"]
    assert catalog.param_groups[0].params == tuple(SHAPES)
    for number, name in enumerate(SHAPES):
        expected = states(["0", "1", "2"])["state", str(number), "exp_avg"]
        assert data(catalog, name, "exp_avg") == expected.numpy().tobytes()


def test_steps(root: Path) -> None:
    optimizer = {**states(list(SHAPES)), ("param_groups",): GROUPS}
    emulated.save(root, model=weights(), optimizer=optimizer, extra=[extra(0)], step=9)
    assert read(root).source.detail["folder"] == "global_step_9"
    assert read(root, step=5).source.detail["folder"] == "global_step_5"
    with pytest.raises(NotFoundError) as caught:
        read(root, step=7)
    assert "global_step_5 global_step_9" in str(caught.value.hint)


def test_conversion(root: Path, tmp_path: Path) -> None:
    ucp.convert(str(root), str(tmp_path / "u"))
    checkpoint = ucp.open(str(tmp_path / "u"))
    assert checkpoint["embed.weight"]["value"][...].tolist() == weights()["embed.weight"].tolist()
    assert checkpoint.step == 6


def test_a_model_alone(root: Path) -> None:
    for path in (root / "global_step_5" / "optimizer").iterdir():
        path.unlink()
    catalog = read(root)
    assert catalog.step == 6
    assert {tensor.kind for tensor in catalog.tensors.values()} == {"parameter", "buffer"}


def test_other_families_leave_it_alone(root: Path) -> None:
    assert not DCP.detect(open_store(str(root / "global_step_5" / "model")))
    assert not CONVERTER.detect(open_store(str(root.parent)))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_save_that_was_cut_short(root: Path, part: str) -> None:
    (root / "global_step_5" / part / ".metadata").unlink()
    with pytest.raises(NotFoundError) as caught:
        read(root)
    assert part in caught.value.message
    assert caught.value.hint


def _another_header(metadata: emulated.Metadata) -> None:
    for index in metadata.all_tensor_metadata:
        if index.fqn == "embed.weight":
            metadata.all_tensor_metadata[index] = emulated.serialize(torch.zeros(4, 4, dtype=torch.float16))[0]


def _another_shape(metadata: emulated.Metadata) -> None:
    for index in metadata.all_tensor_metadata:
        if index.fqn == "embed.weight":
            metadata.all_tensor_metadata[index] = emulated.serialize(torch.zeros(2, 8))[0]


def _no_header(metadata: emulated.Metadata) -> None:
    metadata.all_tensor_metadata = {}


def _no_table(metadata: emulated.Metadata) -> None:
    del metadata.all_tensor_metadata


def _too_short(metadata: emulated.Metadata) -> None:
    next(info for index, info in metadata.storage_data.items() if index.fqn == "embed.weight").length -= 4


def _another_kind(metadata: emulated.Metadata) -> None:
    metadata.state_dict_metadata["embed.weight"] = BytesStorageMetadata()


@pytest.mark.parametrize("change", [_another_header, _another_shape, _no_header, _no_table, _too_short, _another_kind])
def test_metadata_that_contradicts_itself(root: Path, change: Callable[[emulated.Metadata], None]) -> None:
    folder = root / "global_step_5" / "model"
    metadata = emulated.read_metadata(folder)
    change(metadata)
    emulated.write_metadata(folder, metadata)
    with pytest.raises(CorruptError) as caught:
        read(root)
    assert "global_step_5/model/.metadata" in caught.value.message


def test_a_truncated_file(root: Path) -> None:
    path = root / "global_step_5" / "optimizer" / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptError, match=r"optimizer/__1_0\.distcp: ends at byte"):
        read(root)


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch attacked",))


def test_headers_that_run_code(root: Path) -> None:
    folder = root / "global_step_5" / "model"
    metadata = emulated.read_metadata(folder)
    for index in metadata.all_tensor_metadata:
        metadata.all_tensor_metadata[index] = pickle.dumps(_Attack())
    emulated.write_metadata(folder, metadata)
    with pytest.raises(UnsafeError):
        read(root)
    assert not Path("attacked").exists()


def test_refusals(root: Path) -> None:
    folder = root / "global_step_5" / "optimizer"
    metadata = emulated.read_metadata(folder)
    metadata.user_defined_dict = {"fsdp_flat_param_to_fqns": {"_flat_param": ["a"]}}
    emulated.write_metadata(folder, metadata)
    with pytest.raises(FitError, match="flat parameters"):
        read(root)
    with pytest.raises(UsageError, match="unknown option 'tag'"):
        read(root, tag="x")
    with pytest.raises(UsageError, match="cannot write bytecheckpoint"):
        CONVERTER.target(Catalog("", None, {}, {}), open_store(str(root)))  # type: ignore[arg-type]
    with pytest.raises(UcpError):
        CONVERTER.read(open_store(str(root / "global_step_5" / "model")))
