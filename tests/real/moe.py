"""What the tests of native mixtures of experts share."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.converters.deepspeed.oracle import load_truth
from tests.support.moe_case import CASES, MoeCase
from tests.support.moe_job import run_jobs
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import UcpError
from ucp.store import open_store

UNREADABLE = "auto_z0_fp32_ep2dp2"

Moe = Callable[[str], Path]


@pytest.fixture(scope="session")
def moe(real_cases_folder: Path, request: pytest.FixtureRequest) -> Moe:
    """Call with a case's name to get its folder.

    Each is made once per session; the first call makes those that selected tests have as a parameter, in one process.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test reads what the real deepspeed writes")
    calls = [
        getattr(item, "callspec", None) for item in request.session.items if "moe" in getattr(item, "fixturenames", ())
    ]
    named = {call.params.get("name") for call in calls if call is not None}

    def folder(name: str) -> Path:
        path = real_cases_folder / f"moe-{name}"
        with FileLock(real_cases_folder / "moe.lock"):
            if not (path / "case.json").exists():
                make(real_cases_folder, {name, *named} & CASES.keys())
        return path

    return folder


def make(folder: Path, names: Iterable[str]) -> None:
    missing = {path: CASES[n] for n in sorted(names) if not ((path := folder / f"moe-{n}") / "case.json").exists()}
    for path in missing:
        shutil.rmtree(path, ignore_errors=True)
    run_jobs(missing)


def read(folder: Path, **options: Any) -> Catalog:
    return CONVERTER.read(open_store(str(folder / "ckpt")), **options)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return found


def truth_of(folder: Path, case: MoeCase) -> dict[str, Any]:
    truth = load_truth(folder / "truth.safetensors")
    plain = (case.stage == 0 and case.dtype == "fp32") or case.stage == 3
    return {key: held for key, held in truth.items() if not (plain and key.startswith("lowp/"))}


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)


def refused(folder: Path, kind: type[UcpError], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        read(folder)
    assert error.value.hint
