"""The converter of the native distributed form: reads what `ucp.train.save` wrote, each rank its own shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog, ParamGroup, Source
from ucp.converter import Target
from ucp.errors import UsageError
from ucp.format import parse
from ucp.format.checksums import listed
from ucp.format.leaves import LeafReader
from ucp.format.native_manifest import FAMILY, ROOT, NativeManifest, loads
from ucp.format.pool import with_shared
from ucp.format.state import Decoder
from ucp.plan import Key
from ucp.store import Store


@dataclass(frozen=True, slots=True)
class NativeConverter:
    """Reads family ``native``. Only a running job can write it."""

    family: str = FAMILY

    def files(self, store: Store) -> tuple[str, ...]:
        """The manifest names all others."""
        return (ROOT,)

    def detect(self, store: Store) -> bool:
        """Whether there is a manifest; without one nothing is a checkpoint."""
        return store.exists(ROOT)

    def read(self, store: Store, **options: Any) -> Catalog:
        """The catalog: the manifest and one listing are read, no shard is opened.

        NotFoundError if there is no manifest, FitError for a newer major version, CorruptError for whatever is damaged,
        missing, of another size, or contradicts itself.
        """
        if options:
            raise UsageError(f"a native checkpoint is read without options, not {' '.join(sorted(options))}")
        where = f"{store.url}/{ROOT}"
        manifest = loads(store.read(ROOT), where=where)
        store = with_shared(store, (shard.path for shard in manifest.shards))
        checksums = tuple(manifest.checksums())
        decoder = Decoder(manifest.table(where=where), LeafReader(store, checksums))
        specs = {Key(tensor.name, state): spec for tensor in manifest.tensors for state, spec in tensor.states.items()}
        return Catalog(
            url=store.url,
            source=_source(manifest),
            tensors={tensor.name: tensor for tensor in manifest.tensors},
            fragments={
                key: tuple(part.fragment(specs[key].dtype) for part in parts) for key, parts in manifest.parts.items()
            },
            step=manifest.step,
            ties=manifest.ties,
            param_groups=tuple(_group(doc, decoder, where) for doc in manifest.groups),
            state={name: decoder.decode(value, where=name) for name, value in manifest.state.items()},
            checksums=checksums,
            objects=_objects(store, manifest),
        )

    def mounted(self, store: Store, catalog: Catalog) -> Store:
        """`store`, where `catalog` lies, with what that shares with other checkpoints of its run."""
        return with_shared(store, catalog.objects)

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Target:
        """UsageError: there is no rank here whose shards could be written."""
        raise UsageError("the native form is written by the ranks of a job, not by a conversion", hint="--to universal")


def _source(manifest: NativeManifest) -> Source:
    source = manifest.source
    about = {"id": manifest.id, "created_by": manifest.created_by, "framework": f"{source.family} {source.version}"}
    return Source(FAMILY, "1.0", source.mesh, {**about, **source.detail})


def _group(doc: dict[str, Any], decoder: Decoder, where: str) -> ParamGroup:
    options = decoder.decode(parse.member(doc, "options", dict, where), where=where)
    return ParamGroup(
        tuple(parse.items(doc, "params", str, where)), parse.member({"options": options}, "options", dict, where)
    )


def _objects(store: Store, manifest: NativeManifest) -> dict[str, tuple[int, str]]:
    """Size and fingerprint of every object; CorruptError if one is missing or has another size."""
    wanted = {shard.path: shard.size for shard in manifest.shards}
    wanted |= {file.path: file.size for file in manifest.files.values()}
    return listed(store, wanted, root=ROOT)


CONVERTER = NativeConverter()
