"""Reads DeepSpeed checkpoints: ZeRO 0 to 3, BF16_Optimizer, pipelines, tensor parallelism, a Trainer's folders too.

Only metadata is read, nothing is executed and DeepSpeed is not needed. What is in which file is told in the modules of
`ucp.converters._deepspeed`, each of which names the files of DeepSpeed that its facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout, Sharded
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.layout import Mesh
from ucp.store import Store

from ._deepspeed.assemble import read_catalog, read_sharded
from ._deepspeed.files import detect
from ._deepspeed_native.target import NativeFolder, make_target


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
        damage or sizes that contradict shapes, FitError for what cannot be read (tensor parallelism without metadata or
        with experts, unknown optimizers), UnsafeError for a malicious file.
        """
        _check_known(options)
        with _with_hint():
            return read_catalog(store, tag=tag, frozen=_listed(frozen), strict=_is_on(strict))

    def sharded(
        self,
        store: Store,
        *,
        tag: str | None = None,
        frozen: Sequence[str] | str = (),
        joined: bool | str = False,
        strict: bool | str = True,
        **options: Any,
    ) -> Sharded:
        """The catalog of each tensor-parallel rank, for a conversion program: pipeline stages and ZeRO are joined.

        With `joined` tensor-parallel ranks are too, as the checkpoint's own metadata says: for a program that only
        renames or splits whole tensors, where how DeepSpeed's AutoTP cut them is nothing it knows. Raises what `read`
        raises, but asks for no metadata without `joined`.
        """
        _check_known(options)
        with _with_hint():
            parts = read_sharded(store, tag=tag, frozen=_listed(frozen))
            if not _is_on(joined, "joined"):
                return parts
            whole = read_catalog(store, tag=tag, frozen=_listed(frozen), strict=_is_on(strict))
            return replace(parts, parts=[({}, whole)], mesh=Mesh({}), cuts={}, placements={})

    def target(self, catalog: Catalog, store: Store, *, layout: Layout | None = None, **options: Any) -> NativeFolder:
        """Lay `catalog` out as a save root that a job of ZeRO 1, 2 or 3 over ``layout.mesh["dp"]`` ranks resumes from.

        Options, by default as the source was: `stage`, `dtype` (``fp32``, ``bf16`` or ``fp16``) of the module's
        parameters, `tag`, `sub_group_size` (ZeRO 3), `round_robin` for a job with ``round_robin_gradients``, and
        `bf16_optimizer` for one with fp32 gradients under stage 1 and bf16. FitError for what ZeRO's flat tensors have
        no place for, such as states of another shape than the parameter's.
        """
        return make_target(catalog, store, layout=layout, **options)


def _check_known(options: dict[str, Any]) -> None:
    if options:
        known = "known: tag frozen strict; with a program: joined"
        raise UsageError(f"deepspeed: unknown option {next(iter(options))!r}", hint=known)


def _listed(patterns: Sequence[str] | str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _is_on(value: bool | str, name: str = "strict") -> bool:
    """An option that is on or off; the command line gives text."""
    known = {"yes": True, "true": True, "no": False, "false": False}
    if isinstance(value, str) and value.lower() not in known:
        raise UsageError(f"deepspeed: {name} is yes or no, not {value!r}")
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
