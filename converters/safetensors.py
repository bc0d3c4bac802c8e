"""Plain safetensors files, with any names and, on request, all optimizer states."""

from __future__ import annotations

from typing import Any

from ucp.catalog import Catalog
from ucp.errors import UsageError
from ucp.store import Store

from ._hf import plain
from ._hf.options import size_of
from ._hf.plain import FAMILY, read_catalog
from ._hf.plain_target import PlainFiles, make_target


class Safetensors:
    """The converter of family ``safetensors``."""

    family = FAMILY

    def detect(self, store: Store) -> bool:
        """Whether safetensors files lie directly in the folder."""
        return plain.detect(store)

    def read(self, store: Store, **options: Any) -> Catalog:
        """The catalog of all safetensors files of the folder, or of those that its index names.

        NotFoundError where names tell that files are missing; CorruptError for damage, for a tensor in two files, and
        for an index that contradicts its files.
        """
        _check_known(options, "none")
        return read_catalog(store)

    def target(
        self,
        catalog: Catalog,
        store: Store,
        *,
        shard_bytes: int | str = "5GB",
        states: str = "all",
        dtype: str | None = None,
        **options: Any,
    ) -> PlainFiles:
        """Lay `catalog` out as ``tensors.safetensors``, or several files of at most `shard_bytes`, and an index.

        A tensor is filed under its name, each other state as ``<state>/<name>``; `states` ``value`` leaves those out.
        `dtype` casts the values. FitError for names that would be mistaken for states.
        """
        del store
        _check_known(options, "dtype shard_bytes states")
        return make_target(catalog, shard_bytes=size_of(shard_bytes), states=states, dtype=dtype)


def _check_known(options: dict[str, Any], known: str) -> None:
    if options:
        raise UsageError(f"{FAMILY}: unknown option {next(iter(options))!r}", hint=f"known: {known}")


CONVERTER = Safetensors()

__all__ = ["CONVERTER", "Safetensors"]
