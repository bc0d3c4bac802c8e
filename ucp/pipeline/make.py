"""One checkpoint of a pipeline: converted, verified, and noted as such."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.errors import ContentError, CorruptError, NotFoundError
from ucp.pipeline.leases import Lease
from ucp.pipeline.proof import prove
from ucp.pipeline.prune import remove
from ucp.pipeline.records import Record, Records
from ucp.pipeline.settings import Settings
from ucp.run.convert import Conversion, carry_out, prepare
from ucp.run.progress import Progress
from ucp.store import Store


@dataclass(frozen=True, slots=True)
class Making:
    """What is to be made: the checkpoint `name`, of a source that looks like `seen`, in a folder of `destination`."""

    settings: Settings
    name: str
    seen: str
    destination: Store
    lease: Lease
    tell: Callable[[str, Mapping[str, Any]], None]
    on_progress: Callable[[Progress], None]


def seen_of(source: Store) -> str:
    """What tells whether a source has changed: a digest of the names, sizes and fingerprints of its objects."""
    listed = [f"{entry.path}\n{entry.size}\n{entry.fingerprint}" for entry in source.entries()]
    return hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()


def make(making: Making, *, was: Record | None, records: Records) -> Record | None:
    """Convert and verify; the record says so when this returns. Goes on where an earlier attempt stopped.

    None where another watcher has changed the record meanwhile. Raises what these raise. A result that is damaged is
    deleted, since nobody can mend it but a further conversion.
    """
    settings, name = making.settings, making.name
    source, destination = (f"{url.rstrip('/')}/{name}" for url in (settings.source, settings.destination))
    conversion = prepare(source, destination, restart=True, **settings.options)
    making.tell("converting", {"from": conversion.catalog.source.family, "notes": list(conversion.notes)})
    report = carry_out(conversion, workers=settings.workers, on_progress=making.on_progress)
    making.tell("verifying", {"bytes_written": report.bytes_written, "seconds": report.seconds})
    try:
        proven = prove(
            conversion, destination, check=settings.check, workers=settings.workers, on_progress=making.on_progress
        )
    except (ContentError, NotFoundError) as error:
        _discard(making, conversion, was, records)
        raise CorruptError(f"{error}", hint="the result was deleted, and is made again at the next attempt") from error
    record = Record(name, "verified", {**_described(conversion), **proven}, seen=making.seen)
    if records.change(record, was=was):
        return record
    now = records.one(name)
    return now if now is not None and now.state == "verified" else None


def _discard(making: Making, conversion: Conversion, was: Record | None, records: Records) -> None:
    """Delete a result that is not what it should be, unless another watcher found otherwise."""
    root = conversion.target.root
    if records.change(Record(making.name, "damaged", {"root": root}), was=was):
        remove(making.destination, making.name, root, making.lease)
        records.remove(making.name)


def _described(conversion: Conversion) -> dict[str, Any]:
    """What the record and the pointer say of a checkpoint; nothing in it depends on when or by whom it was made."""
    folder, root = conversion.destination, conversion.target.root
    return {
        "url": folder.url,
        "family": conversion.to,
        "step": conversion.catalog.step,
        "bytes": sum(entry.size for entry in folder.entries()),
        "root": root,
        "digest": f"sha256:{hashlib.sha256(folder.read(root)).hexdigest()}",
        "source": conversion.source_url,
    }
