"""A catalog laid out as a folder that stock ``torch.distributed.checkpoint.load`` takes, model and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import UsageError
from ucp.mapping import is_logical
from ucp.plan import Digests, Task
from ucp.store import Store

from .contained import contain
from .cut import files_for
from .folder import METADATA, lay_out
from .local import localized
from .naming import Naming
from .told import Told

FAMILY = "dcp"
_MOST_FILES = 100_000


@dataclass(frozen=True, slots=True)
class DcpTarget:
    """A DCP folder to be written: a task for each file, then ``.metadata``, without which it is no checkpoint."""

    tasks: tuple[Task, ...]
    metadata: bytes = field(repr=False)
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    family: str = FAMILY
    root: str = METADATA

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """``.metadata``."""
        del digests
        yield METADATA, self.metadata


def make_target(
    catalog: Catalog,
    store: Store,
    *,
    layout: Layout | None = None,
    files: int | str | None = None,
    model: str = "model.",
    optimizer: str = "optim.",
    flat: bool | str = False,
    **unknown: object,
) -> DcpTarget:
    """Lay `catalog`, which lies in `store`, out as a DCP folder of `files` files.

    Keys are those of ``{"model": …, "optim": …}`` from ``get_state_dict``: `model` and `optimizer` are their prefixes,
    and `flat` says that the job sets ``flatten_optimizer_state_dict``. Without `files` there are as many as `layout`'s
    mesh has ranks, or else as the size asks for; every tensor is cut along dim 0 into as many chunks. A program of
    `layout` gives tensors the names that a job has. FitError for what such a folder cannot hold, UsageError for unknown
    options.
    """
    if unknown:
        raise UsageError(
            f"{FAMILY}: unknown option {next(iter(unknown))!r}", hint="known: files model optimizer flat, and --mesh"
        )
    layout = layout or Layout()
    catalog.require_decided()
    local = localized(catalog, layout)
    naming = Naming.of(model, optimizer, flat=_yes(flat))
    count = _count(files) or (layout.mesh.size if layout.mesh.axes else files_for(local.nbytes))
    held = contain(local, store, naming, files=count)
    kinds = {name: tensor.kind for name, tensor in local.tensors.items() if tensor.kind != "parameter"}
    told = Told(local.step, kinds, local.ties, held.aliases)
    folder = lay_out(held.entries, held.blobs, planner=held.paths, extra=told.note())
    return DcpTarget(folder.tasks, folder.metadata, (*_names(catalog, layout), *held.notes), tuple(held.losses))


def _names(catalog: Catalog, layout: Layout) -> Iterator[str]:
    if layout.program is None and is_logical(catalog):
        yield "tensors keep their logical names; a job of another naming gets its own with --to-spec, such as hf_llama"


def _count(files: int | str | None) -> int | None:
    """A number of files; the command line gives text."""
    if files is None:
        return None
    if not str(files).isdecimal() or not 1 <= int(files) <= _MOST_FILES:
        raise UsageError(f"{FAMILY}: files is a number of files, not {files!r}")
    return int(files)


def _yes(flat: bool | str) -> bool:
    if isinstance(flat, bool):
        return flat
    if flat.lower() not in ("true", "false", "1", "0", "yes", "no", ""):
        raise UsageError(f"{FAMILY}: flat is true or false, not {flat!r}")
    return flat.lower() in ("true", "1", "yes", "")
