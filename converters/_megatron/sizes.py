"""Sizes for the shipped programs."""

from __future__ import annotations

from .arguments import Arguments


def sizes_of(args: Arguments, rows: int | None, *, vocab: int | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """The programs' sizes, and remarks about them; `rows` are those of the embedding, padding counted."""
    found, notes = args.vocab(rows, given=vocab)
    return {**args.sizes(), **({} if found is None else {"vocab": found})}, notes
