"""Names for dims: those that a tensor's name suggests, kept consistent by size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ucp.layout import Shape

_NORM = re.compile(r"norm|(^|\.)ln(_|\.|$)|_ln(\.|$)", re.IGNORECASE)
_ROLES: tuple[tuple[re.Pattern[str], int, tuple[str | None, ...]], ...] = tuple(
    (re.compile(pattern), rank, names)
    for pattern, rank, names in (
        (r"(wpe|position_embeddings?|embed_positions|pos_embed)\.weight$", 2, ("positions", "hidden")),
        (r"(embed\w*|wte|\w+_embeddings|lm_head|output_layer)\.weight$", 2, ("vocab", "hidden")),
        (r"(router|mlp\.gate|block_sparse_moe\.gate)\.weight$", 2, ("experts", "hidden")),
        (r"experts\..*(w2|down_proj|fc2|linear_fc2|down)\.weight$", 2, ("hidden", "ffn_moe")),
        (r"experts\..*\.weight$", 2, ("ffn_moe", "hidden")),
        (r"(mlp|ffn|feed_forward)\..*(fc2|4h_to_h|down|c_proj|w2|fc_out)\w*\.weight$", 2, ("hidden", "ffn")),
        (r"(mlp|ffn|feed_forward)\..*\.weight$", 2, ("ffn", "hidden")),
        (r"(mlp|ffn|feed_forward)\..*(fc2|4h_to_h|down|c_proj|w2|fc_out)\w*\.bias$", 1, ("hidden",)),
        (r"(mlp|ffn|feed_forward)\..*\.bias$", 1, ("ffn",)),
        (r"[qk]_(layer)?norm\.weight$", 1, ("d",)),
    )
)
_OWN = re.compile(r"n[0-9]+[a-z]?")
_OUT = re.compile(r"(^|\.)(o_proj|out_proj|dense|linear_proj|wo|out)\.weight$")


def is_norm(words: str) -> bool:
    """Whether a name looks like that of a normalization."""
    return _NORM.search(words) is not None


def hidden_size(tensors: Iterable[tuple[str, Shape]]) -> int | None:
    """The width of the model: what most norms have, else the most frequent length in tensors of two dims."""
    norms: Counter[int] = Counter()
    others: Counter[int] = Counter()
    for words, shape in tensors:
        if len(shape) == 1 and is_norm(words) and not re.search(r"[qk]_(layer)?norm", words):
            norms[shape[0]] += 1
        elif len(shape) == 2:
            others.update({shape[0]: 1})
            others.update({shape[1]: 3 if "embed" in words else 2})  # torch's weights are [out, in]
    best = (norms or others).most_common(1)
    return best[0][0] if best else None


@dataclass
class Dims:
    """Names given so far, by name and by size. A name has one size."""

    sizes: dict[str, int] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()

    def suggest(self, name: str, size: int) -> None:
        """Give `name` to `size`, unless it has another one already."""
        if name not in self.taken and size > 1:
            self.sizes.setdefault(name, size)

    def names(self, words: str, shape: Shape) -> tuple[str, ...]:
        """A name for each dim of a tensor; a dim of one element is the number 1."""
        wanted = _roles(words, len(shape))
        for name, size in zip(wanted, shape, strict=True):
            if name is not None and size not in self.sizes.values():
                self.suggest(name, size)
        found = ["1"] * len(shape)
        for dim in sorted(range(len(shape)), key=lambda dim: wanted[dim] is None):
            if shape[dim] != 1:
                found[dim] = self._name(wanted[dim], shape[dim], found)
        return tuple(found)

    def _name(self, wanted: str | None, size: int, used: Sequence[str]) -> str:
        if wanted is not None and self.sizes.get(wanted) == size and wanted not in used:
            return wanted
        # Names with a meaning of their own are not lent: an attention dim that is as long as the MLP is not `ffn`.
        lent = (name for name in self.sizes if name == "hidden" or _OWN.fullmatch(name))
        alike = [name for name in lent if self.sizes[name] == size and name not in used]
        if alike:
            return alike[0]
        name = next(n for n in _fresh(size) if n not in self.sizes and n not in self.taken and n not in used)
        self.sizes[name] = size
        return name


def _roles(words: str, rank: int) -> tuple[str | None, ...]:
    for pattern, dims, names in _ROLES:
        if dims == rank and pattern.search(words):
            return names
    if rank == 2 and words.endswith("weight"):
        return ("hidden", None) if _OUT.search(words) else (None, "hidden")
    return ("hidden",) if rank == 1 and is_norm(words) else (None,) * rank


def _fresh(size: int) -> Iterable[str]:
    yield f"n{size}"
    for letter in "bcdefghijklmnop":
        yield f"n{size}{letter}"
