"""`ucp.load`: fill live modules, optimizers and sharded tensors from any readable checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import UsageError
from ucp.lang.bind import Placements
from ucp.lang.solve import Cuts
from ucp.layout import Mesh
from ucp.layout.region import numel
from ucp.mapping import ProgramLike
from ucp.metrics import TIMINGS
from ucp.run.integrity import Ledger, Piece
from ucp.run.unchanged import check_unchanged
from ucp.train.asked import Asked, asked_by, find_gaps
from ucp.train.checking import check_alone, check_together, ledger_of, telling
from ucp.train.crew import Crew
from ucp.train.declared import DeclaredLayout
from ucp.train.exchange import MEMORY, Meeting, fill_together, meet
from ucp.train.groups import install_options
from ucp.train.job import Job, plan
from ucp.train.names import Rename
from ucp.train.optimizer import allocate
from ucp.train.options import Allowed, Globs
from ucp.train.report import LoadReport
from ucp.train.resize import Kept
from ucp.train.scheduler import STATE
from ucp.train.shares import Whole, share_out
from ucp.train.targets import take_apart
from ucp.train.transfer import Fill
from ucp.train.wish import Coordinates, Wish


@TIMINGS.measured("load")
def load(
    target: Any,
    source: str | os.PathLike[str] | Checkpoint,
    *,
    strict: bool = True,
    map: Rename | None = None,  # noqa: A002
    only: str | Iterable[str] | None = None,
    new: Globs | None = None,
    ignore: Globs | None = None,
    resize: Mapping[str, int] | None = None,
    hyper_parameters: bool = True,
    verify: bool = True,
    workers: int | None = None,
    together: bool | ProcessGroup | None = None,
    exchange: bool = True,
    memory: int = MEMORY,
    family: str | None = None,
    program: ProgramLike | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    coordinate: Coordinates | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    layout: DeclaredLayout | None = None,
    **options: Any,
) -> LoadReport:
    """Fill `target` in place from the checkpoint `source`, a URL or an open `Checkpoint`, whatever layout wrote it.

    `target` is a module, ``(module, optimizer)``, a dict ``name: tensor`` or ``name: {state: tensor}``, or a dict of
    these under ``model``, ``optimizer`` and ``lr_scheduler``. Tensors may be DTensors with any placements but partial
    ones; just the bytes of its shards are read. Values are cast to the target's dtype, rounded to nearest even; the
    report lists casts.

    `layout` says how tensors lie that do not tell themselves, such as experts that every rank calls by the same names:
    ``{"layers.*.experts.*": (mesh, [Shard(0)])}``, globs of names with a DeviceMesh and a placement for each axis.

    Optimizer states are made where the optimizer has none yet, laid out as their parameters. Hyper-parameters go to
    the groups that hold the same parameters by name; ``hyper_parameters=False`` keeps the target's own.

    `strict` asks that source and target hold the same names, states and shapes. `map` renames (target name -> source
    name), `only` selects names by globs. `new` are globs of target names that the source may lack: they stay as they
    are, and start without optimizer states. `ignore` are globs of source names that the target may lack. `resize` maps
    target names, or globs, to the dim along which the source may have another size, as a vocabulary: what both have is
    filled, the rest of a value stays as it is, that of an optimizer state is zero.

    Where there is a process group all its ranks call, each with its own part of the job, and what one raises they all
    raise: what one rank has no use for, such as another stage of a pipeline, may be another's. Together they read each
    byte once, and exchange what several of them want through at most `memory` bytes of buffers each. ``together=False``
    lets a rank load for itself, whatever the others do; a process group lets its own ranks load together. With
    ``exchange=False`` they agree on everything, and each reads and checks all that it wants itself: for ranks that find
    their own shards near them.

    `verify` checks what was read against the checksums that the source keeps, all ranks together. It also compares
    replicas, such as what all tensor-parallel ranks hold. Low-precision copies are not read: converting
    compares them, and so does ``ucp verify --deep``.
    `workers` threads read (default: up to 4, and 16 for object storage), each with a bounded buffer. `options` go to
    the family's reader.

    A conversion `program` describes the target's tensors where they are not the checkpoint's: each of them is made of
    parts of logical tensors, as at `coordinate` of `mesh` (axis names to numbers of ranks, outermost first), and what
    no part fills is padding and becomes zero, in values and states. ``"source"`` is the program that the checkpoint
    keeps. Without a coordinate it is that of the process group's rank, counted row-major. A rank that holds several
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
    if wish is not None and resize:
        raise UsageError("resize is not for a program", hint="a program says what is padding: [vocab + _, hidden]")
    allowed = Allowed.of(new=new, ignore=ignore, resize=resize)
    globs = (only,) if isinstance(only, str) else only
    # Tensors made inside a user's inference mode could never be trained.
    with torch.inference_mode(False):
        crew = Crew.of(together)

        def prepare() -> tuple[tuple[Job, Checkpoint], Asked]:
            targets = take_apart(target, layout=layout)
            ckpt = _opened(source, family, options)
            supply = Whole(ckpt.catalog) if wish is None else share_out(ckpt.catalog, targets, wish)
            job = Job(supply.catalog, supply, ckpt.store, targets, map, None if globs is None else tuple(globs))
            job.findings.allowed = allowed
            plan(job, hyper_parameters=hyper_parameters)
            return (job, ckpt), asked_by(job)

        (job, ckpt), asked = crew.share(prepare)

        def fills() -> tuple[str, list[Fill]]:
            # What a program describes are the tensors of one coordinate: others have theirs.
            find_gaps(job, asked if wish is None or wish.mesh.size == 1 else [asked[crew.rank]])
            job.findings.check(ckpt.url, strict=strict)
            for refuse in job.targets.refusals:
                refuse()
            for _, made in job.states:
                job.fills += allocate(made, job.catalog, job.supply)
            return f"{ckpt.url} (step {job.catalog.step})", job.fills

        meeting = meet(crew, fills, exchange=exchange)
        planned, putting = time.perf_counter() - start, list[float]()
        ledger = ledger_of(ckpt.catalog, crew, verify=verify)

        def read() -> tuple[int, list[Piece]]:
            threads = workers or min(job.store.parallel, 4 if job.store.locks else 16)
            how = {"workers": threads, "replicas": verify, "memory": memory, "took": putting.append}
            filled = _fill(job, ledger, meeting, how)
            return filled, telling(ledger) if exchange else []

        received, pieces = crew.share(read)

        def check() -> tuple[None, tuple[int, int]]:
            extra, checked = (
                check_together(ledger, pieces, crew, job.store) if exchange else check_alone(ledger, job.store)
            )
            ledger.bytes_read += extra
            return None, (ledger.bytes_read, checked)

        _, told = crew.share(check)
        checked_at = time.perf_counter()
        # What schedulers and objects of the user's raise on one rank must not leave the others training.
        crew.do(lambda: _install(job))
        for finish in job.targets.after:
            finish()
        crew.do(lambda: _install_last(job))
    read_by_all, checked_by_all = (sum(one) for one in zip(*told, strict=True))
    moved = _Bytes(ledger.bytes_read, read_by_all, checked_by_all, received)
    seconds = time.perf_counter() - start
    reshard = sum(putting) + time.perf_counter() - checked_at
    parts = {"plan": planned, "read": seconds - planned - reshard, "reshard": reshard}
    return _report(job, moved, seconds, parts)


