"""The targets by name."""

from __future__ import annotations

from tests.fuzz.target import Target
from tests.fuzz.targets import containers, folders, forms, language, records

TARGETS: dict[str, Target] = {
    target.name: target for module in (containers, folders, forms, language, records) for target in module.targets()
}
