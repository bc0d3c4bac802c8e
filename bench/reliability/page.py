"""docs/reliability.md: what is promised, and the figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.txt")


def page(found: Mapping[str, str]) -> str:
    """The page, of what each section said; what was not run says so."""
    sections = ("server", "network", "wire", "rest", "crashes", "throughput", "digests", "notes")
    return TEMPLATE.read_text().format(**{name: found.get(name, "Not measured.") for name in sections})