class _Bytes(NamedTuple):
    read: int
    of_job: int
    checked: int
    received: int


def _opened(source: str | os.PathLike[str] | Checkpoint, family: str | None, options: Mapping[str, Any]) -> Checkpoint:
    if not isinstance(source, Checkpoint):
        return open_checkpoint(source, family=family, **options)
    if family is not None or options:
        raise UsageError(f"family and options are for opening, and {source.url} is open", hint="give them to ucp.open")
    return source


def _fill(job: Job, ledger: Ledger, meeting: Meeting, how: Mapping[str, Any]) -> int:
    """Read everything into its place, together with the ranks of the meeting; bytes that came from them."""
    _clear_padding(job.fills)
    touched: set[str] = set()

    def record(object: str, offset: int, data: memoryview) -> None:
        touched.add(object)
        ledger.record(object, offset, data)

    received = fill_together(meeting, job.store, record=record, **how)
    check_unchanged(job.store, job.catalog, touched)
    return received


def _clear_padding(fills: Sequence[Fill]) -> None:
    """Zeros in tensors that the source does not fill wholly."""
    filled: dict[int, int] = {}
    for fill in fills:
        if fill.share is not None and not isinstance(fill.share, Kept):
            size = fill.share.block.size if fill.share.block is not None else 0
            filled[id(fill.held)] = filled.get(id(fill.held), 0) + size
    for fill in fills:
        if filled.pop(id(fill.held), math.inf) < numel(fill.held.shape):
            for _, view in fill.held.views():
                view.zero_()


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
    for item, prepared in (pair for pair in job.items if not pair[0].last):
        item.install(prepared)


def _install_last(job: Job) -> None:
    for item, prepared in (pair for pair in job.items if pair[0].last):
        item.install(prepared)


def _report(job: Job, moved: _Bytes, seconds: float, parts: Mapping[str, float]) -> LoadReport:
    findings, catalog = job.findings, job.catalog
    loaded = {item.name for item, _ in job.items} | ({STATE} if job.schedules else set())
    return LoadReport(
        url=catalog.url,
        family=catalog.source.family,
        step=catalog.step,
        tensors=len(job.used),
        bytes_read=moved.read,
        bytes_of_job=moved.of_job,
        bytes_checked=moved.checked,
        bytes_received=moved.received,
        seconds=seconds,
        renamed=findings.renamed,
        casts=tuple(findings.casts),
        without_state=tuple(findings.without_state),
        missing=findings.subjects("missing"),
        unexpected=findings.subjects("unexpected"),
        not_loaded=tuple(name for name in catalog.state if name not in loaded),
        notes=(*catalog.notes, *findings.notes),
        resized=findings.resized,
        parts=parts,
    )
