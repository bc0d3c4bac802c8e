"""A job for spot instances: FSDP2 on as many ranks as there are. ``torchrun … train.py CHECKPOINTS LOG``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import Dataset

from ucp.elastic import Batch, Feed, Memory, Run, keep

STEPS, WIDTH, LENGTH = 150, 64, 48


class Source(Dataset[Tensor]):
    """Pieces of a text that every machine with Python has: the source of its module argparse, by byte."""

    def __init__(self) -> None:
        text = Path(argparse.__file__).read_bytes()
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, number: int) -> Tensor:
        return self.tokens[number * LENGTH : (number + 1) * LENGTH + 1]


class Model(nn.Module):
    """Two transformer layers over bytes; the mean loss of a batch ``[samples, LENGTH + 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.embed(batch[:, :-1]) + self.place(torch.arange(LENGTH))
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return functional.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


def build(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, sharded over all ranks, and its optimizer."""
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def main(checkpoints: str, log: str) -> None:
    """Train to the end, on the ranks that there are."""
    batch = Batch(samples=24, micro=6)
    # Folders of the run in the nodes' memory are named after that of torchrun.
    run = Run(
        checkpoints,
        layouts=keep(),
        batch=batch,
        memory=Memory(every=2, copies=2),
        job=os.environ.get("TORCHELASTIC_RUN_ID"),
        every=50,
        keep_latest=2,
    )
    with run:
        model, optimizer = build(run.device_mesh("cpu"))
        feed = Feed(Source(), batch, seed=0)
        feed.place(*run.seat)
        state = {"model": model, "optimizer": optimizer, "feed": feed}
        run.resume(state)
        for step in run.steps(STEPS):
            mean = torch.zeros(())
            for tokens, weight in feed.step():
                loss = weight * model(tokens)
                loss.backward()
                mean += loss.detach() / run.world
            optimizer.step()
            optimizer.zero_grad()
            run.step(step, state)

            distributed.all_reduce(mean)
            if run.rank == 0:
                line = {"time": time.time(), "epoch": run.epoch, "step": step, "loss": mean.item(), "ranks": run.world}
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
