"""What the documentation points at exists, its install lines are the ones that work, and its examples run."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from tests.docs import scene, served
from tests.docs.pages import NEEDS_DEEPSPEED, NOT_RUN, Block, blocks
from tests.docs.play import play
from tests.support.deepspeed_job import job_environment
from ucp import errors

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for folder in ("bench", "changes", "docs", "spec") for p in (ROOT / folder).rglob("*.md"))]
)
PLAYS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", page.read_text()))
    assert not [link for link in links if not leads_somewhere(page, link)]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_install_of_a_checkout_is_constrained(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if re.search(r"pip install\b.* -e ", line)]
    assert not [line for line in lines if "-c constraints.txt" not in line]


@pytest.mark.parametrize("name", ["demo-command", "test-command"])
def test_readme_has_the_command_that_ci_runs(name: str) -> None:
    """One line, in a block of its own after the mark; ``.ci/run`` reads it from there."""
    found = re.findall(rf"^<!-- {name} -->\n```sh\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 1
    assert found[0].startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_has_its_row(name: str) -> None:
    rows = re.findall(rf"^\| `{name}` \| (\d+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert rows == [str(getattr(errors, name).exit_code)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples run in, to be copied."""
    folder = tmp_path_factory.mktemp("stage")
    scene.make_demo(folder)
    scene.make_zero0(folder)
    return folder


@pytest.mark.parametrize("page", PLAYS, ids=relative)
def test_examples_run(page: Path, stage: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    with what_it_needs(page, request):
        play(page, tmp_path)


def what_it_needs(page: Path, request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """The environment of an object store for the pages that name one."""
    if page.name in served.PAGES:
        return served.environment(request.getfixturevalue("served")("moto"))
    return nullcontext()


@pytest.mark.parametrize("page", PLAYS, ids=relative)
def test_examples_that_do_not_run_say_why(page: Path) -> None:
    left_out = [block for block in blocks(page) if block.mark in (NOT_RUN, NEEDS_DEEPSPEED)]
    assert not [block.where for block in left_out if not block.reason]


@pytest.mark.slow
def test_examples_run_with_deepspeed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every page on what the real demo left behind, so that outputs are those of real DeepSpeed checkpoints."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test runs real DeepSpeed jobs (pip install deepspeed)")
    made = tmp_path / "made"
    made.mkdir()
    assert run(["ucp", "demo", "--keep", "demo", "--engine", "deepspeed"], made) is None
    scene.make_zero0(made)
    failed = {}
    for page in PLAYS:
        folder = tmp_path / page.stem
        shutil.copytree(made, folder)
        with what_it_needs(page, request):
            words = run(["tests.docs.play", str(page), str(folder)], made)
        if words is not None:
            failed[relative(page)] = words
    assert not failed, "\n\n".join(f"== {name}\n{words}" for name, words in failed.items())


def run(arguments: list[str], folder: Path) -> str | None:
    """The last words of a module that fails, and how it ended."""
    module, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-m", module, *rest],
        cwd=folder,
        env=job_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}" if done.returncode else None


def played(text: str, folder: Path, *, real: bool = False) -> int:
    """Run a page with this text."""
    page = folder / "page.md"
    page.write_text(text)
    return play(page, folder, real=real)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(2)\n#> 1\n```\n",
        "```python\n1 / 0\n```\n",
        "<!-- not run: compiled all the same -->\n```python\n1 +\n```\n",
        "```console\n$ ucp info nowhere\n...\n```\n",
        "```console\n$ ucp info nowhere\nall is well\n$ echo $?\n3\n```\n",
        "```console\n$ ucp info nowhere\n...\n$ echo $?\n0\n```\n",
    ],
)
def test_a_wrong_example_is_noticed(text: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError, SyntaxError)):
        played(text, tmp_path)


def test_marks_are_heeded(tmp_path: Path) -> None:
    text = "<!-- needs deepspeed: a job -->\n```python\n1 / 0\n```\n"
    assert played(text, tmp_path) == 1
    assert blocks(tmp_path / "page.md") == [Block("page.md", 3, "python", "1 / 0\n", NEEDS_DEEPSPEED, "a job")]
    with pytest.raises(ZeroDivisionError):
        played(text, tmp_path, real=True)
    real_output = "<!-- output of a real run -->\n```python\nprint(2)\n#> 1\n```\n"
    assert played(real_output, tmp_path) == 1
    with pytest.raises(AssertionError):
        played(real_output, tmp_path, real=True)
