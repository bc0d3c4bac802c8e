"""`ucp.load`: fill live modules, optimizers and sharded tensors from any readable checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import UsageError
from ucp.lang.bind import Placements
from ucp.lang.solve import Cuts
from ucp.layout import Mesh
from ucp.mapping import ProgramLike
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.run.unchanged import check_unchanged
from ucp.store import Store
from ucp.train.crew import Crew
from ucp.train.groups import install_options
from ucp.train.job import Job, plan
from ucp.train.names import Rename
from ucp.train.optimizer import allocate
from ucp.train.report import LoadReport
from ucp.train.scheduler import STATE
from ucp.train.shards import local_tensor
from ucp.train.shares import Whole, share_out
from ucp.train.targets import take_apart
from ucp.train.transfer import Fill, transfer
from ucp.train.wish import Coordinates, Wish

_GAP = 64 << 10
"""Bytes that may be read beyond what was asked for, per checksum, to make it tell."""

_MOST_PIECES = 1024
"""Parts of one checksum's bytes, not next to each other, that a rank tells the others of."""


def load(
    target: Any,
    source: str | os.PathLike[str] | Checkpoint,
    *,
    strict: bool = True,
    map: Rename | None = None,  # noqa: A002
    only: str | Iterable[str] | None = None,
    hyper_parameters: bool = True,
    verify: bool = True,
    workers: int | None = None,
    family: str | None = None,
    program: ProgramLike | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    coordinate: Coordinates | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    **options: Any,
) -> LoadReport:
    """Fill `target` in place from the checkpoint `source`, a URL or an open `Checkpoint`, whatever layout wrote it.

    `target` is a module, ``(module, optimizer)``, a dict ``name: tensor`` or ``name: {state: tensor}``, or a dict of
    these under ``model``, ``optimizer`` and ``lr_scheduler``. Tensors may be DTensors with any placements but partial
    ones; every rank reads just the bytes of its own shards. Values are cast to the target's dtype, rounded to nearest
    even; the report lists casts.

    Optimizer states are made where the optimizer has none yet, laid out as their parameters. Hyper-parameters go to
    the groups that hold the same parameters by name; ``hyper_parameters=False`` keeps the target's own.

    `strict` asks that source and target hold the same names, states and shapes. `map` renames (target name -> source
    name), `only` selects names by globs. `verify` checks what was read against the checksums that the source keeps;
    the ranks of a target's mesh do so together, so all of them must call, and what one raises they all raise. It also
    compares replicas, such as what all tensor-parallel ranks hold. Low-precision copies are not read: converting
    compares them, and so does ``ucp verify --deep``.
    `workers` threads read (default: up to 4), each with a bounded buffer. `options` go to the family's reader.

    A conversion `program` describes the target's tensors where they are not the checkpoint's: each of them is made of
    parts of logical tensors, as at `coordinate` of `mesh` (axis names to numbers of ranks, outermost first), and what
    no part fills is padding and becomes zero, in values and states. ``"source"`` is the program that the checkpoint
    keeps. Without a coordinate it is that of the process group's rank, counted row-major; all ranks then
    call and check together, as those of a target's mesh do. A rank that holds several
    virtual stages puts them in one module (`nn.ModuleList`) and says where each is by the start of its names:
    ``coordinate={"0": {"pp": 1, "vpp": 0}, "1": {"pp": 1, "vpp": 1}}``. `sizes` and `flags` are the program's where
    shapes and names do not tell. `cuts` and `placements` say what is not even, as in `ucp.layout.setting.Setting`:
    stages of different depths, experts anywhere. The program must fit all tensors of the checkpoint, also without
    `strict`.

    Nothing is changed unless everything fits. Raises FitError that lists all problems, NotFoundError, UsageError for a
    target of an unknown kind, and CorruptError, ConflictError or StorageError while reading, after which the target is
    partly filled.
    """
    start = time.perf_counter()
    job_is: dict[str, Any] = {
        "mesh": mesh,
        "coordinate": coordinate,
        "sizes": sizes,
        "flags": flags,
        "cuts": cuts,
        "placements": placements,
    }
    if program is None and any(given is not None for given in job_is.values()):
        raise UsageError(f"{', '.join(job_is)} are a program's, and there is none", hint="give program=...")
    wish = None if program is None else Wish.of(program, **job_is)
    globs = (only,) if isinstance(only, str) else only
    # Tensors made inside a user's inference mode could never be trained.
    with torch.inference_mode(False):
        targets = take_apart(target)
        crew = Crew.of(slot.tensor for slot in targets.slots) if verify else Crew()
        if verify and crew.size == 1 and wish is not None and wish.together:
            crew = Crew.everybody()

        def read() -> tuple[tuple[Job, Ledger], list[Piece]]:
            ckpt = _opened(source, family, options)
            supply = Whole(ckpt.catalog) if wish is None else share_out(ckpt.catalog, targets, wish)
            job = Job(supply.catalog, supply, ckpt.store, targets, map, None if globs is None else tuple(globs))
            plan(job, hyper_parameters=hyper_parameters)
            job.findings.check(ckpt.url, strict=strict)
            ledger = Ledger(Spans(ckpt.catalog.checksums if verify else ()))
            _fill(job, ledger, workers or min(4, os.cpu_count() or 1), replicas=verify)
            return (job, ledger), _telling(ledger)

        (job, ledger), pieces = crew.share(read)
        extra, checked = crew.share(lambda: _verify(ledger, pieces, crew, job.store))
        _install(job)
    moved = _Bytes(ledger.bytes_read + extra, sum(checked))
    return _report(job, moved, time.perf_counter() - start)


