"""Reads Megatron-Core's ``torch_dist`` checkpoints and the ``mp_rank_*`` folders of Megatron-LM.

Only metadata is read, nothing is executed and Megatron is not needed. What is in which file is told in the modules of
`ucp.converters._megatron`, each of which names the files of Megatron that its facts come from.
"""

from __future__ import annotations

from typing import Any, cast

from ucp.catalog import Catalog
from ucp.converter import Layout, Sharded, Target
from ucp.errors import UsageError
from ucp.store import Store

from ._megatron.folder import detect
from ._megatron.read import read_catalog, read_sharded


class Megatron:
    """The converter of family ``megatron``."""

    family = "megatron"
    logical = True
    """What it writes is made of logical tensors."""

    def detect(self, store: Store) -> bool:
        """Whether `store` is the folder of an iteration, or a root whose tracker file names one."""
        return detect(store)

    def read(
        self,
        store: Store,
        *,
        names: str = "logical",
        iteration: str | int | None = None,
        vocab: str | int | None = None,
        **options: Any,
    ) -> Catalog:
        """The catalog of one checkpoint, its tensors under logical names.

        `names` may be ``stored``: then tensors have the keys of a ``torch_dist`` checkpoint, stacked as they are.
        `iteration` (a number or ``release``) chooses one of a root; without it, the latest. `vocab` is the tokenizer's
        vocabulary, where the arguments do not tell it.

        Sizes and flags come from the arguments that the job saved. NotFoundError for missing files, ConflictError for
        files of different saves, CorruptError for damage or arguments that contradict tensors, FitError for what cannot
        be read, UnsafeError for a malicious file.
        """
        _check_known(options)
        return read_catalog(store, names=names, iteration=iteration, vocab=vocab)

    def sharded(
        self,
        store: Store,
        *,
        names: str = "logical",
        iteration: str | int | None = None,
        vocab: str | int | None = None,
        **options: Any,
    ) -> Sharded:
        """What a conversion program puts together: the keys of ``torch_dist`` as they are, or what each rank saved.

        Raises what `read` raises. `names` is of no matter here.
        """
        _check_known(options)
        del names
        return read_sharded(store, iteration=iteration, vocab=vocab)

    def target(self, catalog: Catalog, store: Store, *, layout: Layout | None = None, **options: Any) -> Target:
        """Lay `catalog` out as a Megatron checkpoint; see `ucp.converters._megatron.target`."""
        from ._megatron.target import make_target

        return cast("Target", make_target(catalog, store, layout=layout, **options))


def _check_known(options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"megatron: unknown option {next(iter(options))!r}", hint="known: names iteration vocab")


CONVERTER = Megatron()
