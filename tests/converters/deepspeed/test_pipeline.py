"""Pipelines: weights by layer, one optimizer per stage, layers that several stages hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.converters.deepspeed.fake import Fake, write
from tests.converters.deepspeed.oracle import read_state
from tests.converters.deepspeed.test_stage0 import adam
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError
from ucp.store import open_store

TIED = {"tied_modules.embed.w": (40, 5), "tied_modules.embed.own": (40, 3)}


def write_stages(
    root: Path, stages: list[Mapping[str, tuple[int, ...]]], *, seeds: list[int]
) -> list[dict[str, Tensor]]:
    """One optimizer per stage in the folder, as the pipeline engine names them; values by stage."""
    found = []
    for mp, (shapes, seed) in enumerate(zip(stages, seeds, strict=True)):
        entries = {"module": None, "checkpoint_parallel_dimensions": {"pp_degree": len(stages), "tp_degree": 1}}
        fake = Fake([shapes], model={**entries, "mp_world_size": len(stages)})
        written = write(fake, root / "stage", seed=seed)
        for path in list((root / "stage").iterdir()):
            path.rename(root / path.name.replace("mp_rank_00", f"mp_rank_{mp:02d}"))
        found.append({name: states["value"] for name, states in written.states.items()})
    (root / "stage").rmdir()
    return found


def save_layer(root: Path, layer: int, values: Mapping[str, Tensor], *, suffix: str = "") -> None:
    low = {name.rpartition(".")[2]: value.bfloat16() for name, value in values.items()}
    torch.save(low, root / f"layer_{layer:02d}{suffix}-model_states.pt")


def read(root: Path) -> Catalog:
    return CONVERTER.read(open_store(str(root)))


def pipeline(root: Path, *, seeds: list[int]) -> list[dict[str, Tensor]]:
    """Two stages that share a tied layer, which comes first in both; same seed means same values."""
    stages = [{**TIED, "1.w": (3, 3)}, {**TIED, "2.w": (2, 3)}]
    values = write_stages(root, stages, seeds=seeds)
    save_layer(root, 0, {name: values[0][name] for name in TIED})
    save_layer(root, 1, {"1.w": values[0]["1.w"]})
    save_layer(root, 2, {"2.w": values[1]["2.w"]})
    return values


def bits(value: Tensor) -> np.ndarray:
    return value.numpy().view("<u4")


def test_a_tied_layer_in_step_has_replicas(tmp_path: Path) -> None:
    values = pipeline(tmp_path, seeds=[1, 1])
    catalog = read(tmp_path)
    assert set(catalog.tensors) == {*TIED, "1.w", "2.w"}
    for name, value in {**values[1], **values[0]}.items():
        assert np.array_equal(read_state(tmp_path, catalog, name, "value"), bits(value))
        assert catalog.witness(name) is not None
    replicas = {f.replica for f in catalog.fragments["tied_modules.embed.w", "exp_avg"]}
    assert replicas == {0, 1}
    assert "pipeline_copies" not in catalog.state
    assert catalog.param_groups[0].params == (*TIED, "1.w", "2.w")


def test_a_copy_that_another_stage_trained_apart_is_carried(tmp_path: Path) -> None:
    values = pipeline(tmp_path, seeds=[1, 2])
    catalog = read(tmp_path)
    for name in TIED:
        assert np.array_equal(read_state(tmp_path, catalog, name, "value"), bits(values[0][name]))
    assert {*catalog.state["pipeline_copies"]} == {1}
    assert catalog.state["pipeline_copies"][1].keys() == TIED.keys()
    assert any("trained their own copies" in note for note in catalog.notes)


def test_damage_to_a_replica_stays_a_replica(tmp_path: Path) -> None:
    pipeline(tmp_path, seeds=[1, 1])
    catalog = read(tmp_path)
    fragment = next(f for f in catalog.fragments["tied_modules.embed.w", "value"] if f.replica == 1)
    with (tmp_path / fragment.extent.object).open("r+b") as file:
        file.seek(fragment.extent.offset)
        file.write(b"\x99\x99\x99\x99")
    assert {f.replica for f in read(tmp_path).fragments["tied_modules.embed.w", "value"]} == {0, 1}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_missing_layer(tmp_path: Path, layer: int) -> None:
    pipeline(tmp_path, seeds=[1, 1])
    (tmp_path / f"layer_{layer:02d}-model_states.pt").unlink()
    with pytest.raises(NotFoundError, match=f"layer_{layer:02d}" if layer else "layer file"):
        read(tmp_path)


def test_all_layers_missing(tmp_path: Path) -> None:
    pipeline(tmp_path, seeds=[1, 1])
    for path in tmp_path.glob("layer_*"):
        path.unlink()
    with pytest.raises(NotFoundError, match="layer_00"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_missing_stage(tmp_path: Path, kind: str) -> None:
    pipeline(tmp_path, seeds=[1, 1])
    for path in tmp_path.glob(f"*mp_rank_01_{kind}*"):
        path.unlink()
    with pytest.raises(NotFoundError, match="mp_rank_01"):
        read(tmp_path)


def test_layers_of_two_tensor_parallel_ranks_without_metadata_are_refused(tmp_path: Path) -> None:
    values = write_stages(tmp_path, [{"0.w": (3, 3)}, {"0.w": (3, 3)}], seeds=[1, 1])
    for path in tmp_path.glob("*model_states.pt"):
        root = torch.load(path, weights_only=False)
        del root["checkpoint_parallel_dimensions"]
        torch.save(root, path)
    for tp in (0, 1):
        save_layer(tmp_path, 0, values[0], suffix=f"-model_{tp:02d}")
    with pytest.raises(FitError, match="2 tensor-parallel ranks, and no universal_checkpoint_info"):
        read(tmp_path)


def test_a_parameter_of_two_stages_that_is_not_tied(tmp_path: Path) -> None:
    values = write_stages(tmp_path, [{"0.w": (3, 3)}, {"0.w": (3, 3)}], seeds=[1, 1])
    save_layer(tmp_path, 0, values[0])
    with pytest.raises(CorruptError, match="two pipeline stages"):
        read(tmp_path)


def test_two_tied_layers_that_look_alike(tmp_path: Path) -> None:
    shapes = {"tied_modules.a.w": (3, 3), "tied_modules.b.w": (3, 3)}
    values = write_stages(tmp_path, [shapes], seeds=[1])
    for layer, name in enumerate(shapes):
        save_layer(tmp_path, layer, {name: values[0][name]})
    with pytest.raises(FitError, match="any of the tied layers"):
        read(tmp_path)


def test_layers_beside_a_whole_module(tmp_path: Path) -> None:
    written = write(Fake([{"0.w": (3, 3)}]), tmp_path)
    save_layer(tmp_path, 0, {"0.w": written.states["0.w"]["value"]})
    with pytest.raises(ConflictError, match="pipeline layers and a whole module"):
        read(tmp_path)


def plain_pipeline(root: Path, optimizers: list[Any]) -> None:
    for mp, optimizer in enumerate(optimizers):
        entries = {"module": None, "buffer_names": [], "optimizer": optimizer, "param_shapes": None, "global_steps": 3}
        degrees = {"pp_degree": len(optimizers), "tp_degree": 1}
        entries |= {"dp_world_size": 1, "mp_world_size": 2, "checkpoint_parallel_dimensions": degrees}
        torch.save(entries, root / f"mp_rank_{mp:02d}_model_states.pt")


def test_stages_without_zero_are_named_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = {f"{layer}.{n}": torch.randn(s) for layer in range(4) for n, s in (("w", (3, 3)), ("b", (3,)))}
    plain_pipeline(
        tmp_path,
        [adam(module, [["0.w", "1.w"], ["0.b", "1.b"]]), adam(module, [["2.w", "3.w"], ["2.b", "3.b"]])],
    )
    for layer in range(4):
        values = {n: module[f"{layer}.{n}"] for n in ("w", "b")}
        torch.save(values, tmp_path / f"layer_{layer:02d}-model_states.pt")
    catalog = read(tmp_path)
    assert [group.params for group in catalog.param_groups] == [
        ("0.w", "1.w", "2.w", "3.w"),
        ("0.b", "1.b", "2.b", "3.b"),
    ]
    for name, value in module.items():
        assert np.array_equal(read_state(tmp_path, catalog, name, "value"), bits(value))
        assert np.array_equal(read_state(tmp_path, catalog, name, "exp_avg"), bits(value + 1))
