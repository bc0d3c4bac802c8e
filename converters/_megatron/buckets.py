"""Optimizer states in flat buffers: which elements of a buffer are which parameter's.

Buffers hold parameters in the order in which modules register them, and no names (see `order`, `flatten`). What is
concluded must agree with the sizes of all buckets and with the edges of their chunks, and low-precision weights must
equal the rounded masters: that is checked whenever they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError
from ucp.plan import Fragment, TensorSpec

from .buffers import ALONE, Bucket, Buffer, Buffers, collect, objects
from .dist import Dist
from .flatten import in_buckets, starts_of
from .found import Found
from .groups import Optimizer, optimizers_of
from .local import Local
from .order import Model, Order, Place, is_edge, orders
from .sample import is_master
from .transposed import Transposed

_LOOKED_AT = 32
"""Parameters of a buffer: more than a layer has that orders could put differently."""


def read_buckets(dist: Dist, found: Found) -> list[Optimizer]:
    """Find every parameter in the buckets, and give what is known of each optimizer.

    FitError where the order of parameters is not known or two orders are possible, CorruptError where buckets are not
    those of this model, NotFoundError for ranks that are missing.
    """
    model = Model(dist.model, dist.args, dist.where)
    model.require_known()
    held = collect(dist)
    if set(held) - {0, 1}:
        raise FitError(f"{dist.where}: {max(held) + 1} chained optimizers are not supported", hint=ALONE)
    for experts in (False, True):
        places, by_rank = _places(model, experts=experts), held.get(experts, {})
        _require_ranks(dist, by_rank, places, model, experts=experts)
        for rank, place in enumerate(places):
            if rank in by_rank:
                _read_rank(dist, found, model, place, by_rank[rank], experts=experts)
    return _told(dist)


def _places(model: Model, *, experts: bool) -> list[Place]:
    """Coordinates of model-parallel ranks in the order of ``dp_group_idx``: stages outermost, then experts, then tp."""
    args = model.args
    if experts:
        return [Place(t, p, e) for p in range(args.pp) for e in range(args.ep) for t in range(args.etp)]
    return [Place(t, p) for p in range(args.pp) for t in range(args.tp)]


def _require_ranks(
    dist: Dist, by_rank: Mapping[int, Buffers], places: Sequence[Place], model: Model, *, experts: bool
) -> None:
    order = next(orders(model.args))
    for rank, place in enumerate(places):
        if rank not in by_rank and any(_parameters(model, place, order, experts=experts)):
            raise NotFoundError(
                f"{dist.where}: no buckets of model-parallel rank {rank} ({place}); the job had {len(places)}",
                hint="the save was cut short, or the args are of another job",
            )
    if set(by_rank) - set(range(len(places))):
        raise CorruptError(
            f"{dist.where}: buckets of model-parallel rank {max(by_rank)}, but args say there were {len(places)}",
            hint="args and tensors are of different jobs",
        )


def _parameters(model: Model, place: Place, order: Order, *, experts: bool) -> list[list[Local | Transposed]]:
    """The parameters of each buffer of a rank: one for each dtype of each model chunk."""
    found = []
    for chunk in range(model.args.vpp):
        by_dtype: dict[str, list[Local | Transposed]] = {}
        for one in model.parameters(chunk, place, order, experts=experts):
            by_dtype.setdefault(one.dtype, []).append(one)
        found += list(by_dtype.values())
    return found


Placed = list[tuple[Local | Transposed, int, int]]
"""(parameter, bucket, first element in the bucket)"""


def _read_rank(dist: Dist, found: Found, model: Model, place: Place, buffers: Buffers, *, experts: bool) -> None:
    fitting: list[list[Placed]] = []  # for each order, the parameters of each buffer
    for order in orders(model.args):
        fitted = _fitted(model, _parameters(model, place, order, experts=experts), place, buffers)
        if fitted is not None and fitted not in fitting:
            fitting.append(fitted)
    if len(fitting) > 1 or any(buffer.joined for buffer in buffers.values()):
        fitting = [placed for placed in fitting if _agrees(dist, placed, buffers)]
    if not fitting:
        raise CorruptError(
            f"{dist.where}: the optimizer's buckets at {place} are not those of this model's parameters",
            hint="args and tensors are of different jobs, or modules are registered in an order that is not known",
        )
    if len(fitting) > 1:
        raise FitError(
            f"{dist.where}: the order of parameters in the optimizer's buffers is not certain",
            hint=ALONE,
        )
    for number, placed in enumerate(fitting[0]):
        for one, bucket, start in placed:
            _add(dist, found, one, buffers[number].buckets[bucket], start)


def _agrees(dist: Dist, placed: Sequence[Placed], buffers: Buffers) -> bool:
    """Whether masters are the weights where this order puts them, seen from the first elements of some parameters."""
    for number, held in enumerate(placed):
        for one, bucket, start in held[:_LOOKED_AT]:
            found = next(buffers[number].buckets[bucket].runs("param", start, start + one.size))
            if not is_master(dist, one, found[1]):
                return False
    return True


def _fitted(
    model: Model, parameters: Sequence[list[Local | Transposed]], place: Place, buffers: Buffers
) -> list[Placed] | None:
    """Where the parameters lie if this is their order; None if sizes or the edges of chunks contradict it."""
    if list(range(len(parameters))) != sorted(buffers):
        return None
    found: list[Placed] = []
    for number, held in enumerate(parameters):
        at = _starts(model, held, buffers[number], first=place.pp == 0 and number == 0)
        if at is None:
            return None
        found.append([(one, *start) for one, start in zip(held, at, strict=True)])
    return found


def _starts(
    model: Model, held: Sequence[Local | Transposed], buffer: Buffer, *, first: bool
) -> list[tuple[int, int]] | None:
    """(bucket, first element in it) of each parameter of a buffer."""
    numbers = range(len(buffer.buckets))
    if sorted(buffer.buckets) != list(numbers) or any(one.dtype != buffer.dtype for one in held):
        return None
    buckets = [buffer.buckets[number] for number in numbers]
    sizes = [one.size for one in held]
    if buffer.joined:
        edges = [number for number, one in enumerate(held) if is_edge(one.key)]
        starts = starts_of(model.args, sizes, edges=edges, first=first, total=buckets[0].size)
        return None if starts is None else [(0, start) for start in starts]
    at = in_buckets(sizes, [bucket.size for bucket in buckets])
    edges_of = [bucket.edges() for bucket in buckets]
    if at is None or any(not {start, start + n} <= edges_of[b] for n, (b, start) in zip(sizes, at, strict=True)):
        return None
    return at


def _add(dist: Dist, found: Found, one: Local | Transposed, bucket: Bucket, start: int) -> None:
    """The states of one parameter."""
    shape = dist.model[one.key].shape
    for state in bucket.states:
        fragments: list[Fragment] = []
        for first, extent, checksums in bucket.runs(state, start, start + one.size):
            fragments += one.fragments(first - start, extent, replica=one.replica)
            found.checksums += checksums
        found.add(one.key, state, TensorSpec(shape, extent.dtype), fragments)


def _told(dist: Dist) -> list[Optimizer]:
    """Each optimizer as its ranks saved it; ConflictError if they differ."""
    told: dict[int, dict[str, Optimizer]] = {}
    for key, number, _ in objects(dist, "optimizer"):
        scaler = key.replace(".optimizer/", ".grad_scaler/")
        held = dist.blob(scaler) if scaler in dist.metadata.blobs else None
        (one,) = optimizers_of({"optimizer": dist.blob(key), "grad_scaler": held}, where=key)
        told.setdefault(number, {})[key] = one
    for by_key in told.values():
        first = next(iter(by_key))
        for key, one in by_key.items():
            if one.groups != by_key[first].groups:
                raise ConflictError(
                    f"{dist.where}: {key} and {first} say different things of the same param groups",
                    hint="files of two saves are mixed: copy the folder again",
                )
    return [next(iter(told[number].values())) for number in sorted(told)]
