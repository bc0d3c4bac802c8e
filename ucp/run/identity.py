"""What tells one conversion from another, so that a run goes on with none but its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.plan import Plan

__all__ = ["identity"]


def identity(catalog: Catalog, plan: Plan, to: str, **options: Any) -> str:
    """A digest that changes whenever the same conversion would read or write something else.

    `options` are whatever of the caller's else decides what is written; those of the target are under ``options``.
    """
    parts = {
        "to": to,
        "options": {name: repr(value) for name, value in options.items()},
        "files": _named_files(options.get("options", {})),
        "objects": sorted((path, *info) for path, info in catalog.objects.items()),
        "tasks": sorted((task.object, task.size, task.nbytes) for task in plan.tasks),
        "reads": _reads(plan),
        "checked": sorted(catalog.witnesses),
        "program": repr(catalog.program),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _named_files(options: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """Size and time of every file that an option of the target names, or that lies in a folder it names."""
    found = []
    for name, value in sorted(options.items()):
        place = Path(value) if isinstance(value, str) and value and "\0" not in value else None
        with contextlib.suppress(OSError):
            for path in [] if place is None else sorted(place.iterdir()) if place.is_dir() else [place]:
                told = path.stat()
                found.append((name, path.name, told.st_size, told.st_mtime_ns))
    return found


def _reads(plan: Plan) -> str:
    """Digest of what goes where: options may name files, and what these say may be another thing by now."""
    digest, known = hashlib.blake2b(digest_size=16), set[int]()
    for section in (section for task in plan.tasks for section in task.sections):
        cover = section.cover
        digest.update(
            f"{section.offset} {section.region.start} {section.dtype} {cover.key}\n".encode("utf-8", "surrogatepass")
        )
        if id(cover) not in known:
            known.add(id(cover))
            digest.update(f"{cover.spec} {cover.view.factors} {cover.reduce}\n".encode())
            for one in cover.fragments:
                at = one.extent
                place = f"{at.object} {at.offset} {at.shape} {at.strides} {at.dtype} {one.region.start} {one.term}\n"
                digest.update(place.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
