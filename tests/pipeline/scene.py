"""Small checkpoints under a prefix, and a watcher of them."""

from __future__ import annotations

import json
from typing import Any

import torch

import ucp
from ucp.pipeline import Event, Outcome, Settings, Watch
from ucp.store import open_store


def value(step: int) -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(6, 4) + step


def save(prefix: str, step: int) -> str:
    """A checkpoint of this step, told by its numbers."""
    ucp.save({"weight": value(step), "bias": torch.full((3,), float(step))}, f"{prefix}/step-{step}", step=step)
    return f"step-{step}"


def watch(source: str, destination: str, told: list[Event] | None = None, **settings: Any) -> Outcome:
    """One pass."""
    tell = told.append if told is not None else lambda event: None
    return Watch(Settings(source, destination, **settings), on_event=tell).once()


def published(destination: str, pointer: str = "latest.json") -> dict[str, Any] | None:
    store = open_store(destination)
    return json.loads(store.read(pointer)) if store.exists(pointer) else None


def check(destination: str, step: int, name: str | None = None) -> None:
    """The checkpoint of a step is there, every bit of it."""
    with ucp.open(f"{destination}/{name or f'step-{step}'}") as found:
        assert found.step == step
        assert torch.equal(found["weight"]["value"][...], value(step))


def kinds(told: list[Event]) -> list[str]:
    return [f"{event.kind} {event.name}" for event in told]
