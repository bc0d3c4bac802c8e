"""The index of a model in several files: ``{"metadata": {…}, "weight_map": {tensor: file}}``.

Written by transformers (modeling_utils.py, ``save_pretrained``) and by torch (distributed/checkpoint/hf_storage.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from ucp.errors import CorruptError, NotFoundError
from ucp.store import Entry, Store

from .documents import read_document

_AGAIN = "the folder mixes two saves, or a file is missing: copy it again from where it was written"


@dataclass(frozen=True, slots=True)
class Index:
    """Which file holds each tensor."""

    path: str
    files: Mapping[str, str]
    entry: Entry

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, in order of their names."""
        return tuple(sorted(set(self.files.values())))


def read_index(store: Store, path: str) -> Index:
    """The index at `path`; CorruptError if it is none or names a file outside its folder.

    NotFoundError if a file that it names is missing.
    """
    document, entry = read_document(store, path)
    where = f"{store.url}/{path}"
    held = document.get("weight_map")
    if not isinstance(held, dict) or not held:
        _damaged(where, "it has no weight_map")
    for name, file in held.items():
        if not isinstance(file, str) or not _plain(file):
            _damaged(where, f"{name} is said to lie in {file!r:.80}, which is no name of a file beside it")
    index = Index(path, held, entry)
    there = set(store.children())
    for file in index.paths:
        if file not in there:
            raise NotFoundError(f"{store.url}/{file}: no such file, and {path} names it", hint=_AGAIN)
    return index


def check_index(store: Store, index: Index, held: Mapping[str, list[str]]) -> None:
    """Set the index against the tensors that its files really hold (`held`, by file).

    CorruptError for a tensor that is missing, in another file, in two files, or not in the index.
    """
    where = f"{store.url}/{index.path}"
    found: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if name in found:
                _damaged(where, f"{name} is in two files, {found[name]} and {file}")
            found[name] = file
    for name, file in index.files.items():
        if name not in found:
            _damaged(where, f"{name} is not in {file}, nor in another of its files")
        if found[name] != file:
            _damaged(where, f"{name} is in {found[name]} and not in {file}")
    extra = [name for name in found if name not in index.files]
    if extra:
        _damaged(where, f"{found[extra[0]]} holds {extra[0]}, which it does not name ({len(extra)} such tensors)")


def _plain(file: str) -> bool:
    return bool(file) and file.isprintable() and "/" not in file and "\\" not in file and file not in (".", "..")


def _damaged(where: str, problem: str) -> NoReturn:
    raise CorruptError(f"{where}: {problem}", hint=_AGAIN)
