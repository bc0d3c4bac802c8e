"""Checkpoints that are told apart by their step, which says what is in them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache

import torch

import ucp
from ucp.errors import NotFoundError
from ucp.mapping import read_source
from ucp.run.verify import verify
from ucp.testing.example import held, read_all


def tensors(step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of `step` holds: two small tensors."""
    return {"w": torch.arange(15.0).reshape(5, 3) + 100 * step, "b": torch.full((4,), step, dtype=torch.bfloat16)}


def opens(url: str, family: str | None = None) -> int | None:
    """The step of the checkpoint at `url`, which is whole, verified byte by byte, and holds what that step has.

    None if there is none.
    """
    try:
        catalog, store = read_source(url, family=family)
    except NotFoundError:
        return None
    verdict = verify(catalog, store, deep=True, workers=1)
    assert verdict.ok, f"{url} opens, and is not whole: {verdict.findings}"
    assert catalog.step is not None
    truth = {name: {"value": held(tensor)} for name, tensor in tensors(catalog.step).items()}
    assert read_all(catalog, store) == truth, f"{url} opens as step {catalog.step}, and holds something else"
    return catalog.step


def forget_at_exit(folder: str) -> str:
    """The same folder, which is deleted when the process ends."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def source(step: int) -> str:
    """A folder with a checkpoint of `step`, to be converted."""
    folder = forget_at_exit(tempfile.mkdtemp(prefix="ucp-source-"))
    ucp.save(tensors(step), f"{folder}/{step}", step=step)
    return f"{folder}/{step}"


@cache
def universal(step: int) -> str:
    """The same, in the universal form, whose objects have the same names in every checkpoint."""
    folder = forget_at_exit(tempfile.mkdtemp(prefix="ucp-source-"))
    ucp.save(tensors(step), f"{folder}/{step}", step=step, form="universal")
    return f"{folder}/{step}"
