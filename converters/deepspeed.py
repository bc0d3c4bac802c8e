"""Reads DeepSpeed checkpoints: ZeRO 0 to 3, BF16_Optimizer, pipelines, in their own folders or inside a Trainer's.

Only metadata is read, nothing is executed and DeepSpeed is not needed. What is in which file is told in the modules of
`ucp.converters._deepspeed`, each of which names the files of DeepSpeed that its facts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Target
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Store

from ._deepspeed.assemble import read_catalog
from ._deepspeed.files import detect


class DeepSpeed:
    """The converter of family ``deepspeed``."""

    family = "deepspeed"

    def detect(self, store: Store) -> bool:
        """Whether `store` is a tag folder, or a save root with a tag folder in it."""
        return detect(store)

    def read(
        self, store: Store, *, tag: str | None = None, frozen: Sequence[str] | str = (), **options: Any
    ) -> Catalog:
        """The catalog of one checkpoint.

        `tag` chooses one of a save root; without it, the one ``latest`` names. `frozen` are patterns such as
        ``adapter.*`` of parameters that were not trained: ZeRO 0 does not save which these are. Where shapes and their
        order leave more than one possibility, the parameters concerned are `undecided` until told: their values are
        there, and the states that may be theirs are in ``state["optimizer"]["unnamed"]``.

        NotFoundError for a missing tag or rank file, ConflictError for files of different saves, CorruptError for
        damage or sizes that contradict shapes, FitError for what cannot be read (tensor parallelism, experts spread
        over ranks, unknown optimizers), UnsafeError for a malicious file.
        """
        if options:
            raise UsageError(f"deepspeed: unknown option {next(iter(options))!r}", hint="known: tag frozen")
        patterns = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        try:
            return read_catalog(store, tag=tag, frozen=patterns)
        except (CorruptError, NotFoundError) as error:
            error.hint = error.hint or "a file is damaged, missing or foreign: copy the whole tag folder again"
            raise

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Target:
        """UsageError: DeepSpeed's own layout is read only."""
        raise UsageError("cannot write deepspeed checkpoints", hint="DeepSpeed resumes from family deepspeed-universal")


CONVERTER = DeepSpeed()
