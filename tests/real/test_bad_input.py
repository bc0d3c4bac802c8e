"""Real checkpoints, broken: every fault is an error of its kind that names the file and the remedy, in Python and on
the command line; sources are not touched, nothing is run, and nothing half-made is taken for a checkpoint."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.real.conftest import DeepSpeedCases
from tests.real.hostile import (
    Exploit,
    contents,
    digests,
    flip,
    found_by_verify,
    no_checkpoint,
    pickle_of,
    poisoned,
    records,
    refused,
    repair,
    storages,
    ucp,
    with_pickle,
)
from tests.support.cases import CASES
from ucp.checkpoint import open_checkpoint
from ucp.converter import read_catalog
from ucp.errors import (
    ConflictError,
    ContentError,
    CorruptError,
    FitError,
    NotFoundError,
    UcpError,
    UnsafeError,
    UsageError,
)
from ucp.run.convert import convert
from ucp.run.verify import verify

Z1, Z3, PIPELINE = CASES["z1_bf16_dp4"], CASES["z3_bf16_dp2"], CASES["pp2_z1_bf16_dp2"]
ZERO_0 = CASES["z0_fp32_dp2"]
LATER = Z1.replace(name="z1_bf16_dp4_later", steps=4)
NARROW = Z1.replace(name="z1_bf16_dp2_narrow", world=2)
UNSCHEDULED = Z1.replace(name="z1_bf16_dp4_unscheduled", scheduler=False)
UNSCHEDULED_LATER = UNSCHEDULED.replace(name="z1_bf16_dp4_unscheduled_later", steps=4)
RANK1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
SHARD1 = "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def made(deepspeed_cases: DeepSpeedCases) -> dict[str, Path]:
    return deepspeed_cases([Z1, Z3, PIPELINE, ZERO_0, LATER, NARROW, UNSCHEDULED, UNSCHEDULED_LATER])


@pytest.fixture
def take(made: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's save root, to be broken."""

    def copy(case: object, name: str = "source") -> Path:
        return Path(shutil.copytree(made[case.name] / "ckpt", tmp_path / name))

    return copy


def file(root: Path, name: str) -> Path:
    (path,) = root.glob(f"*/{name}")
    return path


