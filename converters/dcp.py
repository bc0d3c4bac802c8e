"""Reads and writes checkpoints of torch.distributed.checkpoint (DCP): FSDP1, FSDP2, HSDP, TP, EP, DDP, torchtitan.

Only metadata is read, nothing is executed and torch is not needed. What is where is told in the modules of
`ucp.converters._dcp`, each of which names the files of torch that its facts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ucp.catalog import Catalog
from ucp.converter import Layout, Sharded, Target
from ucp.errors import UsageError
from ucp.store import Store

from ._dcp.assemble import Choices
from ._dcp.folder_kind import is_dcp
from ._dcp.folders import is_accelerate
from ._dcp.read import read_catalog, read_sharded


class Dcp:
    """The converter of family ``dcp``."""

    family = "dcp"

    def detect(self, store: Store) -> bool:
        """Whether `store` is a folder that ``torch.distributed.checkpoint.save`` wrote, or began to write."""
        return is_dcp(store) or is_accelerate(store)

    def read(
        self,
        store: Store,
        *,
        model: str | None = None,
        frozen: Sequence[str] | str = (),
        strict: bool | str = True,
        **options: Any,
    ) -> Catalog:
        """The catalog of a checkpoint.

        The model is found by the names that the optimizer has; `model` is its prefix (``app.model.``) where that does
        not do. `frozen` are patterns such as ``adapter.*`` of parameters that were not trained, which helps where the
        optimizer numbers its parameters. With `strict` off (``no``), optimizer states of parameters that the model does
        not have are carried along.

        NotFoundError for a save that was cut short and for missing files, CorruptError for damage and for metadata that
        does not match the files, ConflictError for tensors of different shapes under one name, FitError for what cannot
        be read (compressed items, unknown dtypes, no model), UnsafeError for a malicious file.
        """
        _check_known(options)
        return read_catalog(store, choices(model=model, frozen=frozen, strict=strict, family=self.family))

    def sharded(
        self,
        store: Store,
        *,
        model: str | None = None,
        frozen: Sequence[str] | str = (),
        strict: bool | str = True,
        **options: Any,
    ) -> Sharded:
        """The same, with the conversion program for the model type of a ``config.json`` in the folder."""
        _check_known(options)
        return read_sharded(store, choices(model=model, frozen=frozen, strict=strict, family=self.family))

    def target(self, catalog: Catalog, store: Store, *, layout: Layout | None = None, **options: Any) -> Target:
        """A checkpoint that ``torch.distributed.checkpoint.load`` takes; `options` are those of the writer.

        `layout` says with its mesh how many files there are, and with its program which names tensors have.
        """
        from ._dcp.target import make_target

        return cast("Target", make_target(catalog, store, layout=layout, **options))


def _check_known(options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"dcp: unknown option {next(iter(options))!r}", hint="known: model frozen strict")


def choices(*, model: str | None, frozen: Sequence[str] | str, strict: bool | str, family: str) -> Choices:
    """The options of a reader, as the command line or Python gives them; UsageError for what they cannot be."""
    known = {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(strict, str) and strict.lower() not in known:
        raise UsageError(f"{family}: strict is yes or no, not {strict!r}")
    chosen = known[strict.lower()] if isinstance(strict, str) else bool(strict)
    patterns = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    prefix = f"{model.removesuffix('.')}." if model else model
    return Choices(model=prefix, frozen=patterns, strict=chosen)


CONVERTER = Dcp()
