"""A loader that counts what training consumed of what its sampler drew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from ucp.errors import UsageError
from ucp.train.state.sampler import ReshardableSampler


class ReshardableLoader:
    """Iterates over `loader`, a ``DataLoader`` or torchdata's ``StatefulDataLoader``, and keeps its place.

    `loader` draws through a `ReshardableSampler`. Save and load this object, ``{"loader": loader}``: on any number of
    ranks, with any number of workers and any batch size, the next iteration goes on after the last batch that was
    yielded. Batches that workers fetched ahead are fetched again.

    An iteration ends with the epoch; one that was left by ``break`` is gone on with by the next.

    Unless the loader has one, it gets a generator of its own for its workers' seeds, so that starting an iteration
    takes nothing from torch's global stream.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.sampler, self.batch_size, self.drop_last = _drawing(loader)
        if not getattr(loader, "in_order", True):
            raise UsageError("ReshardableLoader: batches may come out of order", hint="DataLoader(in_order=True)")
        self._seeds = torch.Generator() if loader.generator is None else None
        if self._seeds is not None:
            loader.generator = self._seeds

    def __len__(self) -> int:
        """Batches of an iteration that starts now."""
        count = len(self.sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        current = self.sampler.begin()
        if self._seeds is not None:
            self._seeds.manual_seed(_seed(self.sampler))
        for number, batch in enumerate(self.loader, 1):
            self.sampler.reach(current, number * self.batch_size * self.sampler.ranks)
            yield batch
        self.sampler.finish(current)


def _drawing(loader: DataLoader[Any]) -> tuple[ReshardableSampler, int, bool]:
    """The sampler, batch size and whether a last partial batch is dropped."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if not isinstance(sampler, ReshardableSampler):
        raise UsageError(
            f"ReshardableLoader: the loader draws with a {type(sampler).__name__}",
            hint="DataLoader(dataset, sampler=ucp.ReshardableSampler(dataset), batch_size=...)",
        )
    if batches is None:
        return sampler, 1, False
    if not isinstance(batches, BatchSampler):
        raise UsageError(f"ReshardableLoader: a {type(batches).__name__} is no torch.utils.data.BatchSampler")
    return sampler, batches.batch_size, batches.drop_last


def _seed(sampler: ReshardableSampler) -> int:
    """Of its workers, by place in the data and rank."""
    told = f"{sampler.seed} {sampler.position} {sampler.rank} {sampler.ranks}".encode()
    digest = hashlib.blake2b(told, digest_size=8, person=b"ucp.loader").digest()
    return int.from_bytes(digest, "little") >> 1
