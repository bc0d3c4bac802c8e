"""What the ranks of a job ask of a checkpoint between them: it is strict with the job, not with each rank.

The stages of a pipeline and the experts of a rank are a part of the names each; what one rank has no use for may be
another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from crc32c import crc32c

from ucp.catalog import Tensor
from ucp.train.named import sources_of
from ucp.train.names import selected, stripped
from ucp.train.report import ProblemKind
from ucp.train.scheduler import STATE

if TYPE_CHECKING:
    from ucp.train.job import Job


class Asked(NamedTuple):
    """What one rank asks for, small enough to tell all others: bits, in the order of the source's names.

    `source` tells the source's names from others; `used` and `optimized` mark the tensors that fill something and
    those whose states an optimizer takes, if the rank has one (`trains`); `known` marks the keys of the rename mapping
    and the patterns of `new`, `resize` and `only` that are names of its target.
    """

    source: int
    used: int
    optimized: int
    trains: bool
    known: int


def asked_by(job: Job) -> Asked:
    """What this rank asks for, once its load is planned."""
    names = list(job.catalog.tensors)
    held = [*job.targets.names(), *job.targets.items, *([STATE] if job.targets.schedulers else [])]
    spelled = {spelling for name in held for spelling in (name, stripped(name))}
    return Asked(
        source=crc32c("\n".join(names).encode()),
        used=_bits(name in job.used for name in names),
        optimized=_bits(map(set(_optimized(job)).__contains__, names)),
        trains=bool(job.targets.optimizers or job.targets.named_groups),
        known=_bits(
            key in spelled if kind == "map" else any(selected(name, [key]) for name in spelled)
            for kind, key in _keys(job)
        ),
    )


def find_gaps(job: Job, everybody: Sequence[Asked]) -> None:
    """Note what no rank asks for, and what asks for nothing; `everybody` is what all ranks ask for, this one too."""
    mine = asked_by(job)
    ranks = [one for one in everybody if one.source == mine.source]
    used, optimized, known = (reduce(int.__or__, (one[field] for one in ranks)) for field in (1, 2, 4))
    _find_unexpected(job, used, optimized, trains=any(one.trains for one in ranks))
    for number, (kind, key) in enumerate(_keys(job)):
        if not known >> number & 1:
            _find_unknown(job, kind, key)
    for glob in job.findings.allowed.ignore:
        if not any(selected(name, [glob]) for name in (*job.catalog.tensors, *job.catalog.ties)):
            job.findings.add("ignore", glob, "no such name in the source")
    if not used and (names := job.targets.names()):
        job.findings.add("names", "all", f"the source has none of the target's, such as {names[0]}")


def _find_unknown(job: Job, kind: ProblemKind, key: str) -> None:
    """Note a name, or a pattern, that means nothing in the whole job."""
    if kind != "only":
        job.findings.add(kind, key, "no such name in the target")
    elif not any(selected(name, [key]) for name in (*job.catalog.tensors, *job.catalog.ties)):
        job.findings.add("only", key, "selects nothing")


def has_state(tensor: Tensor) -> bool:
    """Whether an optimizer kept something for it."""
    return bool(tensor.scalars) or any(state != "value" for state in tensor.states)


def _find_unexpected(job: Job, used: int, optimized: int, *, trains: bool) -> None:
    """Tensors of the source that the job does not hold, and optimizer states that its optimizers do not."""
    aliases: dict[str, list[str]] = {}
    for alias, holder in job.catalog.ties.items():
        aliases.setdefault(holder, []).append(alias)
    for number, (name, tensor) in enumerate(job.catalog.tensors.items()):
        if not any(selected(spelling, job.only) for spelling in (name, *aliases.get(name, ()))):
            continue
        if not used >> number & 1:
            job.findings.add("unexpected", name)
        elif trains and not optimized >> number & 1 and has_state(tensor):
            job.findings.add("unexpected", f"{name}[optimizer state]", "in no group of the target's optimizer")


def _optimized(job: Job) -> Iterator[str]:
    for named in job.targets.named_groups:
        yield from sources_of(job, named)
    for optimizer in job.targets.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for member in job.members_of(parameter):
                    yield from (member.source, *member.twins)


def _keys(job: Job) -> list[tuple[ProblemKind, str]]:
    """What the caller says of names of the target, and of which option it is a key or a pattern."""
    allowed, found = job.findings.allowed, list[tuple[ProblemKind, str]]()
    found += [("map", key) for key in (job.rename if isinstance(job.rename, Mapping) else ())]
    found += [("new", glob) for glob in allowed.new]
    found += [("resize", glob) for glob in allowed.resize]
    found += [("only", glob) for glob in job.only or ()]
    return found


def _bits(marks: Iterable[bool]) -> int:
    return int("".join("1" if mark else "0" for mark in marks)[::-1] or "0", 2)
