"""The rules that keep the house in order: imports run one way, start-up is light, concurrency has its rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import its own level and those before it.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"layout"}),
    frozenset({"lang"}),
    frozenset({"plan"}),
    frozenset({"tree"}),
    frozenset({"store", "container", "format", "catalog", "converter", "training", "zarr", "metrics"}),
    frozenset({"mapping"}),
    frozenset({"share"}),
    frozenset({"run"}),
    frozenset({"lifecycle"}),
    frozenset({"pipeline"}),
    frozenset({"lazy", "checkpoint"}),
    frozenset({"train"}),
    frozenset({"elastic"}),
    frozenset({"integrations"}),
    frozenset({"demo", "cli", "testing", "__main__"}),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
TOP = len(LEVELS) - 1
CONCURRENT = ("threading", "_thread", "multiprocessing", "concurrent", "asyncio", "torch.multiprocessing")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module(path: Path) -> str:
    """Dotted name of a source file as it is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("converters", "spec"):
        parts = ("ucp", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """First part of a dotted name below ``ucp``, such as ``plan``; "" for ``ucp`` itself, None for anything else."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "ucp" else None


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def upward(path: Path) -> list[str]:
    """Imports of a file of ``ucp/`` that lead to a later level."""
    own = room(module(path))
    limit = TOP if not own else LEVEL[own]
    targets = [name for name in imports(path) if inside(name, ("ucp",))]
    return [name for name in targets if LEVEL.get(room(name) or "", TOP) > limit]


def test_every_room_has_a_level() -> None:
    rooms = {room(module(path)) for path in sources("ucp")} - {""}
    assert rooms <= LEVEL.keys(), "give the new module its place in LEVELS"


@pytest.mark.parametrize("path", sources("ucp"), ids=module)
def test_imports_run_one_way(path: Path) -> None:
    assert not upward(path)


@pytest.mark.parametrize("path", sources("ucp"), ids=module)
def test_ucp_never_imports_a_converter_by_name(path: Path) -> None:
    assert not [name for name in imports(path) if inside(name, ("ucp.converters", "converters"))]


@pytest.mark.parametrize("path", sources("converters"), ids=module)
def test_converters_stay_below_the_command_line(path: Path) -> None:
    assert not [name for name in imports(path) if inside(name, ("ucp.cli", "converters", "tests"))]


@pytest.mark.parametrize("path", [*sources("ucp"), *sources("converters"), *sources("spec")], ids=module)
def test_threads_and_processes_only_in_their_rooms(path: Path) -> None:
    if room(module(path)) in ("run", "lifecycle", "store", "metrics", "train", "elastic", "demo", "testing"):
        return
    found = [name for name in imports(path) if inside(name, CONCURRENT)]
    # A progress line off the main thread is all the command line may start.
    assert not [name for name in found if room(module(path)) != "cli" or not inside(name, ("threading",))]


def test_the_rules_see_what_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "ucp" / "plan" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import ucp.run\nfrom .. import store\nfrom ..layout import Box\ndef f():\n    from ucp import open\n"
    )
    assert list(imports(file)) == ["ucp.run", "ucp.store", "ucp.layout.Box", "ucp.open"]
    assert upward(file) == ["ucp.run", "ucp.store", "ucp.open"]


HEAVY = ("torch", "zarr", "obstore", "botocore")
RUN_COMMAND = """
import sys
sys.argv[0] = "ucp"
from ucp.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("import ucp", []),
        (RUN_COMMAND, ["--help"]),
        (RUN_COMMAND, ["info", "--help"]),
        (RUN_COMMAND, ["demo", "--help"]),
    ],
    ids=["import ucp", "ucp --help", "ucp info --help", "ucp demo --help"],
)
def test_start_up_is_light(program: str, arguments: list[str]) -> None:
    report = f"\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program + report, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
