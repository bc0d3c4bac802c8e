"""The native form: what real ranks save is read back bit for bit, on any layout; nothing half-written is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crc32c import crc32c
from safetensors import safe_open

import ucp
from tests.format import native_jobs as jobs
from tests.support.gloo import forkserver, spawn
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UsageError
from ucp.format.documents import canonical
from ucp.format.native import CONVERTER
from ucp.format.native_manifest import BLOCK_BYTES, loads
from ucp.format.native_shard import Piece, shard_files
from ucp.layout import Box
from ucp.plan import Key
from ucp.run.convert import convert, prepare
from ucp.run.verify import verify
from ucp.store import open_store
from ucp.train.save import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with ``ckpt`` by FSDP2 on three ranks and ``truth.pt``, what torch itself gathered."""
    folder = tmp_path_factory.mktemp("native")
    spawn(jobs.save_fsdp, 3, str(folder))
    return folder


def assert_equals_truth(folder: Path) -> None:
    ckpt, truth = ucp.open(str(folder / "ckpt")), torch.load(folder / "truth.pt")
    assert {f"{name}[{state}]" for name in ckpt for state in ckpt[name]} == truth.keys()
    for label, expected in truth.items():
        name, _, state = label.removesuffix("]").rpartition("[")
        found = ckpt[name][state][...]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), label


