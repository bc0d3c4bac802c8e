"""`ucp.load` through a program on real ranks: tensor and pipeline parallel, and FSDP2 over permuted tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ucp
from tests.format.build import write
from tests.support.gloo import spawn
from tests.train.handmade import columns, make
from tests.train.staged import LOGICAL, PROGRAM, SIZES, Stage, adamw, check, checkpoint
from ucp.lang import parse
from ucp.store import LocalStore

ROTARY = """format 1
size vocab heads half hidden
state * : like param
model.embed.weight [vocab, hidden] <-> embed.weight [vocab, hidden]
model.q.weight [heads 2 half, hidden] <-> attn.q.weight [heads half 2, hidden]
"""


def load_stage(rank: int, world: int, url: str) -> int:
    """One rank of a job of two stages of two ranks each; its place follows from its rank."""
    place = {"tp": 2, "pp": 2, "tp_rank": rank % 2, "pp_rank": rank // 2}
    stage = Stage(**place)
    optimizer = adamw(stage)
    report = ucp.load((stage, optimizer), url, program=parse(PROGRAM), mesh={"pp": 2, "tp": 2}, sizes=SIZES)
    assert report.bytes_checked > 3 * report.bytes_read / 2, "what ranks read half of each is checked together"
    return check(stage, optimizer, **place)


def universal(folder: Path) -> str:
    made = checkpoint(folder / "made")
    write(made.catalog, LocalStore(made.store.url), folder / "universal")
    return str(folder / "universal")


def test_four_ranks_of_tensor_and_pipeline_parallel_get_their_own_parts(tmp_path):
    assert spawn(load_stage, 4, universal(tmp_path)) == [9, 9, 9, 9]


def load_damaged(rank: int, world: int, url: str) -> str:
    stage = Stage(tp=2, pp=2, tp_rank=rank % 2, pp_rank=rank // 2)
    with pytest.raises(ucp.CorruptError) as caught:
        ucp.load(stage, url, program=parse(PROGRAM), mesh={"pp": 2, "tp": 2}, sizes=SIZES)
    return caught.value.message


def test_damage_that_one_stage_finds_is_told_to_all(tmp_path):
    url = universal(tmp_path)
    (path,) = (file for file in Path(url, "tensors", "layers.0.o.weight", "c").rglob("*") if file.is_file())
    data = bytearray(path.read_bytes())
    tensor = LOGICAL["layers.0.o.weight"].numpy().tobytes()
    data[data.index(tensor) + 17] ^= 1
    path.write_bytes(data)
    messages = spawn(load_damaged, 4, url)
    assert all("layers.0.o.weight" in message for message in messages)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(7, 6)
        self.model.q = nn.Linear(6, 24, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.q(self.model.embed(tokens))


def load_sharded(rank: int, world: int, url: str) -> dict[str, np.ndarray]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = Model()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with ucp.open(url) as ckpt:
        ucp.load((model, optimizer), ckpt, program=parse(ROTARY), sizes={"heads": 2}, hyper_parameters=False)
    found = {name: p.detach().full_tensor().numpy() for name, p in model.named_parameters()}
    weight = model.model.q.weight
    return found | {"exp_avg": optimizer.state[weight]["exp_avg"].full_tensor().numpy()}


def test_shards_of_a_permuted_tensor_are_put_together_on_each_rank(tmp_path):
    """Three ranks cut a tensor of 24 rows in the middle of heads."""
    embed, q = torch.randn(7, 6), torch.randn(24, 6)
    tensors = {
        name: {"value": tensor, "exp_avg": tensor + 1, "exp_avg_sq": tensor + 2}
        for name, tensor in (("embed.weight", embed), ("attn.q.weight", q))
    }
    catalog, store = make(str(tmp_path / "made"), tensors, cut=columns(2), steps=dict.fromkeys(tensors, 2.0))

    write(catalog, LocalStore(store.url), tmp_path / "universal")
    expected = q.reshape(2, 6, 2, 6).transpose(1, 2).reshape(24, 6)
    for found in spawn(load_sharded, 3, str(tmp_path / "universal")):
        np.testing.assert_array_equal(found["model.q.weight"], expected.numpy())
        np.testing.assert_array_equal(found["exp_avg"], expected.numpy() + np.float32(1))
        np.testing.assert_array_equal(found["model.embed.weight"], embed.numpy())
