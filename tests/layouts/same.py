"""Whether two checkpoints are the same, bit for bit."""

from __future__ import annotations

import torch

import ucp


def differences(one: str, other: str) -> list[str]:
    """What of parameters and their optimizer states, steps and hyper-parameters differs, or only one of them has."""
    a, b = ucp.open(one), ucp.open(other)
    found = sorted(set(a) ^ set(b))
    for name in sorted(set(a) & set(b)):
        mine, theirs = a[name], b[name]
        found += [f"{name}[{state}]" for state in sorted(set(mine) ^ set(theirs))]
        found += [
            f"{name}[{state}]"
            for state in sorted(set(mine) & set(theirs))
            if not torch.equal(mine[state][...], theirs[state][...]) or mine[state].dtype != theirs[state].dtype
        ]
    if _groups(a) != _groups(b):
        found.append("hyper-parameters")
    return found


def _groups(ckpt: ucp.Checkpoint) -> dict[str, tuple[float, float]]:
    return {
        name: (group.options["lr"], group.options["weight_decay"])
        for group in ckpt.param_groups
        for name in group.params
    }
