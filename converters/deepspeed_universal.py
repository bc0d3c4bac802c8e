"""DeepSpeed universal folders, from which stock DeepSpeed resumes under ZeRO-1, 2, 3 and BF16_Optimizer.

One folder serves every stage; one that DeepSpeed's own ``ds_to_universal.py`` made of a ZeRO-3 checkpoint loads under
ZeRO-3 alone, and one made of ZeRO-1 or 2 not under ZeRO-3. After ``engine.load_checkpoint(url)`` a job should call
`finish_load`, which restores what DeepSpeed's universal loader leaves undone.
"""

from __future__ import annotations

from typing import Any

from ucp.catalog import Catalog
from ucp.errors import UsageError
from ucp.store import Store

from ._deepspeed_universal.finish import finish_load
from ._deepspeed_universal.read import detect, read
from ._deepspeed_universal.target import FAMILY, UniversalFolder, make_target


class DeepSpeedUniversal:
    """The converter of family ``deepspeed-universal``."""

    family = FAMILY

    def detect(self, store: Store) -> bool:
        """Whether `store` is a universal folder, or a save root with universal folders and nothing else."""
        return detect(store)

    def read(self, store: Store, *, tag: str | None = None, **options: Any) -> Catalog:
        """The catalog of one universal folder, ours or DeepSpeed's; `tag` names it in a save root.

        NotFoundError for an incomplete folder; CorruptError, UnsafeError as its files are.
        """
        _only_tag(options)
        return read(store, tag=tag)

    def target(
        self,
        catalog: Catalog,
        store: Store,
        *,
        tag: str | None = None,
        mp: int | str = 1,
        ep: int | str | None = None,
        **options: Any,
    ) -> UniversalFolder:
        """Lay `catalog` out as a save root with one universal folder, ``<tag>_universal``.

        `tag` is ``global_step<N>`` where it is not given. `mp` is the number of model-parallel ranks (pipeline stages
        times tensor-parallel ranks) of the job that resumes: DeepSpeed before September 2026 looks for as many model
        files, later versions are content with one whatever the job. `ep` is the expert-parallel degree of the job,
        for native mixtures of experts; a job of another one fails on loading. FitError for what such a folder cannot
        hold: states of another shape than the parameter's, several steps in one optimizer group, names that are no
        path, experts whose number `ep` does not divide.
        """
        if options:
            raise UsageError(f"{FAMILY}: unknown option {next(iter(options))!r}", hint="known: tag mp ep")
        degree = None if ep is None else _ranks("ep", ep)
        return make_target(catalog, store, tag=tag, mp=_ranks("mp", mp), ep=degree)


def _only_tag(options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"{FAMILY}: unknown option {next(iter(options))!r}", hint="known: tag")


def _ranks(option: str, value: int | str) -> int:
    """A number of ranks; the command line gives text."""
    if not str(value).isdecimal() or not 1 <= int(value) <= _MOST_RANKS:
        raise UsageError(f"{FAMILY}: {option} is a number of ranks, not {value!r}")
    return int(value)


_MOST_RANKS = 4096

CONVERTER = DeepSpeedUniversal()

__all__ = ["CONVERTER", "DeepSpeedUniversal", "finish_load"]