def replace(root: Path, other: Path, *names: str) -> None:
    """Put files of another checkpoint in the place of those of the same name."""
    folder = next(root.glob("global_step*"))
    for name in names:
        shutil.copy(file(other, name), folder / name)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Z1, RANK1),
        (Z1, MODEL),
        (Z3, SHARD1),
        (Z3, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (PIPELINE, "layer_02-model_states.pt"),
        (PIPELINE, "mp_rank_01_model_states.pt"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_missing_file(take, tmp_path, case, name) -> None:
    root = take(case)
    file(root, name).unlink()
    refused(root, NotFoundError, name, folder=tmp_path)


OPTIMIZERS = tuple(RANK1.replace("rank_1", f"rank_{rank}") for rank in range(4))


@pytest.mark.parametrize(
    ("names", "told"), [((RANK1,), RANK1), (OPTIMIZERS, MODEL), ((MODEL,), MODEL)], ids=["rank", "ranks", "model"]
)
def test_files_of_two_steps(take, made, tmp_path, names, told) -> None:
    root = take(Z1)
    replace(root, made[LATER.name] / "ckpt", *names)
    refused(root, ConflictError, "different steps" if told == MODEL else "differ", told, folder=tmp_path)


@pytest.mark.parametrize("names", [OPTIMIZERS, (MODEL,)], ids=["ranks", "model"])
def test_files_of_two_steps_where_no_schedule_tells(take, made, tmp_path, names) -> None:
    """Steps alone may differ for honest reasons; the low-precision copies then tell."""
    root = take(UNSCHEDULED)
    replace(root, made[UNSCHEDULED_LATER.name] / "ckpt", *names)
    notes = open_checkpoint(str(root)).notes
    assert any("steps" in note for note in notes)
    refused(root, ConflictError, "weight", folder=tmp_path, opens=True)


def test_files_of_another_world_size(take, made, tmp_path) -> None:
    root = take(Z1)
    replace(root, made[NARROW.name] / "ckpt", RANK1)
    refused(root, ConflictError, RANK1, "partition counts", folder=tmp_path)


def cut_points(path: Path) -> dict[str, int]:
    (_, pickled), *_ = [record for record in records(path) if record[0].filename.endswith("data.pkl")]
    start, size = storages(path)[-1]
    data = path.read_bytes()
    ends = {"nothing": 0, "header": 20, "pickle": pickled + 100, "data": start + size // 2}
    return ends | {"directory": data.rindex(b"PK\x01\x02") + 30, "last byte": len(data) - 1}


@pytest.mark.parametrize("where", ["nothing", "header", "pickle", "data", "directory", "last byte"])
@pytest.mark.parametrize("name", [RANK1, MODEL])
def test_a_truncated_file(take, tmp_path, name, where) -> None:
    root = take(Z1)
    path = file(root, name)
    path.write_bytes(path.read_bytes()[: cut_points(path)[where]])
    refused(root, CorruptError, name, folder=tmp_path, command=where in ("pickle", "directory"))


def equal_in_all(universal: Path, expected: dict[str, bytes]) -> bool:
    return contents(universal) == expected


@pytest.fixture(scope="module")
def clean(made, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each case gives when nothing is broken."""
    folder = tmp_path_factory.mktemp("clean")
    for case in (Z1, Z3):
        convert(str(made[case.name] / "ckpt"), str(folder / case.name))
    return {case.name: contents(folder / case.name) for case in (Z1, Z3)}


def blamed(error: UcpError, *names: str) -> bool:
    """Whether the error names one of these; it must."""
    assert any(name in error.message for name in names), error
    return True


def check_flip(root: Path, path: Path, offset: int, bit: int, destination: Path, expected: dict[str, bytes]) -> bool:
    """Whether a flipped bit was noticed; if it was not, nothing that was read may differ."""
    flip(path, offset, bit)
    try:
        catalog, store = read_catalog(str(root))
    except (ContentError, FitError) as error:  # FitError: the bit that says a record is compressed, or encrypted
        return blamed(error, path.name)
    findings = verify(catalog, store, deep=True, workers=1).findings
    try:
        convert(str(root), str(destination), workers=1)
    except ContentError as error:
        no_checkpoint(destination)
        return blamed(error, path.name, "copy in") and any(path.name in finding.where for finding in findings)
    assert equal_in_all(destination, expected), (path, offset)
    return bool(findings)


def flips(take, clean, tmp_path, case, positions: Callable[[Path], list[int]]) -> list[tuple[str, int, bool]]:
    rng, root = random.Random(3), take(case)
    found = []
    for path in sorted(root.glob("*/*.pt")):
        for offset in positions(path):
            bit = rng.randrange(8)
            destination = tmp_path / f"{path.stem}-{offset}"
            found.append(
                (path.name, offset, check_flip(root, path, offset, bit, destination, clean[case.name])),
            )
            flip(path, offset, bit)
            shutil.rmtree(destination, ignore_errors=True)
    return found


def in_every_storage(path: Path) -> list[int]:
    """First byte, last byte (padding, where there is some) and one between."""
    rng = random.Random(path.name)
    held = storages(path)
    chosen = held if len(held) < 6 else rng.sample(held, 6)
    return [start + at for start, size in chosen for at in {0, rng.randrange(size), size - 1}]


def anywhere(path: Path) -> list[int]:
    """Headers, pickle, gaps, directory: any byte of the file, storages seldom."""
    rng, size = random.Random(path.name), path.stat().st_size
    ends = [rng.randrange(200), size - 1 - rng.randrange(60), size - rng.randrange(100, 2000)]
    (_, pickled), *_ = [record for record in records(path) if record[0].filename.endswith("data.pkl")]
    return sorted({*ends, pickled + rng.randrange(2000), *rng.sample(range(size), 3)})


def test_flipped_bits_in_storages(take, clean, tmp_path) -> None:
    """Every byte of a storage is under a checksum, padding too."""
    hits = flips(take, clean, tmp_path, Z1, lambda path: in_every_storage(path)[:6])
    assert [(name, offset) for name, offset, noticed in hits if not noticed] == []


def test_flipped_bits_anywhere_else(take, clean, tmp_path) -> None:
    hits = flips(take, clean, tmp_path, Z1, anywhere)
    assert sum(noticed for *_, noticed in hits) > len(hits) // 2


@pytest.mark.slow
@pytest.mark.parametrize("case", [Z1, Z3], ids=lambda case: case.name)
def test_flipped_bits_in_every_storage_of_every_file(take, clean, tmp_path, case) -> None:
    def everywhere(path: Path) -> list[int]:
        return [start + at for start, size in storages(path) for at in {0, size // 3, size - 1}]

    assert [hit[:2] for hit in flips(take, clean, tmp_path, case, everywhere) if not hit[2]] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [Z1, Z3], ids=lambda case: case.name)
def test_flipped_bits_at_random(take, clean, tmp_path, case) -> None:
    def many(path: Path) -> list[int]:
        return random.Random(path.name).sample(range(path.stat().st_size), 60)

    flips(take, clean, tmp_path, case, many)


def test_a_flipped_bit_on_the_command_line(take, tmp_path) -> None:
    root = take(Z1)
    path = file(root, RANK1)
    held = (fragment.extent for pieces in read_catalog(str(root))[0].fragments.values() for fragment in pieces)
    flip(path, next(extent.offset for extent in held if RANK1 in extent.object))
    refused(root, CorruptError, RANK1, folder=tmp_path, opens=True)
    assert [(f["kind"], f["where"]) for f in found_by_verify(root)] == [("checksum", f"{path.parent.name}/{RANK1}")]


def test_flipped_bits_in_steps_of_zero_0(take, tmp_path) -> None:
    """Steps are read when the checkpoint is opened: a wrong one is an error, or its checksum tells the right one."""
    root = take(ZERO_0)
    path = file(root, MODEL)
    steps = [start for start, size in storages(path) if size == 4]
    assert len(steps) > 20
    found = 0
    for start in (steps[1], steps[2], steps[-1]):
        flip(path, start + 3, 1)
        try:
            catalog, store = read_catalog(str(root), frozen="adapter.*")
        except CorruptError as error:
            found += blamed(error, MODEL)
        else:
            assert {t.scalars["step"].value for t in catalog.tensors.values() if "step" in t.scalars} == {3.0}
            assert verify(catalog, store, deep=True).findings
        flip(path, start + 3, 1)
    assert found


def test_a_low_precision_copy_that_contradicts(take, tmp_path) -> None:
    """No checksum shows it: the sign of one weight is another, and the file agrees with itself."""
    root = take(Z1)
    path = file(root, MODEL)
    held = read_catalog(str(root))[0].witnesses["blocks.0.up.weight"][1][0].extent
    flip(path, held.offset + 1, 7)
    repair(path)
    refused(root, ConflictError, "blocks.0.up.weight", folder=tmp_path, opens=True)
    kinds = {(finding["kind"], finding["where"]) for finding in found_by_verify(root)}
    assert kinds == {("low-precision-copy", "blocks.0.up.weight[value]")}


def foreign(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "random bytes":
        path.write_bytes(random.Random(1).randbytes(5000))
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>\n")
    elif kind == "empty":
        path.touch()
    elif kind == "zip":
        shutil.make_archive(str(path.with_suffix("")), "zip", Path(__file__).parent, "conftest.py")
        path.with_suffix(".zip").rename(path)
    elif kind == "torch file":
        torch.save([1, 2, 3], path)
    elif kind == "tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.mkdir()
        (path / "something").touch()


@pytest.mark.parametrize("kind", ["random bytes", "text", "empty", "zip", "torch file", "tensors", "folder"])
@pytest.mark.parametrize("name", [RANK1, MODEL])
def test_a_foreign_file(take, tmp_path, name, kind) -> None:
    root = take(Z1)
    foreign(file(root, name), kind)
    expected = NotFoundError if kind == "folder" else CorruptError
    refused(root, expected, name, folder=tmp_path, command=kind in ("text", "tensors", "folder"))


@pytest.mark.parametrize("case", [Z1, Z3, PIPELINE], ids=lambda case: case.name)
def test_every_kind_of_file_may_be_an_attack(take, tmp_path, case) -> None:
    root, sentinel = take(case), tmp_path / "sentinel"
    assert pickle.loads(poisoned(pickle.dumps({"w": 1}, protocol=2), sentinel)) == {"w": 1}
    assert sentinel.exists(), "the attack works on a reader that runs pickles"
    sentinel.unlink()
    kinds = {path.name.split("_rank")[0][:9]: path for path in sorted(root.glob("*/*.pt"))}
    for number, path in enumerate(kinds.values()):
        honest = path.read_bytes()
        with_pickle(path, poisoned(pickle_of(path), sentinel))
        refused(root, UnsafeError, path.name, "system", folder=tmp_path, command=number == 0)
        path.write_bytes(honest)
    assert not sentinel.exists()
    open_checkpoint(str(root)).close()


def test_an_attack_as_optimizer_state(take, tmp_path) -> None:
    root, sentinel = take(Z1), tmp_path / "sentinel"
    state = {0: {"step": torch.tensor(3.0), "exp_avg": Exploit(sentinel)}}
    inner = {"base_optimizer_state": {"state": state, "param_groups": []}, "zero_stage": 1}
    torch.save({"optimizer_state_dict": inner}, file(root, RANK1))
    refused(root, UnsafeError, RANK1, "system", folder=tmp_path)
    assert not sentinel.exists()


class Unknown:
    """A class that no checkpoint knows, with state that looks like a tensor's."""

    def __init__(self) -> None:
        self.shape = (2, 2)


def test_an_object_of_an_unknown_class_as_optimizer_state(take, tmp_path) -> None:
    """Not an attack that we know: it is carried as data, or refused as no tensor, and never built."""
    root = take(Z1)
    torch.save({"optimizer_state_dict": Unknown(), "ds_version": "0.19.8"}, file(root, RANK1))
    refused(root, CorruptError, RANK1, folder=tmp_path, command=False)


LATEST: dict[str, tuple[bytes, type[UcpError], str]] = {
    "empty": (b"", CorruptError, "latest"),
    "nowhere": (b"global_step999", NotFoundError, "global_step999"),
    "upwards": (b"../..", CorruptError, "latest"),
    "upwards inside": (b"global_step3/../..", CorruptError, "latest"),
    "absolute": (b"/etc", CorruptError, "latest"),
    "NUL": (b"global_step3\0", CorruptError, "latest"),
    "binary": (bytes(range(256)), CorruptError, "latest"),
    "endless": (b"a" * 100_000, CorruptError, "latest"),
}


@pytest.mark.parametrize("content", LATEST)
def test_latest(take, tmp_path, content) -> None:
    root = take(Z1)
    text, kind, name = LATEST[content]
    (root / "latest").write_bytes(text)
    error = refused(root, kind, name, folder=tmp_path, command=content in ("empty", "nowhere", "upwards"))
    assert "tag" in str(error.hint)


def test_no_latest(take, tmp_path) -> None:
    root = take(Z1)
    (root / "latest").unlink()
    open_checkpoint(str(root)).close()
    shutil.copytree(next(root.glob("global_step*")), root / "global_step9")
    error = refused(root, NotFoundError, "no `latest`", folder=tmp_path)
    assert "global_step3" in str(error.hint)
    assert "global_step9" in str(error.hint)
    with pytest.raises(UsageError):
        open_checkpoint(str(root), tag="../source/global_step3")


@pytest.mark.parametrize("what", ["nothing", "empty", "a file", "other things"])
def test_no_checkpoint_at_all(tmp_path, what) -> None:
    there = tmp_path / "there"
    if what == "a file":
        there.write_text("hello")
    elif what != "nothing":
        there.mkdir()
        if what == "other things":
            (there / "model.safetensors").write_bytes(b"\0" * 100)
    error = ucp("convert", there, tmp_path / "new", exit_code=6 if what == "other things" else 3)
    assert str(there) in error
    assert digests(tmp_path).keys() <= {"there", "there/model.safetensors"}
