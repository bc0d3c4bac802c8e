"""Which folder is read, and what is said where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.converters.deepspeed.fake import Fake, write
from ucp.catalog import Catalog
from ucp.converter import converter
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import ConflictError, CorruptError, NotFoundError, UsageError
from ucp.store import open_store

FAKE = Fake([{"w": (3, 4)}, {"b": (3,)}])


def read(root: Path, **options: object) -> Catalog:
    return CONVERTER.read(open_store(str(root)), **options)


def found(root: Path) -> bool:
    return CONVERTER.detect(open_store(str(root)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A save root with two tags; ``latest`` names the second."""
    write(FAKE.with_(step=1.0), tmp_path / "global_step1")
    write(FAKE.with_(step=2.0), tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step2\n")
    (tmp_path / "zero_to_fp32.py").write_text("print()")
    return tmp_path


def test_it_is_registered() -> None:
    assert converter("deepspeed") is CONVERTER


def test_latest_names_the_tag(root: Path) -> None:
    assert found(root)
    catalog = read(root)
    assert catalog.step == 2
    assert all(path.startswith("global_step2/") for path in catalog.objects)
    assert catalog.source.detail["tag"] == "global_step2"


def test_a_tag_can_be_given(root: Path) -> None:
    assert read(root, tag="global_step1").step == 1


def test_the_tag_folder_itself_can_be_opened(root: Path) -> None:
    assert found(root / "global_step1")
    catalog = read(root / "global_step1")
    assert catalog.step == 1
    assert "mp_rank_00_model_states.pt" in catalog.objects


def test_the_only_tag_is_read_without_latest(root: Path) -> None:
    (root / "latest").unlink()
    shutil.rmtree(root / "global_step1")
    assert found(root)
    assert read(root).step == 2


def test_several_tags_and_no_latest(root: Path) -> None:
    (root / "latest").unlink()
    with pytest.raises(NotFoundError) as error:
        read(root)
    assert "global_step1 global_step2" in str(error.value.hint)


def test_latest_that_names_a_missing_tag(root: Path) -> None:
    (root / "latest").write_text("global_step3")
    assert found(root)
    with pytest.raises(NotFoundError, match="`latest` names 'global_step3'") as error:
        read(root)
    assert "global_step1" in str(error.value.hint)


@pytest.mark.parametrize("text", [b"", b"../x", b"/x", b"\xff\x00", b"x" * 5000])
def test_latest_that_holds_no_tag(root: Path, text: bytes) -> None:
    (root / "latest").write_bytes(text)
    assert found(root)
    with pytest.raises(CorruptError, match="latest"):
        read(root)


def test_a_tag_that_is_not_there(root: Path) -> None:
    with pytest.raises(NotFoundError, match="global_step9"):
        read(root, tag="global_step9")
    with pytest.raises(UsageError):
        read(root, tag="../outside")


def test_a_folder_with_the_recovery_script_alone(tmp_path: Path) -> None:
    (tmp_path / "zero_to_fp32.py").write_text("print()")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert found(tmp_path)
    with pytest.raises(NotFoundError, match="zero_to_fp32"):
        read(tmp_path)


def test_other_folders_are_not_ours(tmp_path: Path) -> None:
    assert not found(tmp_path)
    assert not found(tmp_path / "missing")
    (tmp_path / "latest").write_text("iter_5")
    (tmp_path / "iter_5").mkdir()
    (tmp_path / "iter_5" / "model.safetensors").write_bytes(b"")
    assert not found(tmp_path)


def test_a_universal_folder_of_deepspeed_is_not_ours(root: Path) -> None:
    folder = root / "global_step2_universal"
    (folder / "zero").mkdir(parents=True)
    shutil.copy(root / "global_step2" / "mp_rank_00_model_states.pt", folder)
    assert not found(folder)
    assert read(root).step == 2


@pytest.mark.parametrize("prefix", ["fp16_", "", "bf16_"])
def test_every_prefix_of_optimizer_files(root: Path, prefix: str) -> None:
    folder = root / "global_step2"
    for path in list(folder.glob("bf16_*")):
        path.rename(folder / path.name.replace("bf16_", prefix))
    assert read(root).step == 2


def test_names_without_an_underscore_as_old_versions_wrote_them(root: Path) -> None:
    folder = root / "global_step2"
    for path in list(folder.glob("*optim_states.pt")):
        path.rename(folder / path.name.replace("00_optim", "00optim"))
    assert read(root).step == 2


def test_two_files_of_one_rank(root: Path) -> None:
    folder = root / "global_step2"
    source = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(source, folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert found(root)
    with pytest.raises(CorruptError, match="both files of the same rank"):
        read(root)


def test_model_files_of_two_stages(root: Path) -> None:
    folder = root / "global_step2"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ConflictError, match="ZeRO 3"):
        read(root)


@pytest.mark.parametrize(
    "name",
    ["layer_0_expert_3_mp_rank_00_model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"],
)
def test_files_of_experts_that_the_model_does_not_have(root: Path, name: str) -> None:
    folder = root / "global_step2"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / name)
    with pytest.raises(ConflictError, match=name):
        read(root)


def test_an_unknown_option(root: Path) -> None:
    with pytest.raises(UsageError, match="color"):
        read(root, color="red")


def test_a_store_in_memory(root: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/deepspeed-reader", recursive=True)
    store = open_store("memory://deepspeed-reader")
    assert CONVERTER.detect(store)
    assert CONVERTER.read(store).step == 2
    memory.rm("/deepspeed-reader", recursive=True)
