"""Names of the parameters of an optimizer that only numbers them (ZeRO 0)."""

from __future__ import annotations

from collections.abc import Sequence

from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .._numbered import names as numbered
from .._numbered.names import Candidates, Member, Names, Words, candidates_of
from .._numbered.rounding import is_rounded

_WORDS = Words(
    inferred=(
        "names of optimizer states were inferred from shapes, in the module's order of parameters: ZeRO 0 saves no "
        "names"
    ),
    remedy=(
        "name the parameters that were not trained, for example frozen='adapter.*' (on the command line: "
        "-o 'frozen=adapter.*'), when the DeepSpeed checkpoint is read; or save it with ZeRO 1, which saves names"
    ),
)


def names_of(
    store: Store,
    candidates: Candidates,
    groups: Sequence[Sequence[Member]],
    hints: Sequence[Sequence[Tree]],
    path: str,
) -> Names:
    """See `ucp.converters._numbered.names.names_of`."""
    return numbered.names_of(store, candidates, groups, hints, path, words=_WORDS)


def unnamed(names: Sequence[str], sizes: Sequence[int], path: str, why: str) -> Names:
    """Nothing is certain of groups of `sizes`."""
    return numbered.unnamed(names, sizes, path, why, words=_WORDS)


def undecided(names: Sequence[str], path: str, why: str) -> tuple[dict[str, str], list[str]]:
    """For names of which the optimizer's part is not known: what would settle each, and a remark."""
    return numbered.undecided(names, path, why, words=_WORDS)


def flat_names(store: Store, candidates: Candidates, masters: Sequence[TensorLeaf]) -> list[list[str] | None]:
    """Names of each flat group in flat order: the module's parameters are views of flat 16-bit tensors of that order.

    None for a group of which the module does not show which these are.
    """
    runs = _runs(candidates)
    leaves = [_joined([candidates.leaves[name] for name in run]) for run in runs]
    found = [
        [
            run
            for run, leaf in zip(runs, leaves, strict=True)
            if leaf.extent.size == master.extent.size and is_rounded(store, master, leaf)
        ]
        for master in masters
    ]
    wanted = [run for fitting in found for run in fitting]
    return [fitting[0] if len(fitting) == 1 and wanted.count(fitting[0]) == 1 else None for fitting in found]


def _runs(candidates: Candidates) -> list[list[str]]:
    """Names whose tensors lie back to back in the file, each run one flat storage."""
    ordered = sorted(candidates.leaves, key=lambda name: candidates.leaves[name].extent.offset)
    runs: list[list[str]] = []
    for name in ordered:
        extent = candidates.leaves[name].extent
        before = candidates.leaves[runs[-1][-1]].extent if runs else None
        if before is not None and extent.is_contiguous and before.span[1] == extent.offset:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _joined(leaves: Sequence[TensorLeaf]) -> TensorLeaf:
    first = leaves[0].extent
    size = sum(leaf.extent.size for leaf in leaves)
    return TensorLeaf(Extent.contiguous(first.object, first.offset, (size,), first.dtype))


__all__ = ["Candidates", "Member", "Names", "candidates_of", "flat_names", "names_of", "undecided", "unnamed"]
