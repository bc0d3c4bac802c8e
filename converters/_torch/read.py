"""Puts the pieces of a checkpoint of torch.save together into a catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ucp.catalog import Catalog, Source
from ucp.container.torchfile import TorchFile, read_torch_file
from ucp.errors import FitError, NotFoundError
from ucp.layout import Mesh
from ucp.store import SingleStore, Store
from ucp.tree import Opaque, Tree

from .around import read_around
from .files import FSDP, ROOT, TRAINER, candidates, is_training_folder, is_unfinished, number
from .files import sort_out as sort_out_files
from .optimizer import Numbering, with_named_optimizer, with_optimizers
from .options import Options
from .ours import FILE, check_root, is_own, own_parts
from .spellings import LIGHTNING, Parts, sort_out
from .weights import Weights, read_weights

FAMILY = "torch"
_NO_OPTIMIZER = "no optimizer was saved: floating-point tensors are taken for parameters"


def read_catalog(store: Store, options: Options) -> Catalog:
    """The catalog of what lies in `store`; see `ucp.converters.torch_save.TorchSave.read`."""
    names = store.children()
    if is_unfinished(names):
        raise NotFoundError(
            f"{store.url}: a conversion into it was cut short", hint="run the same command again: it resumes"
        )
    if options.file is None and not isinstance(store, SingleStore) and is_training_folder(names):
        return _read_folder(store, options)
    return _read_file(store, _file(store, names, options), options)


def _file(store: Store, names: list[str], options: Options) -> str:
    if options.file is not None:
        return options.file
    found = [FILE] if ROOT in names and FILE in names else candidates(names)
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFoundError(
            f"{store.url}: several files, each of which may be a checkpoint",
            hint=f"name one: {' '.join(found[:8])}{' …' if len(found) > 8 else ''}",
        )
    raise NotFoundError(f"{store.url}: no file of torch.save here")


def _read_folder(store: Store, options: Options) -> Catalog:
    """A folder of Accelerate or Trainer, whose weights have the names that Hugging Face gives them."""
    weights = sort_out_files(store.children())["weights"]
    several = [name for name in weights if number(name)]
    if several:
        raise FitError(
            f"{store.url}: several models ({' '.join(several[:8])} beside the first) are not read together",
            hint="save_state of an Accelerator with one model, or read a file of weights by itself",
        )
    fsdp = [name for name in weights if name.startswith(FSDP)]
    catalog = _fsdp_folder(store, fsdp[0], options) if fsdp else _named_folder(store, options)
    layout = "trainer" if TRAINER in catalog.objects else "accelerate"
    random = catalog.state.get("rng")
    ranks = len(random["rank"]) if isinstance(random, dict) and isinstance(random.get("rank"), dict) else 1
    mesh = Mesh({"dp": ranks} if ranks > 1 else {})
    source = Source(FAMILY, catalog.source.version, mesh, {**catalog.source.detail, "layout": layout})
    return replace(catalog, source=source, options=options.given())


def _named_folder(store: Store, options: Options) -> Catalog:
    # The reader of these files and this module use each other.
    from .._hf.read import Options as HfOptions
    from .._hf.read import read_catalog as read_hf

    return read_hf(store, HfOptions(frozen=options.frozen, order=options.order))


def _fsdp_folder(store: Store, path: str, options: Options) -> Catalog:
    """FSDP's full state dict, with optimizer states by name (accelerate/utils/fsdp_utils.py, ``save_fsdp_model``)."""
    file = read_torch_file(store, path)
    parts = sort_out(file.root, f"{store.url}/{path}", model=options.model)
    catalog = _catalog(store, file, parts, read_weights(parts.model, {}), options)
    return read_around(store, catalog, ordered=True, frozen=options.frozen, order=options.order)


def _read_file(store: Store, path: str, options: Options) -> Catalog:
    if path == FILE:
        check_root(store)
    file = read_torch_file(store, path)
    where = f"{store.url}/{path}"
    if is_own(file.root):
        return _read_own(store, file, where, options)
    parts = sort_out(file.root, where, model=options.model, optimizer=options.optimizer)
    catalog = _catalog(store, file, parts, read_weights(parts.model, {}), options)
    if not parts.optimizers:
        return replace(catalog, notes=(*catalog.notes, _NO_OPTIMIZER))
    numbering = Numbering(list(catalog.tensors), options.frozen, options.order)
    return with_optimizers(catalog, store, parts.optimizers, numbering, file.checksums)


def _read_own(store: Store, file: TorchFile, where: str, options: Options) -> Catalog:
    """A file of our own target, in which everything is told."""
    own = own_parts(file.root, where)
    weights = read_weights(own.parts.model, own.kinds, as_they_are=True)
    catalog = _catalog(store, file, own.parts, weights, options)
    for tree in own.parts.optimizers.values():
        catalog = with_named_optimizer(catalog, store, tree, count=own.groups, checksums=file.checksums)
    return replace(catalog, step=own.parts.step)


def _catalog(store: Store, file: TorchFile, parts: Parts, weights: Weights, options: Options) -> Catalog:
    state = dict(parts.state)
    _require_plain(f"{store.url}/{file.entry.path}", weights)
    if weights.extra:
        state["module"] = weights.extra
    names = [file.entry, *([store.entry(ROOT)] if store.exists(ROOT) else [])]
    return Catalog(
        url=store.url,
        source=_source(file, weights),
        tensors=weights.tensors,
        fragments=weights.fragments,
        step=parts.step,
        ties=weights.ties,
        state=state,
        checksums=file.checksums,
        objects={entry.path: (entry.size, entry.fingerprint) for entry in names},
        notes=tuple(weights.notes),
        options=options.given(),
    )


def _require_plain(where: str, weights: Weights) -> None:
    """FitError for weights whose bytes are not the whole tensor, above all what one rank of FSDP has of it."""
    for name, node in weights.extra.items():
        if isinstance(node, Opaque) and node.name.endswith("Tensor"):
            raise FitError(
                f"{where}: {name} is a {node.path}, no plain tensor",
                hint="files in which each rank saved its part cannot be read: save with torch.distributed.checkpoint, "
                "or a full state dict of plain tensors",
            )


def _source(file: TorchFile, weights: Weights) -> Source:
    version = None if is_own(file.root) else _keys(file.root).get(LIGHTNING)
    dtypes = sorted({tensor.states["value"].dtype for tensor in weights.tensors.values()})
    detail = {"layout": "file" if version is None else "lightning", "value_dtype": " ".join(dtypes) or None}
    return Source(FAMILY, str(version or ""), Mesh({}), detail)


def _keys(root: Tree) -> Mapping[object, Tree]:
    return root if isinstance(root, Mapping) else {}
