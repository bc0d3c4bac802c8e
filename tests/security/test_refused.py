"""Folders that lie: each is refused with a typed error that names the file, by every way in, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
from crc32c import crc32c

import ucp
from tests.fuzz.zips import pickle_of, records, with_pickle
from tests.security.folders import FAMILIES, Change, copied, edit_json, refused
from ucp.checkpoint import open_checkpoint
from ucp.converter import converter, read_catalog
from ucp.errors import ContentError, CorruptError, FitError, NotFoundError, UcpError, UnsafeError
from ucp.format.documents import root_digest
from ucp.store import open_store

ROOT_OF = {
    "bytecheckpoint": "global_step_5/model/.metadata",
    "dcp": ".metadata",
    "deepspeed-0": "global_step1/mp_rank_00_model_states.pt",
    "deepspeed-1": "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "deepspeed-3": "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "deepspeed-universal": "global_step1_universal/mp_rank_00_model_states.pt",
    "hf": "model.safetensors.index.json",
    "megatron-dp": ".metadata",
    "megatron-fully": "common.pt",
    "megatron-legacy": "mp_rank_00/model_optim_rng.pt",
    "native": "ucp.json",
    "torch": "checkpoint.pt",
    "universal": "zarr.json",
}
"""The file that each reader begins with."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_cut_anywhere(name: str, tmp_path: Path) -> None:
    """Some twenty lengths, the first and last bytes among them."""
    source = copied(name, tmp_path)
    file = source / ROOT_OF[name]
    data = file.read_bytes().rstrip()
    chance = random.Random(0)
    for length in [0, 1, 2, 7, 8, 9, len(data) - 1, len(data) - 2, *(chance.randrange(len(data)) for _ in range(12))]:
        file.write_bytes(data[:length])
        with pytest.raises(UcpError) as caught:
            open_checkpoint(str(source)).close()
        assert isinstance(caught.value, ContentError | NotFoundError), caught.value


@pytest.mark.parametrize(
    "content", [b"", bytes(1000), b"[" * 200_000, b"\x80\x02" + b"(" * 200_000, b"PK\x03\x04" * 99]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_content(name: str, content: bytes, tmp_path: Path) -> None:
    source = copied(name, tmp_path)
    (source / ROOT_OF[name]).write_bytes(content)
    refused(source, hint=False, kind=(ContentError, NotFoundError))  # type: ignore[arg-type]


def compressed(path: Path) -> None:
    """The same records, compressed; one of them unpacks to a hundred times its size."""
    held = records(path.read_bytes())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data + bytes(1 << 20))


def unfolds(path: Path) -> None:
    path.write_bytes(with_pickle(path.read_bytes(), b"\x80\x02N" + b"2\x86" * 40 + b"."))


def deep(path: Path) -> None:
    path.write_bytes(with_pickle(path.read_bytes(), b"\x80\x02)" + b"\x85" * 100_000 + b"."))


def runs_code(path: Path) -> None:
    data = pickle_of(path.read_bytes())
    path.write_bytes(with_pickle(path.read_bytes(), data[:2] + b"cos\nsystem\nX\x04\x00\x00\x00true\x85R0" + data[2:]))


