"""Folders of Hugging Face weights: what ``save_pretrained`` writes, PEFT adapters, and what torch writes in their form.

Read: ``model.safetensors``, ``pytorch_model.bin``, several of either with their index, ``adapter_model.*`` of PEFT, and
what ``torch.distributed.checkpoint.HuggingFaceStorageWriter`` writes, sharded by rank or consolidated. Written: what
``from_pretrained`` takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout, Sharded
from ucp.errors import UsageError
from ucp.store import Store

from ._hf import places
from ._hf.options import size_of
from ._hf.ranks import ranks_of
from ._hf.read import FAMILY, Options, read_catalog, read_sharded
from ._hf.target import HfFolder, make_target
from ._torch.options import Options as TorchOptions


class HuggingFace:
    """The converter of family ``hf``."""

    family = FAMILY

    def files(self, store: Store) -> Iterable[str]:
        """The names that Hugging Face libraries give to weights and what lies beside them, and those in an index."""
        return places.usual(store)

    def detect(self, store: Store) -> bool:
        """Whether the folder holds weights under the names that Hugging Face libraries give them."""
        return places.detect(store)

    def read(
        self,
        store: Store,
        *,
        variant: str | None = None,
        ranks: int | str | None = None,
        frozen: Sequence[str] | str = (),
        order: Sequence[str] | str = (),
        **options: Any,
    ) -> Catalog:
        """The catalog of the weights, under the names of the files.

        `variant` chooses ``model.<variant>.safetensors``. `ranks` is the number of ranks that saved, where each left
        files of its own and no configuration tells how large the tensors are. Configuration, tokenizer and other small
        files are carried in ``state``. Where torch left the shards beside the files it made of them, the two are
        compared. The training state of Trainer or Accelerate beside the weights is read as family ``torch`` does, which
        has `frozen` and `order` for optimizers that leave open which of their states are whose.

        NotFoundError for a missing index or file; CorruptError for damage and for an index that contradicts its files,
        a tensor in two files among it; ConflictError and FitError for shards that do not fit each other.
        """
        _check_known(options)
        return read_catalog(store, _options(variant, ranks, frozen, order))

    def sharded(
        self,
        store: Store,
        *,
        variant: str | None = None,
        ranks: int | str | None = None,
        frozen: Sequence[str] | str = (),
        order: Sequence[str] | str = (),
        **options: Any,
    ) -> Sharded:
        """The same with the conversion program for ``config.json``'s model type, its sizes and flags."""
        _check_known(options)
        return read_sharded(store, _options(variant, ranks, frozen, order))

    def target(
        self,
        catalog: Catalog,
        store: Store,
        *,
        layout: Layout | None = None,
        shard_bytes: int | str = "5GB",
        dtype: str | None = None,
        config: str | None = None,
        **options: Any,
    ) -> HfFolder:
        """Lay `catalog` out as ``from_pretrained`` takes it, in safetensors files of at most `shard_bytes`.

        A tensor that is larger has a file of its own. `dtype` (``float32``, ``bfloat16``, ``float16``) rounds or widens
        the values. `config` is the path of a ``config.json``, or of a folder with it and a tokenizer, for a source that
        carries none. Logical names become those of the model that the configuration describes. A PEFT adapter becomes a
        PEFT adapter.

        UsageError where there is no configuration; FitError for tensors that do not fit it.
        """
        _check_known(options, "config dtype shard_bytes")
        return make_target(
            catalog, store, layout=layout or Layout(), shard_bytes=size_of(shard_bytes), dtype=dtype, config=config
        )


def _options(
    variant: str | None, ranks: int | str | None, frozen: Sequence[str] | str, order: Sequence[str] | str
) -> Options:
    told = TorchOptions.of(file=None, model=(), optimizer=(), frozen=frozen, order=order)
    return Options(variant, ranks_of(ranks), told.frozen, told.order)


def _check_known(options: dict[str, Any], known: str = "frozen order ranks variant") -> None:
    if options:
        raise UsageError(f"{FAMILY}: unknown option {next(iter(options))!r}", hint=f"known: {known}")


CONVERTER = HuggingFace()

__all__ = ["CONVERTER", "HuggingFace"]