def test_what_ranks_saved_is_what_torch_gathers(saved) -> None:
    assert_equals_truth(saved)
    ckpt = ucp.open(str(saved / "ckpt"))
    assert (ckpt.family, ckpt.step, dict(ckpt.ties)) == ("native", 2, {"head.weight": "embed.weight"})
    assert ckpt.mesh.axes == (("dp", 3),)
    kinds = {kind: {name for name in ckpt if ckpt[name].kind == kind} for kind in ("frozen", "buffer")}
    assert kinds == {
        "frozen": {"fixed"},
        "buffer": {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"},
    }
    groups = [(group.params, group.options["lr"], group.options["betas"]) for group in ckpt.param_groups]
    assert groups == [
        (("embed.weight", "up.weight", "down.weight"), 0.01, (0.9, 0.999)),
        (("scale", "up.bias", "norm.weight", "norm.bias", "down.bias"), 0.003, (0.8, 0.9)),
    ]
    assert ckpt.state["lr_scheduler"]["base_lrs"] == [0.01, 0.003]


def test_it_loads_into_another_number_of_ranks_bit_for_bit(saved) -> None:
    hyper_parameters = [(0.01, (0.9, 0.999)), (0.003, (0.8, 0.9))]
    assert spawn(jobs.load_fsdp, 2, str(saved)) == [([], hyper_parameters)] * 2


def test_it_converts_to_the_universal_form(saved, tmp_path) -> None:
    convert(str(saved / "ckpt"), str(tmp_path / "ckpt"))
    (tmp_path / "truth.pt").write_bytes((saved / "truth.pt").read_bytes())
    assert_equals_truth(tmp_path)
    assert ucp.open(str(tmp_path / "ckpt")).family == "universal"


def test_every_byte_of_every_shard_is_digested(saved) -> None:
    store = open_store(str(saved / "ckpt"))
    catalog = CONVERTER.read(store)
    for path in (entry.path for entry in store.entries("shards/")):
        spans = sorted((c.offset, c.offset + c.length) for c in catalog.checksums if c.object == path)
        assert [stop for _, stop in spans] == [start for start, _ in spans[1:]] + [store.entry(path).size]
        assert spans[0][0] == 0
    verdict = verify(catalog, store, deep=True)
    assert (verdict.ok, verdict.checksums) == (True, len(catalog.checksums))


def test_shards_are_plain_safetensors_files(saved) -> None:
    ckpt, names = ucp.open(str(saved / "ckpt")), []
    for path in sorted((saved / "ckpt" / "shards").iterdir()):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
            for key in file.keys():  # noqa: SIM118  not a mapping
                tensor, (label, _, start) = file.get_tensor(key), key.rpartition("@")
                name, _, state = label.removesuffix("]").rpartition("[")
                starts = [int(a) for a in start.split(",") if a]
                box = tuple(slice(a, a + n) for a, n in zip(starts, tensor.shape, strict=True))
                assert torch.equal(ckpt[name][state][...][box], tensor)
    assert len(names) == len(set(names)) > 50


def test_replicas_are_written_once(tmp_path) -> None:
    spawn(jobs.save_fsdp, 4, str(tmp_path), ("replicate", "shard"), (2, 2))
    assert_equals_truth(tmp_path)
    ckpt = ucp.open(str(tmp_path / "ckpt"))
    assert ckpt.mesh.axes == (("replicate", 2), ("shard", 2))
    written = data_bytes(tmp_path / "ckpt")
    assert sum(written) == ckpt.catalog.nbytes
    assert len(written) == 4
    assert max(written) < 0.3 * sum(written)


def data_bytes(checkpoint: Path) -> list[int]:
    manifest = loads((checkpoint / "ucp.json").read_bytes(), where="")
    return [shard.size - shard.data for shard in manifest.shards]


def test_what_all_ranks_hold_is_spread_over_them(tmp_path) -> None:
    spawn(jobs.save_replicated, 3, str(tmp_path))
    written = data_bytes(tmp_path / "ckpt")
    assert len(written) == 3
    assert max(written) - min(written) < 100
    ckpt = ucp.open(str(tmp_path / "ckpt"))
    assert torch.equal(ckpt["w4"]["value"][...], torch.arange(1000.0) + 4)
    assert torch.equal(ckpt["d"]["value"][...], torch.arange(7.0))
    assert torch.equal(ckpt["h"]["value"][...], torch.arange(5).to(torch.bfloat16))
    assert ckpt["b"]["value"][...].tolist() == [True, False]
    assert ckpt["n"]["value"][...].item() == 3
    assert ckpt["empty"]["value"][...].shape == (0, 4)


def test_ddp_is_saved_under_the_names_of_the_model_with_the_first_ranks_buffers(tmp_path) -> None:
    spawn(jobs.save_ddp, 2, str(tmp_path))
    assert_equals_truth(tmp_path)


def test_a_single_process_needs_no_group() -> None:
    model, url = jobs.build(), "memory://native/alone"
    optimizer = jobs.adam(model)
    jobs.train(model, optimizer, 0)
    save((model, optimizer), url, step=2)
    ckpt = ucp.open(url)
    for label, expected in jobs.truth(model, optimizer).items():
        name, _, state = label.removesuffix("]").rpartition("[")
        assert torch.equal(ckpt[name][state][...], expected)


@pytest.mark.parametrize(
    ("job", "kind", "told"),
    [
        (jobs.save_drifted, ConflictError, "w[value]: ranks 0 and 1 hold different values"),
        (jobs.save_to_nowhere, "StorageError", "shards"),
        (jobs.save_holed, FitError, "w[value]: elements 0..5 are in no fragment"),
        (jobs.save_disagreeing, ConflictError, "w: rank 1 has parameter, value float32[4]"),
        (jobs.save_strange_state, FitError, "w[odd]: a list"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_error_on_any_rank_is_an_error_on_all_and_there_is_no_checkpoint(tmp_path, job, kind, told) -> None:
    name = kind if isinstance(kind, str) else kind.__name__
    for raised, message in spawn(job, 2, str(tmp_path)):
        assert raised == name
        assert told in message
    assert not (tmp_path / "ckpt" / "ucp.json").exists()


def test_a_checkpoint_is_never_overwritten(tmp_path) -> None:
    raised = spawn(jobs.save_twice, 2, str(tmp_path))
    assert [kind for kind, _ in raised] == ["ConflictError"] * 2
    assert ucp.open(str(tmp_path / "ckpt"))["w"]["value"][...].tolist() == [1, 1, 1]


def test_a_killed_rank_leaves_no_checkpoint_and_the_others_say_so(tmp_path) -> None:
    context = forkserver()
    ranks = [context.Process(target=jobs.save_and_die, args=(rank, 3, str(tmp_path))) for rank in range(3)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, -9, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in (0, 2):
        assert "StorageError" in (tmp_path / f"raised-{rank}").read_text()
    with pytest.raises(NotFoundError):
        ucp.open(str(tmp_path / "ckpt"))


def test_only_ranks_can_write_it(saved, tmp_path) -> None:
    with pytest.raises(UsageError, match="written by the ranks of a job"):
        prepare(str(saved / "ckpt"), str(tmp_path / "other"), to="native")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy to damage."""
    for path in sorted((saved / "ckpt").rglob("*")):
        if path.is_file():
            made = tmp_path / "ckpt" / path.relative_to(saved / "ckpt")
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_bytes(path.read_bytes())
    return tmp_path / "ckpt"


def shard(checkpoint: Path, rank: int) -> Path:
    (path,) = (checkpoint / "shards").glob(f"rank-{rank:05}-0-*.safetensors")
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_in_a_shard_is_found_by_whoever_reads_it(copy) -> None:
    flip(shard(copy, 1), -3)
    states = {
        name: {state: torch.empty(t[state].shape, dtype=t[state].dtype) for state in t}
        for name, t in ucp.open(str(copy)).items()
    }
    with pytest.raises(CorruptError, match=r"rank-00001-0-\w+\.safetensors.*fail their crc32c"):
        ucp.load(states, str(copy))
    with pytest.raises(CorruptError, match=r"rank-00001-0-\w+\.safetensors"):
        convert(str(copy), str(copy.parent / "universal"))


@pytest.mark.parametrize("lost", ["missing", "shorter", "longer"])
def test_a_shard_that_is_not_whole_is_noticed_at_once(copy, lost) -> None:
    path = shard(copy, 2)
    data = path.read_bytes()
    path.unlink()
    if lost != "missing":
        path.write_bytes(data[:-1] if lost == "shorter" else data + b"\0")
    with pytest.raises(CorruptError, match=r"rank-00002-0-\w+\.safetensors: (missing|has)"):
        ucp.open(str(copy))


def test_without_its_manifest_it_is_no_checkpoint(copy) -> None:
    (copy / "ucp.json").unlink()
    with pytest.raises(NotFoundError, match="not a checkpoint"):
        ucp.open(str(copy))


@pytest.mark.parametrize("at", [3, 100, 2000, -2])
def test_a_flipped_bit_in_the_manifest_is_noticed(copy, at) -> None:
    flip(copy / "ucp.json", at)
    with pytest.raises((CorruptError, FitError)):
        ucp.open(str(copy))


def change(doc, path, value):
    *above, last = path
    for part in above:
        doc = doc[part]
    if callable(value):
        value = value(doc[last])
    doc[last] = value


def open_and_cover(url: str) -> None:
    ckpt = ucp.open(url)
    for name in ckpt:
        for state in ckpt.catalog.tensors[name].states:
            ckpt.catalog.cover(name, state)


FIRST = ("tensors", 2, "states", "value")
ROW = (*FIRST, "fragments", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), "2.0"),
        (("version",), "one"),
        (("format",), "universal"),
        (("step",), -1),
        (("shards", 0, "path"), "../../secret"),
        (("shards", 0, "path"), "/etc/passwd"),
        (("shards", 0, "path"), lambda path: path.replace("rank-00000", "rank-00001")),
        (("shards", 0, "data"), lambda data: data - 64),
        (("shards", 0, "size"), lambda size: size + 4),
        (("shards", 0, "header_crc32c"), 2**32),
        (("tensors", 2, "name"), "scale"),
        (("tensors", 2, "kind"), "secret"),
        ((*FIRST, "dtype"), "float31"),
        ((*FIRST, "dtype"), "float64"),
        ((*FIRST, "shape"), [2**62, 2**62]),
        ((*FIRST, "shape"), [13, 8]),
        ((*FIRST, "fragments"), []),
        ((*ROW, 0), 3),
        ((*ROW, 0), -1),
        ((*ROW, 0), True),
        ((*ROW, 1), 0),
        ((*ROW, 1), 2**40),
        ((*ROW, 1), lambda offset: offset + 4),
        ((*ROW, 2), [1, 0]),
        ((*ROW, 2), [-1, 0]),
        ((*ROW, 2), [0]),
        ((*ROW, 3), [5, 8]),
        ((*ROW, 3), [0, 7]),
        ((*ROW, 4), []),
        ((*ROW, 4), [-1]),
        ((*FIRST, "fragments"), lambda rows: [row[:3] for row in rows]),
        (("ties",), {"head.weight": "nothing"}),
        (("param_groups",), [{"params": [1], "options": {}}]),
        (("state",), {"lr_scheduler": {"$object": 3}}),
        (("blobs",), {"0": {"dtype": "uint8", "shape": [9], "offset": 0}}),
        (("source", "mesh"), [["dp", 0]]),
    ],
    ids=lambda value: "computed" if callable(value) else str(value)[:40],
)
def test_a_manifest_that_lies_is_refused(copy, path, value) -> None:
    doc = json.loads((copy / "ucp.json").read_text())
    change(doc, path, value)
    del doc["crc32c"]
    (copy / "ucp.json").write_text(json.dumps({**doc, "crc32c": crc32c(canonical(doc))}))
    with pytest.raises((CorruptError, FitError)) as caught:
        open_and_cover(str(copy))
    assert isinstance(caught.value, FitError) == (value in ("2.0", [1, 0]))


def test_a_rank_starts_a_new_file_after_so_many_bytes() -> None:
    pieces = [Piece(Key(f"w{i}", "value"), dtype, Box.whole((n,))) for i, (dtype, n) in enumerate(SIZES)]
    files = list(shard_files(7, pieces, shard_bytes=1000))
    assert [file.path for file in files] == [f"shards/rank-00007-{i}.safetensors" for i in range(len(files))]
    assert {piece for file in files for piece in file.pieces} == set(pieces)
    assert sum(len(file.pieces) for file in files) == len(pieces)
    for file in files:
        assert len(file.pieces) == 1 or file.size - len(file.header) <= 1000
        assert all(offset % 8 == 0 or piece.dtype != "int64" for piece, offset in file.offsets())


SIZES = [("float32", 100), ("bfloat16", 7), ("int64", 3), ("uint8", 5000), ("float32", 200), ("bool", 3), ("int64", 90)]


def test_large_pieces_have_a_digest_per_block(tmp_path) -> None:
    tensor = torch.arange(BLOCK_BYTES // 4 + 10, dtype=torch.float32)
    save({"w": tensor}, str(tmp_path))
    (checksum, last) = CONVERTER.read(open_store(str(tmp_path))).checksums[1:]
    assert (checksum.length, last.length) == (BLOCK_BYTES, 40)
    target = {"w": torch.empty_like(tensor)}
    ucp.load(target, str(tmp_path))
    assert torch.equal(target["w"], tensor)
