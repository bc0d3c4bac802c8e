"""Reading a folder of Hugging Face weights into a catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ucp.catalog import Catalog, Source
from ucp.converter import Sharded
from ucp.layout import Mesh
from ucp.store import Store

from .._programs import Known
from .._torch.around import has_training_files, read_around
from .beside import Beside, read_beside
from .index import check_index, read_index
from .joined import Joined, add_replicas, joined
from .model import is_adapter
from .names import known_of
from .pieces import File, read_files
from .places import SHARDED, Places, find
from .ranks import check_ranks

FAMILY = "hf"


@dataclass(frozen=True, slots=True)
class Options:
    """What to read: a variant of the weights, how many ranks saved, and which numbered optimizer state is whose."""

    variant: str | None = None
    ranks: int | None = None
    frozen: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def given(self) -> dict[str, object]:
        """Those that were given, by name."""
        named = {"variant": self.variant, "ranks": self.ranks, "frozen": self.frozen, "order": self.order}
        return {name: value for name, value in named.items() if value}


DEFAULTS = Options()


def read_catalog(store: Store, options: Options = DEFAULTS) -> Catalog:
    """The catalog of the weights in `store`; see `ucp.converters.hf.HuggingFace.read`."""
    places = find(store, options.variant)
    names = store.children()
    index = read_index(store, places.index) if places.index else None
    files = read_files(store, index.paths if index else places.paths)
    if index:
        check_index(store, index, {file.entry.path: [piece.name for piece in file.pieces] for file in files})
    found = joined(files, store.url)
    shards = _shards(store, names) if places.kind == "model" else []
    if shards:
        add_replicas(found, shards, store.url)
    beside = read_beside(store, names)
    entries = [*(file.entry for file in [*files, *shards]), *beside.entries, *([index.entry] if index else [])]
    catalog = Catalog(
        url=store.url,
        source=Source(FAMILY, _version(beside), Mesh({}), _detail(places, found, beside, len(files))),
        tensors=found.tensors,
        fragments=found.fragments,
        ties=found.ties,
        state=beside.state,
        checksums=tuple(checksum for file in files for checksum in file.checksums),
        objects={entry.path: (entry.size, entry.fingerprint) for entry in entries},
        notes=(*(f"{name} holds weights as well and is not read" for name in places.ignored), *beside.notes),
        options=options.given(),
    )
    if places.kind == "distributed":
        check_ranks(catalog, [file.entry.path for file in files], options.ranks, _known(catalog))
    return _trained(store, catalog, options, ordered=all(file.entry.path.endswith(".bin") for file in files))


def read_sharded(store: Store, options: Options = DEFAULTS) -> Sharded:
    """The same catalog, with the program that fits its names and what the configuration says of sizes and flags."""
    catalog = read_catalog(store, options)
    known = _known(catalog)
    sharded = Sharded([({}, catalog)], Mesh({}))
    if known is None:
        return sharded
    return replace(sharded, config=known.sizes, flags=known.flags, program=known.program)


def _trained(store: Store, catalog: Catalog, options: Options, *, ordered: bool) -> Catalog:
    """`catalog` with what Trainer or Accelerate put beside the weights, if they did."""
    if not has_training_files(store.children()):
        return catalog
    kind = catalog.source.detail["model_type"]
    model_type = kind if isinstance(kind, str) else None
    return read_around(
        store, catalog, ordered=ordered, model_type=model_type, frozen=options.frozen, order=options.order
    )


def _shards(store: Store, names: Sequence[str]) -> list[File]:
    """What ranks saved, in the folder that torch leaves beside the files it made of it."""
    if f"{SHARDED}/" not in names:
        return []
    paths = [f"{SHARDED}/{name}" for name in store.children(SHARDED) if name.endswith(".safetensors")]
    return read_files(store, paths)


def _known(catalog: Catalog) -> Known | None:
    return None if is_adapter(catalog) else known_of(catalog, catalog.state.get("hf_config"))


def _version(beside: Beside) -> str:
    version = (beside.config or {}).get("transformers_version")
    return version if isinstance(version, str) else ""


def _detail(places: Places, found: Joined, beside: Beside, files: int) -> dict[str, str | int | float | bool | None]:
    kind = (beside.config or {}).get("model_type")
    dtypes = sorted({tensor.states["value"].dtype for tensor in found.tensors.values()})
    return {
        "weights": places.kind,
        "files": files,
        "model_type": kind if isinstance(kind, str) else None,
        "value_dtype": " ".join(dtypes) or None,
    }
