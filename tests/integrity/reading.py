"""Everything a checkpoint says, by each of the ways in which it is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import ucp
from tests.integrity.made import job
from ucp.errors import UcpError
from ucp.mapping import read_source
from ucp.run.verify import verify


def found_by_verify(url: str) -> bool:
    """Whether opening raises, or ``verify --deep`` finds anything."""
    try:
        catalog, store = read_source(url)
        with closing(store):
            return not verify(catalog, store, deep=True, workers=1).ok
    except UcpError:
        return True


def by_opening(url: str, _: Path) -> Any:
    """Every state of every tensor, groups, ties and the training state."""
    with ucp.open(url) as ckpt:
        tensors = {(name, state): ckpt[name][state][...] for name in ckpt for state in ckpt[name]}
        state = {name: ckpt.read_state(name) for name in ckpt.state}
        return plain([tensors, state, dict(ckpt.ties), list(ckpt.param_groups), ckpt.step])


def by_loading(url: str, _: Path) -> Any:
    """A job that began elsewhere, after it was filled."""
    target = job(seed=8, large="large" in ucp.open(url))
    kept = torch.get_rng_state()
    try:
        report = ucp.load(target, url, strict="rng" in ucp.open(url).state)
        rng = torch.get_rng_state()
    finally:
        torch.set_rng_state(kept)
    states = [target[name].state_dict() for name in ("model", "optimizer", "lr_scheduler")]
    return plain([states, target["epoch"], rng, report.step])


def by_converting(url: str, place: Path) -> Any:
    """What is in the universal checkpoint that is made of it."""
    folder = place / "converted"
    try:
        ucp.convert(url, str(folder), workers=1)
        return by_opening(str(folder), place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


WAYS: tuple[Callable[[str, Path], Any], ...] = (by_opening, by_loading, by_converting)


def outcome(way: Callable[[str, Path], Any], url: str, place: Path) -> Any:
    """What a way of reading gives, or None where it raises one of our errors."""
    try:
        return way(url, place)
    except UcpError:
        return None


def plain(value: Any) -> str:
    """Equal texts for equal values, bit for bit."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{list(value.shape)}{data.hex() if len(data) < 4096 else hash(data)}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{plain(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(plain(one) for one in value) + "]"
    return repr(value)
