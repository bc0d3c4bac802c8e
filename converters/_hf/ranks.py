"""Whether all ranks' files are there, which the files of torch's writer do not tell.

Each says where its regions begin, and none how large the tensors are: without the last rank's files, tensors merely
look smaller. So somebody has to say: the user, the model's configuration, or a tensor whose rows do not come out even.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ucp.catalog import Catalog
from ucp.errors import FitError, NotFoundError, ProgramError, UsageError
from ucp.layout import Box, Mesh

from .._programs import Known

_RANK = re.compile(r"shard-(\d+)-model-(\d+)-of-")
_COPY = "files of a rank are missing, or the configuration is of another model: copy the folder again"


def ranks_of(ranks: int | str | None) -> int | None:
    """A number of ranks as the command line or Python gives it."""
    if ranks is None:
        return None
    if not str(ranks).isdecimal() or int(ranks) < 1:
        raise UsageError(f"hf: ranks is how many ranks saved, not {ranks!r}")
    return int(ranks)


def check_ranks(catalog: Catalog, paths: Sequence[str], ranks: int | None, known: Known | None) -> None:
    """That `paths` are the files of as many ranks as `ranks` says, or else of all that the model's sizes need.

    Without either, uneven shards may tell. NotFoundError and FitError where files are missing; UsageError where nothing
    says.
    """
    found = {(int(match[1]), int(match[2])) for path in paths if (match := _RANK.match(path))}
    if ranks is not None:
        _check_files(catalog.url, found, ranks)
    elif known is not None:
        _check_sizes(catalog, known)
    else:
        held = len({rank for rank, _ in found})
        least, most = told_by_rows(catalog)
        if least > held:
            raise NotFoundError(
                f"{catalog.url}: files of {held} ranks, but rows are cut as {least} or more ranks cut them", hint=_COPY
            )
        if (least, most) == (held, held):
            _check_files(catalog.url, found, held)
            return
        raise UsageError(
            f"{catalog.url}: files of {held} ranks, which do not tell whether these are all",
            hint=f"say how many ranks saved, -o ranks={held}, or put the model's config.json beside them",
        )


def told_by_rows(catalog: Catalog) -> tuple[int, float]:
    """The fewest and the most ranks that cut rows as they are cut here.

    Each of n ranks has ceil(rows / n) of them, the last that has any what is left (torch/distributed/tensor,
    ``Shard._split_tensor``, as ``torch.chunk``). A last part that is smaller shows that nothing comes after it.
    """
    least, most = 1, math.inf
    for (name, state), fragments in catalog.fragments.items():
        rows = catalog.tensors[name].states[state].shape[:1]
        boxes = [fragment.region for fragment in fragments if isinstance(fragment.region, Box)]
        counts = [box.shape[0] for box in sorted(boxes, key=lambda box: box.start) if box.size] if rows else []
        each = counts[0] if counts else 0
        if len(boxes) == len(fragments) and each > 1 and sum(counts) == rows[0] and counts[-1] < each == max(counts):
            least, most = max(least, -(-rows[0] // each)), min(most, -(-rows[0] // (each - 1)) - 1)
    return least, most


def _check_files(url: str, found: set[tuple[int, int]], ranks: int) -> None:
    """That each of `ranks` ranks has a part in each of the files that there are to be in the end."""
    files = max((file for _, file in found), default=1)
    wanted = {(rank, file) for rank in range(1, ranks + 1) for file in range(1, files + 1)}
    wrong = sorted(wanted ^ found)
    if wrong:
        rank, file = wrong[0]
        raise NotFoundError(
            f"{url}: {len(found)} files, and {ranks} ranks leave {len(wanted)}: see rank {rank}, file {file}",
            hint="copy the others as well; where ranks had nothing to save, put a config.json beside the files",
        )


def _check_sizes(catalog: Catalog, known: Known) -> None:
    from ucp.lang import load_program
    from ucp.mapping import consolidate

    program = load_program(known.program)
    try:
        whole = consolidate([({}, catalog)], program, mesh=Mesh({}), config=known.sizes, flags=known.flags)
    except (FitError, ProgramError) as error:
        raise FitError(
            f"{catalog.url}: these are not all tensors of the model that config.json describes: {error.message}",
            hint="copy the folder again; if nothing is missing, say how many ranks saved: -o ranks=N",
        ) from error
    sizes = whole.program.sizes if whole.program is not None else {}
    for name, size in sizes.items():
        if name in known.sizes and known.sizes[name] != size:
            raise FitError(
                f"{catalog.url}: the tensors have {name} {size}, and config.json says {known.sizes[name]}", hint=_COPY
            )
