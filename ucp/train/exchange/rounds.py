"""In which order atoms are read and sent, so that no rank holds more than its buffers: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ucp.train.exchange.atoms import Atom

ALIGNMENT = 16
"""Bytes to whose multiples everything in a buffer is moved, so that it can be seen as numbers of any dtype."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_rounds(atoms: Sequence[Atom], world: int, room: int, *, sends: bool = True) -> list[list[Atom]]:
    """`atoms` in rounds: in each, no rank reads, sends or receives much more than `room` bytes.

    Owners read what they own from first to last, side by side. An atom that is larger than that has its own round.
    Without `sends`, reading alone counts.
    """
    done = [0] * world
    queue = []
    for number, atom in enumerate(atoms):
        queue.append((done[atom.owner], atom.owner, number))
        done[atom.owner] += aligned(atom.nbytes)
    rounds: list[list[Atom]] = []
    # What each rank reads, sends and receives in a round.
    used = np.zeros((3, world), np.int64)
    for _, _, number in sorted(queue):
        atom = atoms[number]
        step = np.zeros_like(used)
        each = int(atom.nbytes * min(1.0, atom.wanted / len(atom.ranks))) + ALIGNMENT
        step[0, atom.owner] = aligned(atom.nbytes)
        if not sends:
            each = 0
        step[1, atom.owner] = 0 if atom.wanted >= len(atom.ranks) else each * (len(atom.ranks) - 1)
        step[2, list(atom.ranks)] = each
        step[2, atom.owner] = 0
        if not rounds or (used + step).max() > room:
            rounds.append([])
            used[:] = 0
        rounds[-1].append(atom)
        used += step
    return rounds
