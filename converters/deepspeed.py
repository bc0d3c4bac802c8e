"""Reads DeepSpeed checkpoints: ZeRO 0 to 3, BF16_Optimizer, pipelines, tensor parallelism, a Trainer's folders too.

Only metadata is read, nothing is executed and DeepSpeed is not needed. What is in which file is told in the modules of
`ucp.converters._deepspeed`, each of which names the files of DeepSpeed that its facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Sharded, Target
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Store

from ._deepspeed.assemble import read_catalog, read_sharded
from ._deepspeed.files import detect


class DeepSpeed:
    """The converter of family ``deepspeed``."""

    family = "deepspeed"

    def detect(self, store: Store) -> bool:
        """Whether `store` is a tag folder, or a save root with a tag folder in it."""
        return detect(store)

    def read(
        self,
        store: Store,
        *,
        tag: str | None = None,
        frozen: Sequence[str] | str = (),
        strict: bool | str = True,
        **options: Any,
    ) -> Catalog:
        """The catalog of one checkpoint.

        `tag` chooses one of a save root; without it, the one ``latest`` names. `frozen` are patterns such as
        ``adapter.*`` of parameters that were not trained: ZeRO 0 does not save which these are. Where shapes and their
        order leave more than one possibility, the parameters concerned are `undecided` until told: their values are
        there, and the states that may be theirs are in ``state["optimizer"]["unnamed"]``.

        Tensor-parallel ranks are put together by a conversion program made of the checkpoint's
        ``universal_checkpoint_info``; with `strict` off (``no``), patterns in it that match no parameter are passed
        over, where DeepSpeed's own converter has ``--no_strict``. Without that metadata, a program must be given.

        NotFoundError for a missing tag or rank file, ConflictError for files of different saves, CorruptError for
        damage or sizes that contradict shapes, FitError for what cannot be read (tensor parallelism without metadata,
        experts spread over ranks, unknown optimizers), UnsafeError for a malicious file.
        """
        _check_known(options)
        with _with_hint():
            return read_catalog(store, tag=tag, frozen=_listed(frozen), strict=_is_on(strict))

    def sharded(
        self, store: Store, *, tag: str | None = None, frozen: Sequence[str] | str = (), **options: Any
    ) -> Sharded:
        """The catalog of each tensor-parallel rank, for a conversion program: pipeline stages and ZeRO are joined.

        Raises what `read` raises, but asks for no metadata.
        """
        _check_known(options)
        with _with_hint():
            return read_sharded(store, tag=tag, frozen=_listed(frozen))

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Target:
        """UsageError: DeepSpeed's own layout is read only."""
        raise UsageError("cannot write deepspeed checkpoints", hint="DeepSpeed resumes from family deepspeed-universal")


def _check_known(options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"deepspeed: unknown option {next(iter(options))!r}", hint="known: tag frozen strict")


def _listed(patterns: Sequence[str] | str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _is_on(value: bool | str) -> bool:
    """An option that is on or off; the command line gives text."""
    known = {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(value, str) and value.lower() not in known:
        raise UsageError(f"deepspeed: strict is yes or no, not {value!r}")
    return known[value.lower()] if isinstance(value, str) else bool(value)


@contextmanager
def _with_hint() -> Iterator[None]:
    """Say what to do about damaged and missing files, where nothing more exact is said."""
    try:
        yield
    except (CorruptError, NotFoundError) as error:
        error.hint = error.hint or "a file is damaged, missing or foreign: copy the whole tag folder again"
        raise


CONVERTER = DeepSpeed()
