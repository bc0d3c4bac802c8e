"""Makes ``universal-1.0/``, a checkpoint of format version 1.0 that every later version must read.

Run once, when the version was fixed: ``python -m tests.data.make_universal_1_0 FOLDER``. The files that are checked in
are never made again; a test reads them and compares with what this module says they hold.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.format.build import source, write
from ucp.catalog import ParamGroup, Source
from ucp.container.values import Reference, Size
from ucp.layout import Mesh
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf

FOLDER = Path(__file__).parent / "universal-1.0"
STATES = ("value", "exp_avg", "exp_avg_sq")


def ramp(shape: tuple[int, ...], dtype: Any, start: int) -> np.ndarray:
    """Numbers that count up and wrap, so that every element of a dtype is exact."""
    size = int(np.prod(shape))
    return ((np.arange(size) + start) % 16 - 4).astype(dtype).reshape(shape)


def tensors() -> dict[str, dict[str, np.ndarray]]:
    """What the checkpoint holds."""
    adam = {
        "embed.weight": (10, 400),
        "Layers.0/attn.weight": (6, 4),
        "layers.0/attn.weight": (6, 4),
        "experts": (3, 4, 5),
        "bias": (7,),
        "empty": (0, 3),
        "naïve": (2,),
    }
    found = {
        name: {state: ramp(shape, "f4", i + j) for j, state in enumerate(STATES)}
        for i, (name, shape) in enumerate(adam.items())
    }
    found["scale"] = {"value": ramp((), "f4", 5), "step": ramp((), "i8", 9)}
    found["factored"] = {"value": ramp((4, 6), "f4", 0), "row": ramp((4,), "f4", 1), "col": ramp((6,), "f4", 2)}
    for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        found[dtype] = {"value": ramp((3, 4), getattr(ml_dtypes, dtype), 0)}
    for dtype in ("float16", "float64", "int64", "int32", "uint8", "bool", "complex64"):
        found[dtype] = {"value": ramp((3, 4), dtype, 0)}
    return found


def leaf(array: np.ndarray, **options: Any) -> TensorLeaf:
    """An array as part of a tree."""
    return TensorLeaf(Extent.contiguous("", 0, array.shape, array.dtype.name), inline=array.tobytes(), **options)


def state() -> dict[str, Any]:
    """The training state that the checkpoint holds."""
    scheduler = Opaque("torch.optim.lr_scheduler", "StepLR", (1,), {"gamma": 0.5}, {"last": -0.0}, [2], [("k", 3)])
    return {
        "scheduler": scheduler,
        "rng": {"cpu": leaf(ramp((600,), "u1", 4)), "numpy": leaf(ramp((3,), "i8", 4), numpy=True)},
        "client": {
            1: (2**70, -1.5, 1j),
            "set": {1, 2},
            "frozen": frozenset({"a"}),
            "size": Size((2, 3)),
            "raw": b"\0\xff",
        },
        "dtype": Reference("torch", "bfloat16"),
        "long": b"0123456789" * 30,
        "infinite": [float("inf"), float("-inf")],
    }


CHANGES: dict[str, Any] = {
    "source": Source("deepspeed", "0.19.8", Mesh({"pp": 2, "dp": 2}), {"zero_stage": 2, "loss_scale": 0.5}),
    "step": 1234,
    "ties": {"head.weight": "embed.weight"},
    "param_groups": (
        ParamGroup(("embed.weight", "experts"), {"lr": 0.001, "betas": (0.9, 0.999), "foreach": None}),
        ParamGroup(("bias",), {"lr": 0.001, "weight_decay": 0}),
    ),
    "notes": ("made for a test",),
}


def main(folder: Path) -> None:
    """Write the checkpoint into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        catalog, store = source(Path(scratch), tensors(), state=state(), **CHANGES)
        named = replace(catalog.tensors["embed.weight"], dims=("vocabulary", "hidden"))
        frozen = replace(catalog.tensors["bias"], kind="frozen", scalars={})
        changed = {**catalog.tensors, "embed.weight": named, "bias": frozen}
        write(replace(catalog, tensors=changed), store, folder, shard_bytes=12_000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
