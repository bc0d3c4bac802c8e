"""Carrying out what a load planner of torch.distributed.checkpoint asks for, through ucp's own engine."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from ucp.catalog import Scalar
from ucp.checkpoint import Checkpoint
from ucp.container.values import Reference
from ucp.errors import FitError
from ucp.integrations._dcp_lookup import Found, Kept, Keys, Number, Value, Weight
from ucp.layout import Box
from ucp.layout.dtypes import ITEMSIZE
from ucp.lazy import lazy_tree, read_tree
from ucp.run.integrity import Ledger, Piece
from ucp.run.unchanged import check_unchanged
from ucp.train.checking import check_together, ledger_of, telling
from ucp.train.crew import Crew
from ucp.train.exchange import fill_together, meet
from ucp.train.fit import check_dtype, check_number
from ucp.train.held import Held, Place
from ucp.train.report import Findings
from ucp.train.shards import dtype_name, local_tensor
from ucp.train.transfer import Fill
from ucp.tree import Opaque, walk

_LOG = logging.getLogger("ucp")


def read_items(
    ckpt: Checkpoint,
    keys: Keys,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    *,
    crew: Crew,
    cast: bool,
    verify: bool,
) -> None:
    """Read `items` into what `planner` has for them, together with the ranks of `crew`.

    Nothing is changed unless everything fits. FitError that lists what does not, CorruptError, ConflictError or
    StorageError while reading, on all ranks of the crew where one of them raises.
    """
    fills: list[tuple[ReadItem, Fill]] = []
    values: list[tuple[ReadItem, Any, Any]] = []

    def prepare() -> tuple[str, list[Fill]]:
        fills.extend(_fills(ckpt, keys, items, planner, cast=cast))
        values.extend(_values(ckpt, keys, items, planner, cast=cast))
        return ckpt.url, [fill for _, fill in fills]

    meeting = meet(crew, prepare)

    def read() -> tuple[Ledger, list[Piece]]:
        ledger = ledger_of(ckpt.catalog, crew, verify=verify)
        touched: set[str] = set()

        def record(object: str, offset: int, data: memoryview) -> None:
            touched.add(object)
            ledger.record(object, offset, data)

        workers = min(4, os.cpu_count() or 1)
        fill_together(meeting, ckpt.store, workers=workers, record=record, replicas=verify)
        check_unchanged(ckpt.store, ckpt.catalog, touched)
        return ledger, telling(ledger)

    ledger, pieces = crew.share(read)
    crew.share(lambda: (None, check_together(ledger, pieces, crew, ckpt.store)))
    for item, fill in fills:
        planner.commit_tensor(item, fill.held.memory)
    for item, target, value in values:
        _deliver(planner, item, target, value)


def _fills(
    ckpt: Checkpoint, keys: Keys, items: Sequence[ReadItem], planner: LoadPlanner, *, cast: bool
) -> list[tuple[ReadItem, Fill]]:
    """What to read of tensors; FitError where a dtype would change and nobody asked for that."""
    findings, fills = Findings(), []
    for item in items:
        found = keys.find(item.storage_index.fqn)
        if item.type is not LoadItemType.TENSOR or not isinstance(found, Weight):
            continue
        cover = ckpt.catalog.cover(found.name, found.state)
        target = planner.resolve_tensor(item).detach()
        region = Box(tuple(item.storage_offsets), tuple(item.lengths))
        if check_dtype(findings, found.name, found.state, cover.spec.dtype, target.dtype):
            place = Place(region, Box.whole(region.shape))
            fills.append((item, Fill(Held(cover.spec.shape, target, (place,)), cover)))
    if not cast:
        for change in dict.fromkeys(findings.casts):
            label = change.name if change.state == "value" else f"{change.name}[{change.state}]"
            findings.add("dtype", label, f"{change.source} in the source, {change.target} in the state dict")
    _check(findings, ckpt.url, cast=cast)
    return fills


def _check(findings: Findings, url: str, *, cast: bool) -> None:
    if findings.problems and not cast and all(problem.kind == "dtype" for problem in findings.problems):
        shown = "\n".join(f"  {problem}" for problem in findings.problems[:30])
        raise FitError(
            f"{url}: dtypes differ in {len(findings.problems)} places\n{shown}",
            hint="Reader(url, cast=True) casts, rounded to nearest even",
        )
    findings.check(url, strict=True)


def _values(
    ckpt: Checkpoint, keys: Keys, items: Sequence[ReadItem], planner: LoadPlanner, *, cast: bool
) -> list[tuple[ReadItem, Any, Any]]:
    """(item, what the job has there, the new value) of everything else."""
    own: Mapping[str, Any] = getattr(planner, "state_dict", {})
    findings, values, kept = Findings(), [], []
    for item in items:
        key = item.storage_index.fqn
        found = keys.find(key)
        if isinstance(found, Kept):
            kept.append(key)
        elif found is not None and not isinstance(found, Weight):
            target = own.get(key)
            value = _value(ckpt, key, found)
            values.append((item, target, _fitting(findings, key, value, target, cast=cast)))
    findings.check(ckpt.url, strict=True)
    if kept:
        _LOG.info("%s: has no word for these options, the job keeps its own: %s", ckpt.url, " ".join(kept))
    return values


def _value(ckpt: Checkpoint, key: str, found: Found) -> Any:
    if isinstance(found, Number):
        return _number(found.scalar)
    assert isinstance(found, Value)
    for _, node in walk(found.tree, where=key):
        if isinstance(node, Opaque) and not _is_dtype(node):
            raise FitError(
                f"{ckpt.url}: {key} holds an object of class {node.path}, which is never built from a file",
                hint="leave this key out of the state dict, and read what it holds with ucp.open(url).state",
            )
    return _built(read_tree(lazy_tree(ckpt.catalog, ckpt.store, found.tree, key)))


def _is_dtype(node: Opaque) -> bool:
    return isinstance(node, Reference) and node.module == "torch" and node.name in ITEMSIZE


def _built(node: Any) -> Any:
    """`node` with torch's dtypes as such, and tuples of our own as torch or Python has them."""
    if isinstance(node, Reference):
        return getattr(torch, node.name)
    if isinstance(node, dict):
        return {_built(key): _built(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return tuple(_built(value) for value in node)
    return [_built(value) for value in node] if isinstance(node, list) else node


def _number(scalar: Scalar) -> Any:
    if scalar.dtype in ("int", "float", "bool"):
        return scalar.value
    return torch.tensor(scalar.value, dtype=getattr(torch, scalar.dtype))


def _fitting(findings: Findings, key: str, value: Any, target: Any, *, cast: bool) -> Any:
    """`value` as the job has it: a number where it has a number, a tensor where it has a tensor."""
    if isinstance(target, torch.Tensor):
        return _as_tensor(findings, key, value, target, cast=cast)
    if isinstance(value, torch.Tensor) and value.ndim == 0 and isinstance(target, bool | int | float):
        number = value.item()
        if isinstance(target, float):
            return float(number)
        if float(number).is_integer() and type(target)(number) == number:
            return type(target)(number)
        findings.add("dtype", key, f"{number} in the source would change as {type(target).__name__}")
    if isinstance(value, dict) and target is not None and not isinstance(target, dict) and key:
        findings.add("shape", key, f"a dict with {' '.join(map(str, value))} in the source")
    return value


def _as_tensor(findings: Findings, key: str, value: Any, target: torch.Tensor, *, cast: bool) -> Any:
    if isinstance(value, bool | int | float) or (isinstance(value, torch.Tensor) and not value.ndim):
        number = value.item() if isinstance(value, torch.Tensor) else value
        if target.numel() != 1:
            findings.add("shape", key, f"one number in the source, {list(target.shape)} in the state dict")
        else:
            check_number(findings, key, number, target.dtype)
        return number
    if not isinstance(value, torch.Tensor):
        findings.add("shape", key, f"a {type(value).__name__} in the source, a tensor in the state dict")
    elif value.shape != target.shape:
        findings.add("shape", key, f"{list(value.shape)} in the source, {list(target.shape)} in the state dict")
    elif local_tensor(target, key).shape != target.shape:
        findings.add("memory", key, "a tensor in pieces in the state dict, part of the training state in the source")
    elif value.dtype != target.dtype:
        change = f"{dtype_name(value.dtype)} in the source, {dtype_name(target.dtype)} in the state dict"
        if not cast:
            findings.add("dtype", key, f"{change}; Reader(url, cast=True) casts")
        else:
            check_dtype(findings, key, "value", dtype_name(value.dtype), target.dtype)
    return value


def _deliver(planner: LoadPlanner, item: ReadItem, target: Any, value: Any) -> None:
    if isinstance(target, torch.Tensor):
        local = local_tensor(target, item.storage_index.fqn)
        with torch.no_grad():
            local.copy_(value) if isinstance(value, torch.Tensor) else local.fill_(value)
        return
    data = io.BytesIO()
    # The planner unpickles it at once: values that were just built here, and no bytes of the checkpoint's.
    torch.save(value, data)
    data.seek(0)
    planner.load_bytes(item, data)


__all__ = ["read_items"]
