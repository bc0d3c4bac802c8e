"""Catalogs over arrays, and the universal folders written from them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from ucp.catalog import Catalog, ParamGroup, Scalar, Source, Tensor
from ucp.converters.deepspeed_universal import CONVERTER
from ucp.layout import Box, Mesh
from ucp.plan import Extent, Fragment, Key, Plan, TensorSpec
from ucp.run.integrity import Ledger, Spans
from ucp.run.worker import write_object
from ucp.store import Store, open_store


class Made:
    """A catalog over arrays that lie in a memory store."""

    def __init__(self, name: str) -> None:
        self.store = open_store(f"memory://deepspeed-universal/{name}/source")
        self.out = open_store(f"memory://deepspeed-universal/{name}/out")
        self.tensors: dict[str, Tensor] = {}
        self.fragments: dict[Key, tuple[Fragment, ...]] = {}

    def add(self, name: str, kind: Any = "parameter", *, step: float | None = 3.0, **states: Any) -> None:
        specs = {}
        for state, array in states.items():
            path = f"{len(self.fragments)}.bin"
            self.store.put(path, array.tobytes())
            specs[state] = TensorSpec(array.shape, str(array.dtype))
            extent = Extent.contiguous(path, 0, array.shape, str(array.dtype))
            self.fragments[Key(name, state)] = (Fragment(Box.whole(array.shape), extent),)
        scalars = {} if step is None or kind != "parameter" else {"step": Scalar(step, "float32")}
        self.tensors[name] = Tensor(name, kind, specs, scalars)

    def adam(self, name: str, *shape: int, step: float = 3.0) -> None:
        value = np.arange(np.prod(shape, dtype=int), dtype="float32").reshape(shape) + len(self.tensors)
        self.add(name, step=step, value=value, exp_avg=value * 2, exp_avg_sq=value * 3)

    def catalog(self, groups: tuple[ParamGroup, ...] = (), **others: Any) -> Catalog:
        names = tuple(name for name, tensor in self.tensors.items() if tensor.kind == "parameter")
        return Catalog(
            url=self.store.url,
            source=Source("test", "1", Mesh({"dp": 2})),
            tensors=self.tensors,
            fragments=self.fragments,
            step=3,
            param_groups=groups or (ParamGroup(names, {"lr": 0.1, "betas": (0.9, 0.99)}),),
            **others,
        )

    def write(self, catalog: Catalog, **options: Any) -> Store:
        target = CONVERTER.target(catalog, self.store, **options)
        ledger = Ledger(Spans(()))
        digests = {
            task.object: write_object(self.store, self.out, task, ledger=ledger, advance=lambda _: None)[0]
            for task in Plan.of(target.tasks).tasks
        }
        for path, data in target.finish(digests):
            self.out.put(path, data)
        return self.out

    def load(self, path: str, *, weights_only: bool = True) -> Any:
        data = self.out.read(f"global_step3_universal/{path}")
        return torch.load(io.BytesIO(data), weights_only=weights_only)
