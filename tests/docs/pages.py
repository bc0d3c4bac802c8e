"""The fenced blocks of a page, with what the comment before each says about running it.

Marks, each in a line of its own:

    <!-- not run: reason -->             never executed; Python is still compiled
    <!-- needs deepspeed: reason -->     executed where a real DeepSpeed job runs, in the slow tests
    <!-- output of a real run -->        executed everywhere, its output compared in the slow tests
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

NOT_RUN = "not run"
NEEDS_DEEPSPEED = "needs deepspeed"
REAL_OUTPUT = "output of a real run"
_MARK = re.compile(rf"<!-- ({NOT_RUN}|{NEEDS_DEEPSPEED}|{REAL_OUTPUT})(?:: (.+))? -->")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_TICKS = re.compile(r"^ *```", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is the first line of its text, `mark` and `reason` those of the comment before it."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None = None
    reason: str | None = None

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order; those inside lists without their indentation."""
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()].rstrip().rpartition("\n")[2]
        mark = _MARK.fullmatch(before.strip())
        line = text.count("\n", 0, fence.start()) + 2
        found.append(Block(page.name, line, fence[2], dedent(fence[3]), *(mark.groups() if mark else ())))
    assert 2 * len(found) == len(_TICKS.findall(text)), f"{page.name}: a fence is not closed"
    return found
