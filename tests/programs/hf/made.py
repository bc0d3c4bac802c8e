"""A model of each case and what can be had from it, made once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.programs.hf import models
from tests.programs.hf.shards import shards
from ucp.converters._programs import Known, from_config
from ucp.lang import load_program
from ucp.lang.arrays import At, at, gather, scatter
from ucp.lang.ast import Program
from ucp.layout import Mesh

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Made:
    """A model, the folder that it was saved to, and what its config.json says."""

    case: models.Case
    module: Any
    folder: Path
    config: dict[str, Any]
    files: Arrays
    memory: Arrays

    @property
    def program(self) -> Program:
        return load_program(self.case.program)

    def known(self, *, in_memory: bool) -> Known:
        return from_config(self.config, in_memory=in_memory and self.case.in_memory)

    def gather(self, shards: Mapping[int, Arrays], *, in_memory: bool) -> Arrays:
        known = self.known(in_memory=in_memory)
        held = {self.at(rank): arrays for rank, arrays in shards.items()}
        return gather(self.program, held, mesh=self.mesh(len(shards)), config=known.sizes, flags=known.flags)

    def scatter(self, logical: Mapping[str, np.ndarray], *, ranks: int = 1, in_memory: bool) -> dict[int, Arrays]:
        known = self.known(in_memory=in_memory)
        made = scatter(self.program, logical, mesh=self.mesh(ranks), config=known.sizes, flags=known.flags)
        return {rank: made[self.at(rank)] for rank in range(ranks)}

    def at(self, rank: int) -> At:
        return at(tp=rank) if self.case.plan else ()

    def mesh(self, ranks: int) -> Mesh:
        return Mesh({"tp": ranks} if self.case.plan else {})

    @lru_cache(maxsize=4)  # noqa: B019 - a handful of tiny models
    def shards(self, tp: int) -> dict[int, Arrays]:
        """What the ranks of transformers hold."""
        return shards(models.model_class(self.case), self.folder, tp=tp)


@lru_cache
def made(name: str) -> Made:
    case = models.CASES[name]
    module, folder = models.model(case), Path(tempfile.mkdtemp(prefix="ucp-hf-"))
    files = models.saved(module, folder)
    config = json.loads((folder / "config.json").read_text())
    return Made(case, module, folder, config, files, models.arrays(module))


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether both hold the same names, shapes, dtypes and bytes."""
    assert a.keys() == b.keys()
    return all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)
