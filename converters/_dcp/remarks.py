"""What a reader of a DCP checkpoint should know that the checkpoint does not say outright."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite

from ucp.catalog import Tensor

_MOST_NAMES = 6


def kind_notes(
    tensors: Mapping[str, Tensor], *, trained: bool, apart: Collection[str], known: Collection[str] = ()
) -> list[str]:
    """Which tensors are taken for what: DCP does not say whether a tensor is a parameter, frozen, or a buffer."""
    notes = []
    frozen = [name for name, tensor in tensors.items() if tensor.kind == "frozen" and name not in known]
    if not trained:
        notes.append("no optimizer was saved: all floating-point tensors are taken for parameters")
    elif frozen:
        notes.append(f"no optimizer has {_some(frozen)}: taken for frozen (buffers and tied weights look the same)")
    if apart:
        notes.append(f"neither the model's nor an optimizer's, kept under their keys: {_some(sorted(apart))}")
    return notes


def state_notes(tensors: Mapping[str, Tensor], *, flat: bool) -> list[str]:
    """Parameters that lack a state which others have, and where groups come from."""
    notes = []
    trained = [tensor for tensor in tensors.values() if tensor.kind == "parameter" and tensor.undecided is None]
    kinds: dict[frozenset[str], list[str]] = {}
    for tensor in trained:
        kinds.setdefault(frozenset([*tensor.states, *tensor.scalars]) - {"value"}, []).append(tensor.name)
    if len(kinds) > 1:
        told = [f"{' '.join(sorted(states)) or 'none'}: {_some(names)}" for states, names in kinds.items()]
        notes.append(f"not all parameters have the same optimizer states: {'; '.join(told)}")
    if flat:
        notes.append("hyper-parameters were saved by parameter: those with equal ones are one group here")
    return notes


def step_of(tensors: Mapping[str, Tensor], told: int | None) -> tuple[int | None, list[str]]:
    """The optimizer's step, else the one that the job told; remarks where they or the parameters' steps differ."""
    steps = {tensor.scalars["step"].value for tensor in tensors.values() if "step" in tensor.scalars}
    if not steps:
        return told, []
    if not all(map(isfinite, steps)):
        return told, ["the optimizer's steps are no finite numbers"]
    notes = []
    last = int(max(steps))
    if len(steps) > 1:
        counts = " ".join(f"{step:g}" for step in sorted(steps))
        notes.append(f"parameters are at different optimizer steps: {counts}")
    if told is not None and told != last:
        notes.append(f"the optimizer counted {last} steps, the job {told}")
    return last, notes


def _some(names: Sequence[str]) -> str:
    return " ".join(names) if len(names) <= _MOST_NAMES else f"{' '.join(names[:_MOST_NAMES])} … ({len(names)} tensors)"
