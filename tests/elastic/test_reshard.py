"""Real ranks that go on from the memory of nodes alone: other worlds, another sharding, damaged copies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ucp
from tests.support.gloo import spawn
from ucp.elastic import Memory, Run, keep
from ucp.errors import CorruptError

WIDTH = 12


def sharded(kind, mesh):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
    if kind == "whole":
        return model
    dim = 1 if kind == "columns" else 0
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda value: Shard(dim) if value.ndim > dim else Shard(0))
    return model


def numbers(model, optimizer):
    """All of the state, whole."""
    found = {}
    for name, value in model.named_parameters():
        found[name] = value
        for key, held in optimizer.state.get(value, {}).items():
            found[f"{name}.{key}"] = held
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def goes_on(rank, world, folder, kind, nodes, until, copies=1):
    """One start: what it found, and the state before its first and after its last step. It ends without a word."""
    os.environ["UCP_NODE"] = f"n{rank * nodes // world}"
    kept = Memory(every=1, copies=copies, root=f"{folder}/memory", busy="wait")
    run = Run(f"{folder}/run", layouts=keep(), memory=kept, timeout=200).__enter__()
    model = sharded(kind, init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = run.resume((model, optimizer))
    before = numbers(model, optimizer)
    for step in range(run.done + 1, until + 1):
        data = torch.randn(world, WIDTH, generator=torch.Generator().manual_seed(step))
        model(data[rank : rank + 1] if kind != "whole" else data).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(step, (model, optimizer))
    run.tiers[0].settle()
    distributed.barrier()
    told = None if found is None else (found.step, found.tier, found.reconfigured)
    return told, before, numbers(model, optimizer), [(version.step, why) for version, why in getattr(found, "left", ())]


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_memory_alone_takes_a_state_from_four_ranks_to_two_to_three_bit_by_bit(tmp_path):
    _, _, after, _ = spawn(goes_on, 4, str(tmp_path), "rows", 2, 2)[0]
    assert any(name.endswith("exp_avg_sq") for name in after)
    for world, until in ((2, 4), (3, 6)):
        ranks = spawn(goes_on, world, str(tmp_path), "rows", 2, until)
        for told, before, _, _ in ranks:
            assert told == (until - 2, "memory", True)
            same(before, after)
        after = ranks[0][2]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["elastic"]
    # With nothing changed, each reads its own.
    for told, before, _, _ in spawn(goes_on, 3, str(tmp_path), "rows", 2, 6):
        assert told == (6, "memory", False)
        same(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("rows", "columns"), ("rows", "whole"), ("whole", "rows")])
def test_another_sharding_on_the_same_mesh_is_no_reload_of_ones_own(tmp_path, first, then):
    """Same ranks, same nodes, same axes: only the boxes differ."""
    _, _, after, _ = spawn(goes_on, 2, str(tmp_path), first, 2, 1)[0]
    for told, before, _, _ in spawn(goes_on, 2, str(tmp_path), then, 2, 1):
        assert told == (1, "memory", True)
        same(before, after)
    for told, before, _, _ in spawn(goes_on, 2, str(tmp_path), first, 2, 1):
        assert told == (1, "memory", False)
        same(before, after)


def shards(folder, node):
    return sorted(path for path in Path(folder).rglob("*.safetensors") if f"/{node}/" in str(path))


@pytest.mark.slow
def test_a_copy_that_is_damaged_is_made_up_for_by_another_nodes(tmp_path):
    _, _, after, _ = spawn(goes_on, 2, str(tmp_path), "rows", 2, 2, 2)[0]
    damaged = shards(tmp_path, "n0")
    assert len(damaged) == len(shards(tmp_path, "n1")) == 2
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    for told, before, _, left in spawn(goes_on, 2, str(tmp_path), "rows", 2, 2, 2):
        assert told is not None
        assert (told[:2], left) == ((2, "memory"), [])
        same(before, after)


TALL = torch.arange(8192 * 96, dtype=torch.float32).reshape(8192, 96)


def saves_rows(rank, world, url):
    mesh = init_device_mesh("cpu", (world,))
    ucp.save({"w": distribute_tensor(TALL, mesh, [Shard(0)])}, url)


def loads_columns(rank, world, url):
    """What came of it: an error's name, or whether the columns are right."""
    mesh = init_device_mesh("cpu", (world,))
    columns = distribute_tensor(torch.zeros(TALL.shape), mesh, [Shard(1)])
    try:
        ucp.load({"w": columns}, url)
    except CorruptError:
        return "damaged"
    return torch.equal(columns.full_tensor(), TALL)


@pytest.mark.slow
def test_damage_is_found_by_ranks_that_want_thousands_of_scattered_parts_of_it(tmp_path):
    """Each wants half of every row, and a checksum is over thousands: far more parts than ranks tell each other of."""
    url = str(tmp_path / "tall")
    spawn(saves_rows, 2, url)
    assert spawn(loads_columns, 2, url) == [True, True]
    (shard,) = (tmp_path / "tall" / "shards").glob("rank-00001-*")
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    assert spawn(loads_columns, 2, url) == ["damaged", "damaged"]
