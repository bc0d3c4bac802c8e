"""A small checkpoint with something of everything, its truth, and how a catalog is written by any converter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, Kind, ParamGroup, Scalar, Source, Tensor
from ucp.converter import Converter, Target
from ucp.layout import Box, Mesh
from ucp.plan import Extent, Fragment, Key, Plan, TensorSpec
from ucp.run.convert import Conversion, carry_out
from ucp.run.destination import Wanted
from ucp.run.gather import read_region
from ucp.store import LocalStore, Store, open_store

Held = tuple[TensorSpec, bytes]
"""Shape and dtype of a state, and its bytes in C order, little-endian."""

Truth = Mapping[str, Mapping[str, Held]]
"""Every state of every tensor: name -> state -> what it holds."""

_DATA = "data.bin"


def held(array: Any) -> Held:
    """What a numpy array or a torch tensor holds."""
    if isinstance(array, np.ndarray):
        return TensorSpec(array.shape, array.dtype.name), np.ascontiguousarray(array).tobytes()
    import torch

    flat = array.detach().contiguous().reshape(-1).view(torch.uint8)
    return TensorSpec(tuple(array.shape), str(array.dtype).removeprefix("torch.")), flat.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class Sample:
    """A checkpoint on a local disk: a folder or a file at `path`, what is in it, and options to read it with.

    `truth` may leave out tensors, and says of those it has what all states are.
    """

    path: Path
    truth: Truth
    options: Mapping[str, Any] = field(default_factory=dict)


def read_all(catalog: Catalog, store: Store) -> dict[str, dict[str, Held]]:
    """Every state of every tensor of a catalog."""
    found: dict[str, dict[str, Held]] = {}
    for name, tensor in catalog.tensors.items():
        for state, spec in tensor.states.items():
            data = read_region(store, catalog.cover(name, state), Box.whole(spec.shape))
            found.setdefault(name, {})[state] = spec, data.tobytes()
    return found


def example(folder: Path, *, width: int = 24, names: Mapping[str, str] | None = None) -> tuple[Catalog, Store]:
    """A catalog of made-up numbers, which lie in a file that this writes into `folder`.

    It has trained parameters with Adam's states, a frozen one, buffers, a tie, two groups and training state; `width`
    sets its size (1024: about 14 MB). `names` gives some of its tensors other names.
    """
    made = _Made(np.random.default_rng(width), dict(names or {}))
    for name, shape in (("embed.weight", (97, width)), ("layer.weight", (width, width)), ("layer.bias", (width,))):
        made.add(name, "parameter", {state: made.floats(shape) for state in ("value", "exp_avg", "exp_avg_sq")})
    made.add("fixed.weight", "frozen", {"value": made.floats((7, width))})
    made.add("mean", "buffer", {"value": made.floats((width,))})
    made.add("count", "buffer", {"value": np.array(12, np.int64)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DATA).write_bytes(made.data)
    store = LocalStore(str(folder))
    entry = store.entry(_DATA)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    catalog = Catalog(
        url=store.url,
        source=Source("example", "1", Mesh({})),
        tensors=made.tensors,
        fragments=made.fragments,
        step=3,
        ties={"head.weight": made.name("embed.weight")},
        param_groups=(
            ParamGroup(
                tuple(map(made.name, ("embed.weight", "layer.weight"))), {"lr": 0.1, "weight_decay": 0.5, **options}
            ),
            ParamGroup((made.name("layer.bias"),), {"lr": 0.2, "weight_decay": 0.0, **options}),
        ),
        state={"lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1, 0.2]}, "consumed_samples": 12},
        objects={_DATA: (entry.size, entry.fingerprint)},
    )
    return catalog, store


class _Made:
    """Tensors as they are made, one after the other in one file."""

    def __init__(self, random: np.random.Generator, names: dict[str, str]) -> None:
        self.data = b""
        self.tensors: dict[str, Tensor] = {}
        self.fragments: dict[Key, tuple[Fragment, ...]] = {}
        self._random, self._names = random, names

    def name(self, name: str) -> str:
        return self._names.get(name, name)

    def floats(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self._random.standard_normal(shape, np.float32)

    def add(self, name: str, kind: Kind, states: Mapping[str, np.ndarray[Any, Any]]) -> None:
        name = self.name(name)
        specs: dict[str, TensorSpec] = {}
        for state, array in states.items():
            specs[state], data = held(array)
            extent = Extent.contiguous(_DATA, len(self.data), array.shape, array.dtype.name)
            self.fragments[Key(name, state)] = (Fragment(Box.whole(array.shape), extent),)
            self.data += data
        scalars = {"step": Scalar(3.0, "float32")} if "exp_avg" in states else {}
        self.tensors[name] = Tensor(name, kind, specs, scalars)


def prepared(target: Target, catalog: Catalog, source: Store, destination: Store) -> Conversion:
    """The conversion that writes `target` to `destination`, whether or not its converter is installed."""
    plan = Plan.of(target.tasks)
    wanted = Wanted(target, f"conformance of {target.family}")
    return Conversion(catalog, target, plan, target.family, source, destination, wanted, "new")


def write(converter: Converter, catalog: Catalog, store: Store, url: Path | str, **options: Any) -> Store:
    """Write `catalog`, which lies in `store`, to `url` as the converter lays it out; gives the store of the result."""
    destination = open_store(str(url))
    target = converter.target(catalog, store, **options)
    carry_out(prepared(target, catalog, store, destination), workers=1)
    return destination


__all__ = ["Held", "Sample", "Truth", "example", "held", "prepared", "read_all", "write"]