class _Bytes(NamedTuple):
    read: int
    checked: int


def _opened(source: str | os.PathLike[str] | Checkpoint, family: str | None, options: Mapping[str, Any]) -> Checkpoint:
    if not isinstance(source, Checkpoint):
        return open_checkpoint(source, family=family, **options)
    if family is not None or options:
        raise UsageError(f"family and options are for opening, and {source.url} is open", hint="give them to ucp.open")
    return source


def _fill(job: Job, ledger: Ledger, workers: int, *, replicas: bool) -> None:
    """Read everything into its place."""
    for _, made in job.states:
        job.fills += allocate(made, job.catalog, job.supply)
    _clear_padding(job.fills)
    touched: set[str] = set()

    def record(object: str, offset: int, data: memoryview) -> None:
        touched.add(object)
        ledger.record(object, offset, data)

    transfer(job.store, job.fills, workers=workers, record=record, replicas=replicas)
    check_unchanged(job.store, job.catalog, touched)


def _clear_padding(fills: Sequence[Fill]) -> None:
    """Zeros in tensors that the source does not fill wholly."""
    filled: dict[int, int] = {}
    for fill in fills:
        if fill.share is not None:
            filled[id(fill.tensor)] = filled.get(id(fill.tensor), 0) + fill.share.block.size
    for fill in fills:
        if filled.pop(id(fill.tensor), math.inf) < fill.tensor.numel():
            local_tensor(fill.tensor, str(fill.cover.key)).zero_()


def _telling(ledger: Ledger) -> list[Piece]:
    """What this rank read, but for checksums of which it read very many small parts: too much to tell others."""
    counts = Counter(piece.span for piece in ledger.pieces())
    return [piece for piece in ledger.pieces() if counts[piece.span] <= _MOST_PIECES]


def _verify(ledger: Ledger, pieces: Sequence[Sequence[Piece]], crew: Crew, store: Store) -> tuple[int, int]:
    """Check this rank's share of the spans of which the crew read nearly all, and read their rest (padding, mostly).

    Returns the bytes read for that, and the bytes checked.
    """
    known = Ledger(ledger.spans)
    known.add(piece for rank in pieces for piece in rank if piece.span % crew.size == crew.rank)
    sizes = {piece.span: ledger.spans.checksums[piece.span].length for piece in known.pieces()}
    missing = dict(sizes)
    for piece in known.pieces():
        missing[piece.span] -= piece.length
    nearly = {span for span, n in missing.items() if n <= max(_GAP, sizes[span] // 64)}
    checked = Ledger(ledger.spans)
    checked.add(piece for piece in known.pieces() if piece.span in nearly)
    return checked.verify(store), sum(sizes[span] for span in nearly)


def _install(job: Job) -> None:
    """Set what optimizers, groups and schedulers hold, and numbers in tensors."""
    with torch.no_grad():
        for tensor, value in job.numbers:
            tensor.fill_(value)
    for optimizer, parameter in job.stateless:
        optimizer.state.pop(parameter, None)
    for optimizer, made in job.states:
        optimizer.state[made.parameter] = made.result
    for group, options in job.groups:
        install_options(group, options)
    for scheduler, state in job.schedules:
        if state:
            scheduler.load_state_dict(state)


def _report(job: Job, moved: _Bytes, seconds: float) -> LoadReport:
    findings, catalog = job.findings, job.catalog
    loaded = {STATE} if job.schedules else set()
    return LoadReport(
        url=catalog.url,
        family=catalog.source.family,
        step=catalog.step,
        tensors=len(job.used),
        bytes_read=moved.read,
        bytes_checked=moved.checked,
        seconds=seconds,
        renamed=findings.renamed,
        casts=tuple(findings.casts),
        without_state=tuple(findings.without_state),
        missing=findings.subjects("missing"),
        unexpected=findings.subjects("unexpected"),
        not_loaded=tuple(name for name in catalog.state if name not in loaded),
        notes=(*catalog.notes, *findings.notes),
    )
