"""Files of torch.save around a pickle of any kind, made without torch, with sums that are right."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping


def torch_zip(pickle: bytes, storages: Mapping[str, bytes]) -> bytes:
    """A zip in the shape of torch's."""
    records = {"archive/data.pkl": pickle, "archive/version": b"3\n"}
    return _zip(records | {f"archive/data/{key}": data for key, data in storages.items()})


def with_pickle(file: bytes, pickle: bytes) -> bytes:
    """The torch file `file` with another pickle."""
    return _zip({name: pickle if name.endswith("/data.pkl") else data for name, data in records(file).items()})


def pickle_of(file: bytes) -> bytes:
    """The pickle of a torch file."""
    return next(data for name, data in records(file).items() if name.endswith("/data.pkl"))


def records(file: bytes) -> dict[str, bytes]:
    """Everything in a zip."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(records: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()
