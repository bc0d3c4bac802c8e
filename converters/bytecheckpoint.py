"""Reads checkpoints of ByteCheckpoint (bytecheckpoint 0.0.x: FSDP, FSDP2 and DDP).

Only metadata is read, nothing is executed, and neither ByteCheckpoint nor torch is needed. What is in which file is
told in the modules of `ucp.converters._bytecheckpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Target
from ucp.errors import UsageError
from ucp.store import Store

from ._bytecheckpoint.folders import is_bytecheckpoint
from ._bytecheckpoint.read import read_catalog
from .dcp import choices


class ByteCheckpoint:
    """The converter of family ``bytecheckpoint``."""

    family = "bytecheckpoint"

    def detect(self, store: Store) -> bool:
        """Whether `store` is a step folder that ByteCheckpoint wrote, or a root with such folders."""
        return is_bytecheckpoint(store)

    def read(
        self,
        store: Store,
        *,
        step: int | str | None = None,
        frozen: Sequence[str] | str = (),
        strict: bool | str = True,
        **options: Any,
    ) -> Catalog:
        """The catalog of one step: `step`, else the one that ``latest_checkpointed_iteration.txt`` names.

        `frozen` and `strict` are those of family ``dcp``, and so are the errors; FSDP1 that was saved as flat
        parameters is a FitError.
        """
        if options:
            raise UsageError(
                f"bytecheckpoint: unknown option {next(iter(options))!r}", hint="known: step frozen strict"
            )
        chosen = choices(model=None, frozen=frozen, strict=strict, family=self.family)
        return read_catalog(store, step=step, choices=chosen)

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Target:
        """UsageError: ByteCheckpoint is read only."""
        raise UsageError("cannot write bytecheckpoint checkpoints", hint="family dcp is the one most like it")


CONVERTER = ByteCheckpoint()
