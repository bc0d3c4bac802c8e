"""`ucp.load`: fill live modules, optimizers and sharded tensors from any readable checkpoint."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import UsageError
from ucp.run.integrity import Ledger, Spans
from ucp.run.unchanged import check_unchanged
from ucp.store import Store
from ucp.train.groups import install_options
from ucp.train.job import Job, plan
from ucp.train.names import Rename
from ucp.train.optimizer import allocate
from ucp.train.report import LoadReport
from ucp.train.scheduler import STATE
from ucp.train.targets import take_apart
from ucp.train.transfer import transfer

_GAP = 64 << 10
"""Bytes that may be read beyond what was asked for, per checksum, to make it tell."""


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
    **options: Any,
) -> LoadReport:
    """Fill `target` in place from the checkpoint `source`, a URL or an open `Checkpoint`, whatever layout wrote it.

    `target` is a module, ``(module, optimizer)``, a dict ``name: tensor`` or ``name: {state: tensor}``, or a dict of
    these under ``model``, ``optimizer`` and ``lr_scheduler``. Tensors may be DTensors with any placements but partial
    ones; every rank reads just the bytes of its own shards, and no rank waits for another. Values are cast to the
    target's dtype, rounded to nearest even; the report lists casts.

    Optimizer states are made where the optimizer has none yet, laid out as their parameters. Hyper-parameters go to
    the groups that hold the same parameters by name; ``hyper_parameters=False`` keeps the target's own.

    `strict` asks that source and target hold the same names, states and shapes. `map` renames (target name -> source
    name), `only` selects names by globs. `verify` checks what was read against the checksums that the source keeps.
    `workers` threads read (default: up to 4), each with a bounded buffer. `options` go to the family's reader.

    Nothing is changed unless everything fits. Raises FitError that lists all problems, NotFoundError, UsageError for a
    target of an unknown kind, and CorruptError or StorageError while reading, after which the target is partly filled.
    """
    start = time.perf_counter()
    if isinstance(source, Checkpoint):
        if family is not None or options:
            raise UsageError(
                f"family and options are for opening, and {source.url} is open", hint="give them to ucp.open"
            )
        ckpt = source
    else:
        ckpt = open_checkpoint(source, family=family, **options)
    globs = (only,) if isinstance(only, str) else only
    # Tensors made inside a user's inference mode could never be trained.
    with torch.inference_mode(False):
        job = Job(ckpt.catalog, ckpt.store, take_apart(target), map, None if globs is None else tuple(globs))
        plan(job, hyper_parameters=hyper_parameters)
        job.findings.check(ckpt.url, strict=strict)
        moved = _carry_out(job, verify=verify, workers=workers or min(4, os.cpu_count() or 1))
    return _report(job, moved, time.perf_counter() - start)


class _Bytes(NamedTuple):
    read: int
    checked: int


def _carry_out(job: Job, *, verify: bool, workers: int) -> _Bytes:
    """Read everything, then install what optimizers and schedulers hold."""
    for _, made in job.states:
        job.fills += allocate(made, job.catalog)
    ledger = Ledger(Spans(job.catalog.checksums if verify else ()))
    counts: dict[str, list[int]] = defaultdict(list)

    def record(object: str, offset: int, data: memoryview) -> None:
        counts[object].append(len(data))
        ledger.record(object, offset, data)

    transfer(job.store, job.fills, workers=workers, record=record)
    check_unchanged(job.store, job.catalog, counts)
    checked, extra = _verify(ledger, job.store)
    with torch.no_grad():
        for tensor, value in job.numbers:
            tensor.fill_(value)
    _install(job)
    return _Bytes(sum(map(sum, counts.values())) + extra, checked)


def _verify(ledger: Ledger, store: Store) -> tuple[int, int]:
    """Check the spans of which this rank read nearly all, and read the rest of them (padding, mostly).

    Returns the bytes checked, and how many of them were read for that.
    """
    missing = {span: ledger.spans.checksums[span].length for span in {piece.span for piece in ledger.pieces()}}
    for piece in ledger.pieces():
        missing[piece.span] -= piece.length
    nearly = {span for span, n in missing.items() if n <= max(_GAP, ledger.spans.checksums[span].length // 64)}
    checked = Ledger(ledger.spans)
    checked.add(piece for piece in ledger.pieces() if piece.span in nearly)
    return sum(ledger.spans.checksums[span].length for span in nearly), checked.verify(store)


def _install(job: Job) -> None:
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
