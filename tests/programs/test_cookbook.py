"""Every rule in the cookbook's table is a rule: sound once its sizes, axes and flags are declared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ucp.lang import parse
from ucp.lang.check import check

PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text()
TABLE = PAGE.partition("## What you may meet")[2].partition("\n## ")[0]
RULES = re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", TABLE, re.MULTILINE)
AXES = ("tp", "pp", "ep")


@pytest.mark.parametrize("rule", [rule for _, rule in RULES], ids=[what.replace(" ", "-") for what, _ in RULES])
def test_rule_is_sound(rule: str) -> None:
    dims = {word for layout in re.findall(r"\[([^\]]*)\]", rule) for word in re.findall(r"[A-Za-z]\w*", layout)}
    numbered = set(re.findall(r"\{(\w+)", rule))
    sizes = " ".join(sorted(dims - {"align", *AXES} - numbered))
    axes = f"mesh {' '.join(AXES)}"
    flags = [f"flag {name}" for name in re.findall(r"when (\w+)", rule)]
    ready = "w.weight [n] <-> up.weight\nlm.weight [n] <-> lm_head.weight\nwte.weight [n] <-> embed.weight"
    rest = [f"size {sizes}", rule] if "<->" in rule else ["size n", ready, rule]
    check(parse("\n".join(["format 1", axes, *flags, *rest, ""])))


def test_the_table_is_there() -> None:
    assert len(RULES) > 20
