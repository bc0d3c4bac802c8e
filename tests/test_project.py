"""The project as a whole: documented in full, tied to no machine, installable with what it says it needs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import ucp
import ucp.converters

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "bench", "changes", "converters", "docs", "spec", "tests", "ucp")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = sorted(path for folder in ("ucp", "converters") for path in (ROOT / folder).rglob("*.py"))

SUFFIXES = {".py", ".md", ".toml", ".txt", ".ucp", ".json", ".lark", ".cfg", ".yml", ".yaml"}
NAMES = {"run", "justfile", ".gitignore"}
MACHINE_PATH = re.compile(r"(?<![\w.$}~])/(?:home|root|work|Users|mnt|media)/\w|\b[A-Z]:\\\w", re.ASCII)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> list[Path]:
    """Every text file of the project; what CI makes is no part of it."""
    kept = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    made = [ROOT / ".ci" / name for name in ("venv", "demo", "servers")]
    return sorted(path for path in kept if _is_text(path) and not any(path.is_relative_to(folder) for folder in made))


def _is_text(path: Path) -> bool:
    return path.is_file() and (path.suffix in SUFFIXES or path.name in NAMES)


@pytest.mark.parametrize("path", texts(), ids=relative)
def test_no_path_of_a_machine(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{number}: {line}" for number, line in lines if MACHINE_PATH.search(line)]


def public_definitions(path: Path) -> Iterator[tuple[str, str | None]]:
    """Name and docstring of a module, and of its public functions and classes."""
    tree = ast.parse(path.read_text(), str(path))
    yield relative(path), ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node)


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_modules_functions_and_classes_are_documented(path: Path) -> None:
    assert not [name for name, text in public_definitions(path) if not text]


def modules() -> list[str]:
    found = [ucp, ucp.converters]
    names = {info.name for package in found for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(name for name in names if not name.endswith(".__main__"))


@pytest.mark.parametrize("name", modules())
def test_public_methods_are_documented(name: str) -> None:
    """A method that keeps the contract of the one it overrides inherits its documentation."""
    with warnings.catch_warnings(action="ignore"):  # frameworks that an adapter imports warn of themselves
        module = importlib.import_module(name)
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    own = [value for value in classes if value.__module__ == name and not value.__name__.startswith("_")]
    assert not [f"{value.__name__}.{method}" for value in own for method in undocumented(value)]


def undocumented(cls: type) -> list[str]:
    methods = {
        key: value
        for key, value in vars(cls).items()
        if not key.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod))
    }
    return [key for key in methods if not inspect.getdoc(getattr(cls, key))]


def requirements() -> set[str]:
    table = PROJECT["project"]
    lines = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    return {canonical(re.split(r"[<>=!~;\[ ]", line)[0]) for line in lines} - {table["name"]}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert not requirements() - {canonical(name) for name in pins}
    assert not [name for name, version in pins.items() if "+" in version], "local versions exist on one machine only"


def test_every_converter_is_registered_and_loads() -> None:
    declared = PROJECT["project"]["entry-points"]["ucp.converters"]
    found = {point.name: point for point in entry_points(group="ucp.converters")}
    assert declared.items() <= {name: point.value for name, point in found.items()}.items(), (
        "install again: pip install -e ."
    )
    for name in declared:
        assert found[name].load() is not None


def test_changelog_fragments_have_a_known_kind() -> None:
    kinds = "|".join(kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"])
    name = re.compile(rf"(?:\d+|\+[a-z0-9-]+)\.(?:{kinds})(?:\.\d+)?\.md")
    files = {path.name for path in (ROOT / "changes").iterdir()} - {"README.md"}
    assert not [file for file in files if not name.fullmatch(file)]


def test_every_folder_of_tests_is_a_package() -> None:
    """Else ``tests/converters/deepspeed`` would be imported as ``deepspeed``, and stand in for the real one."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    inner = {above for folder in folders for above in folder.parents if ROOT / "tests" in (above, *above.parents)}
    assert not [str(folder) for folder in sorted(folders | inner) if not (folder / "__init__.py").exists()]