def claims(count: int) -> Change:
    """A directory that says it has so many entries."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        struct.pack_into("<2H", data, len(data) - 14, count, count)
        path.write_bytes(data)

    return change


def twice(path: Path) -> None:
    held = list(records(path.read_bytes()).items())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held:
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(*held[-1])


TORCH: dict[str, tuple[Change, type[UcpError]]] = {
    "compressed records": (compressed, FitError),
    "a pickle that unfolds": (unfolds, CorruptError),
    "a deep pickle": (deep, CorruptError),
    "a pickle that runs code": (runs_code, UnsafeError),
    "more entries than it holds": (claims(65534), CorruptError),
    "a record twice": (twice, CorruptError),
}


@pytest.mark.parametrize("change", TORCH)
@pytest.mark.parametrize("name", [name for name, path in ROOT_OF.items() if path.endswith(".pt")])
def test_files_of_torch(name: str, change: str, tmp_path: Path) -> None:
    source = copied(name, tmp_path)
    TORCH[change][0](source / ROOT_OF[name])
    error = refused(source, Path(ROOT_OF[name]).name)
    assert type(error) is TORCH[change][1]


def test_carried_files_that_run_code(tmp_path: Path) -> None:
    source = copied("bytecheckpoint", tmp_path)
    runs_code(source / "global_step_5/extra_state/extra_state_rank_0.pt")
    assert type(refused(source, "extra_state_rank_0.pt")) is UnsafeError


def header(path: Path, change) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    text = change(document) or json.dumps(document)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])


def first(document: dict) -> dict:
    return next(row for name, row in document.items() if name != "__metadata__")


HEADERS = {
    "a huge shape": lambda d: first(d).update(shape=[1 << 59, 1 << 59]),
    "a product that overflows": lambda d: first(d).update(shape=[1 << 32, 1 << 32]),
    "a negative size": lambda d: first(d).update(shape=[-2, -2]),
    "an offset past the end": lambda d: first(d).update(data_offsets=[1 << 50, (1 << 50) + 16]),
    "an end before the start": lambda d: first(d).update(data_offsets=[64, 0]),
    "tensors that overlap": lambda d: d.update(z=first(d)),
    "a name twice": lambda d: json.dumps(d).replace("{", json.dumps(d)[:-1] + ",", 1),
    "a fraction as size": lambda d: first(d).update(shape=[2.0]),
    "nesting": lambda d: '{"a":' + "[" * 100_000,
    "a number of a million digits": lambda d: '{"a":' + "9" * 1_000_000 + "}",
}


@pytest.mark.parametrize("change", HEADERS)
def test_headers_of_safetensors(change: str, tmp_path: Path) -> None:
    source = copied("hf", tmp_path)
    header(source / "model-00001-of-00003.safetensors", HEADERS[change])
    assert type(refused(source, "model-00001-of-00003.safetensors")) is CorruptError


OUTSIDE = ["../x", "/etc/passwd", "C:\\x", "..\\x", "a\0b", "a" * 5000, ".", "..", "", "a/../../x", "x\n"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_indices_that_lead_elsewhere(path: str, tmp_path: Path) -> None:
    source = copied("hf", tmp_path)
    name = "model.safetensors.index.json"
    edit_json(source / name, lambda d: d["weight_map"].update(dict.fromkeys(d["weight_map"], path)))
    refused(source, kind=(CorruptError, NotFoundError))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", OUTSIDE)
def test_dcp_metadata_that_leads_elsewhere(path: str, tmp_path: Path) -> None:
    source = copied("dcp", tmp_path)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = path
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(source, kind=(UnsafeError, NotFoundError))  # type: ignore[arg-type]


def signed(source: Path, change) -> None:
    """Change the manifest of a universal checkpoint, and sign it as one who forges it would."""
    root = json.loads((source / "zarr.json").read_text())
    change(root["attributes"]["ucp"])
    root["attributes"]["ucp"]["crc32c"] = root_digest(root)
    (source / "zarr.json").write_text(json.dumps(root))


@pytest.mark.parametrize("path", OUTSIDE)
def test_manifests_that_lead_elsewhere(path: str, tmp_path: Path) -> None:
    source = copied("universal", tmp_path)
    signed(source, lambda m: m["tensors"][0]["arrays"][0].update(path=f"tensors/{path}" if path else path))
    assert type(refused(source, "zarr.json")) is CorruptError


@pytest.mark.parametrize("path", OUTSIDE)
def test_manifests_with_files_elsewhere(path: str, tmp_path: Path) -> None:
    source = copied("universal", tmp_path)
    signed(source, lambda m: m["files"].append({"path": path, "size": 1, "crc32c": 0}))
    assert type(refused(source, "" if "a" * 99 in path else "zarr.json", hint=False)) is CorruptError


@pytest.mark.parametrize("size", [0, 1, 3, 10_000])
def test_digests_of_another_length(size: int, tmp_path: Path) -> None:
    source = copied("universal", tmp_path)
    (source / "digests.bin").write_bytes(bytes(size))
    row = {"path": "digests.bin", "size": size, "crc32c": crc32c(bytes(size))}
    signed(source, lambda m: m.update(files=[row if f["path"] == "digests.bin" else f for f in m["files"]]))
    with pytest.raises(CorruptError, match=r"digests\.bin"):
        list(read_catalog(str(source))[0].checksums)


CONFIGS = {
    "layers": {"num_hidden_layers": 10**15},
    "negative layers": {"num_hidden_layers": -5},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**15},
    "heads": {"num_attention_heads": 0},
    "type": {"model_type": "../../../etc/passwd"},
    "type that is no text": {"model_type": ["llama"]},
    "code": {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True},
    "template": {"chat_template": "{% for x in range(10**9) %}{{ ''.__class__.__mro__ }}{% endfor %}"},
    "text": {"hidden_size": "4; import os"},
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configurations_are_only_read(change: str, tmp_path: Path) -> None:
    """What a configuration says may be refused, but takes no time and runs nothing; see test_no_code."""
    source = copied("hf", tmp_path)
    edit_json(source / "config.json", lambda d: d.update(CONFIGS[change]))
    with contextlib.suppress(FitError, CorruptError):
        converter("hf").sharded(open_store(str(source)))  # type: ignore[attr-defined]
    with ucp.open(str(source)) as found:
        assert len(list(found)) > 5
