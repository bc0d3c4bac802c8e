"""What the documentation points at exists, and its install lines are the ones that work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for folder in ("bench", "changes", "docs", "spec") for p in (ROOT / folder).rglob("*.md"))]
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(FENCE.sub("", page.read_text()))
    assert not [target for target in targets if not (page.parent / target).exists()]


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
