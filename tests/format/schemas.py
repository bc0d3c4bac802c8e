"""The JSON schemas of the specification, as validators."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

_NAMES = ("universal-manifest.schema.json", "universal-state.schema.json")
_DOCUMENTS = [json.loads(files("ucp.spec").joinpath(name).read_text()) for name in _NAMES]
_REGISTRY = Registry().with_resources([(doc["$id"], Resource.from_contents(doc)) for doc in _DOCUMENTS])
MANIFEST, STATE = (Draft202012Validator(doc, registry=_REGISTRY) for doc in _DOCUMENTS)


def problems(validator: Draft202012Validator, value: Any) -> list[str]:
    """What is wrong with `value`, as text."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
