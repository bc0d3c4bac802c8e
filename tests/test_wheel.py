"""The wheel holds every package and data file, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = {"ucp": "ucp", "converters": "ucp/converters", "spec": "ucp/spec"}
KINDS = {".py", ".typed", ".ucp", ".md", ".json", ".lark"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, built from a copy so that the checkout stays clean."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(pip, check=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out


def test_every_file_is_in_it(site: Path) -> None:
    for folder, target in SHIPPED.items():
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
        assert files
        assert not [file for file in files if not (site / target / file).is_file()]


def test_nothing_else_is_in_it(site: Path) -> None:
    assert {path.name for path in site.iterdir() if path.is_dir() and path.suffix != ".dist-info"} == {"ucp"}


def test_it_imports_from_there(site: Path) -> None:
    program = "import ucp, ucp.converters, ucp.spec; print(ucp.__file__, ucp.converters.__file__, ucp.spec.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=site, env=environment, capture_output=True, text=True, check=True
    )
    folders = [site / "ucp", site / "ucp/converters", site / "ucp/spec"]
    assert done.stdout.split() == [str(folder / "__init__.py") for folder in folders]
