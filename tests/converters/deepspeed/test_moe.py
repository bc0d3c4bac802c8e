"""Experts over ranks, whatever the layout: what is written here by arithmetic of its own is read back whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.converters.deepspeed.oracle import read_state
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import ConflictError, FitError
from ucp.store import open_store

STATES = ("value", "exp_avg", "exp_avg_sq")
PREFIX = "layers.{}.deepspeed_moe.experts.deepspeed_experts.{}.{}"


@dataclass(frozen=True)
class Layer:
    """One MoE layer: how many experts, over how many ranks, and the shapes in each."""

    experts: int
    ep: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def local(self) -> int:
        return self.experts // self.ep


@dataclass(frozen=True)
class Moe:
    """A checkpoint of ZeRO 1 to write."""

    dp: int
    dense: Mapping[str, tuple[int, ...]]
    layers: Sequence[Layer]
    data_first: bool = False
    named: bool = True


def write(moe: Moe, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Write the files, and give the value of every state by its name in the whole."""
    folder.mkdir(parents=True)
    numbers = count(1)
    names = [*moe.dense.items()]
    for number, layer in enumerate(moe.layers):
        for expert in range(layer.experts):
            names += [(PREFIX.format(number, expert, key), shape) for key, shape in layer.shapes.items()]
    whole = {
        name: {s: torch.full((int(np.prod(shape)),), 0.0).add_(next(numbers)).cumsum(0).reshape(shape) for s in STATES}
        for name, shape in names
    }
    degrees = sorted({layer.ep for layer in moe.layers})
    for rank in range(moe.dp):
        torch.save(optimizer(moe, whole, degrees, rank), folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save(model(moe, whole, degrees), folder / "mp_rank_00_model_states.pt")
    for number, layer in enumerate(moe.layers):
        for expert in range(layer.experts):
            own = {name: whole[name]["value"] for key in layer.shapes for name in [PREFIX.format(number, expert, key)]}
            torch.save(own, folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt")
    return whole


def held(moe: Moe, ep: int, e: int) -> Iterator[tuple[str, str]]:
    """Local and global names of what expert-parallel rank `e` of degree `ep` trains."""
    for number, layer in enumerate(moe.layers):
        for own in range(layer.local if layer.ep == ep else 0):
            for key in layer.shapes:
                yield PREFIX.format(number, own, key), PREFIX.format(number, e * layer.local + own, key)


def optimizer(moe: Moe, whole: Mapping[str, Mapping[str, Tensor]], degrees: Sequence[int], rank: int) -> dict[str, Any]:
    parts = [partition([whole[name] for name in moe.dense], moe.dp, rank)]
    for ep in degrees:
        width = moe.dp // ep
        e, index = (rank // width, rank % width) if moe.data_first else (rank % ep, rank // ep)
        parts.append(partition([whole[name] for _, name in held(moe, ep, e)], width, index))
    groups: list[dict[str, Any]] = [{"lr": 0.5, "params": [0]}]
    groups += [{"lr": 0.5, "params": [n], "moe": True, "name": f"ep_size_{ep}"} for n, ep in enumerate(degrees, 1)]
    inner = {
        "base_optimizer_state": {
            "state": {
                n: {"step": torch.tensor(3.0), **{s: part[s] for s in STATES[1:]}} for n, part in enumerate(parts)
            },
            "param_groups": groups if moe.named else [{**g, "name": "mine"} for g in groups],
        },
        "single_partition_of_fp32_groups": [part["value"] for part in parts],
        "zero_stage": 1,
        "partition_count": [moe.dp, *(moe.dp // ep for ep in degrees)],
    }
    return {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}


def partition(tensors: Sequence[Mapping[str, Tensor]], ranks: int, rank: int) -> dict[str, Tensor]:
    """A rank's part of tensors one after the other, padded with what must not be read."""
    found = {}
    for state in STATES:
        flat = torch.cat([tensor[state].reshape(-1) for tensor in tensors])
        padded = torch.cat([flat, torch.full((-flat.numel() % (2 * ranks),), torch.nan)])
        found[state] = padded.reshape(ranks, -1)[rank].clone()
    return found


def model(moe: Moe, whole: Mapping[str, Mapping[str, Tensor]], degrees: Sequence[int]) -> dict[str, Any]:
    local = [{mine: whole[name]["value"].shape for mine, name in held(moe, ep, 0)} for ep in degrees]
    return {
        "module": {name: whole[name]["value"] for name in moe.dense},
        "param_shapes": [dict(moe.dense), *local],
        "buffer_names": [],
        "num_experts": [layer.experts for layer in moe.layers],
        "dp_world_size": moe.dp,
        "mp_world_size": 1,
        "global_steps": 3,
        "skipped_steps": 0,
        "ds_config": {"use_data_before_expert_parallelism": moe.data_first},
        "ds_version": "0.19.8",
    }


def read(folder: Path) -> Catalog:
    return CONVERTER.read(open_store(str(folder)))


SHAPES = st.dictionaries(
    st.sampled_from(["up.weight", "up.bias", "down.weight"]), st.sampled_from([(3,), (2, 5), (1,), (4, 4)]), min_size=1
)


@st.composite
def checkpoints(draw: st.DrawFn) -> Moe:
    dp = draw(st.sampled_from([1, 2, 4, 6]))
    divisors = [ep for ep in range(1, dp + 1) if dp % ep == 0]
    layers = [
        Layer(ep * draw(st.integers(1, 3)), ep, draw(SHAPES))
        for ep in draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=4))
    ]
    dense = {"embed": (draw(st.integers(1, 40)),), "head": (3, 2)}
    return Moe(dp, dense, layers, draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moe=checkpoints())
def test_every_layout(moe: Moe, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("moe") / "tag"
    whole = write(moe, folder)
    catalog = read(folder)
    assert catalog.tensors.keys() == whole.keys() == catalog.witnesses.keys()
    for name, states in whole.items():
        for state, value in states.items():
            assert np.array_equal(read_state(folder, catalog, name, state), value.numpy().view(np.uint32)), name
    named = [name for group in catalog.param_groups for name in group.params]
    assert sorted(named) == sorted(whole)


MOE = Moe(4, {"embed": (7,)}, [Layer(4, 2, {"up": (3, 5)}), Layer(8, 4, {"up": (3, 5)})])


def test_foreign_experts_are_refused(tmp_path: Path) -> None:
    write(MOE, tmp_path / "tag")
    for path in (tmp_path / "tag").glob("*"):
        root = torch.load(path)
        text = str(path.name)
        if "layer" in text:
            path.unlink()
        if text.startswith("mp_rank"):
            shapes = [{n.replace("deepspeed_moe", "other"): s for n, s in g.items()} for g in root["param_shapes"]]
            torch.save({**root, "param_shapes": shapes, "num_experts": []}, path)
    with pytest.raises(FitError, match="its name does not tell of which"):
        read(tmp_path / "tag")


def test_ranks_with_other_partition_counts(tmp_path: Path) -> None:
    write(MOE, tmp_path / "tag")
    path = tmp_path / "tag" / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    root = torch.load(path)
    root["optimizer_state_dict"]["partition_count"] = [4, 1, 2]
    torch.save(root, path)
    with pytest.raises(ConflictError, match="partition counts"):
        read(tmp_path / "tag")


def test_experts_under_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tag"
    write(MOE, folder)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path), "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}, path)
    for own in list(folder.glob("*mp_rank_00*")):
        (folder / own.name.replace("mp_rank_00", "mp_rank_01")).write_bytes(own.read_bytes())
    with pytest.raises(FitError, match="mixture of experts under tensor parallelism"):
        read(folder)
