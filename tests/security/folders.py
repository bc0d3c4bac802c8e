"""Small real checkpoints of every family, to be made hostile, and what must hold whenever one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import ucp
from tests.fuzz.target import BASES
from tests.real.hostile import digests, no_checkpoint
from ucp.cli.app import program
from ucp.errors import UcpError

FAMILIES = tuple(sorted(path.name for path in BASES.iterdir()))
"""Names of the checkpoints, several of some families."""

Change = Callable[[Path], None]


def copied(name: str, folder: Path) -> Path:
    """The checkpoint `name`, below `folder`."""
    return Path(shutil.copytree(BASES / name, folder / "source"))


def refused(source: Path, *says: str, kind: type[UcpError] = UcpError, hint: bool = True) -> UcpError:
    """Neither Python nor the command line takes `source`; the error says `says`, and nothing was written anywhere."""
    before, beside = digests(source), set(source.parent.iterdir())
    destination = source.parent / "refused"
    errors = []
    for action in (_open, _convert, _verify):
        with pytest.raises(kind) as caught:
            action(source, destination)
        errors.append(caught.value)
    for arguments in (["info"], ["ls"], ["verify", "--deep"], ["convert"]):
        command = [arguments[0], str(source), *arguments[1:], *([str(destination)] if arguments == ["convert"] else [])]
        done = CliRunner().invoke(program, [*command, "--json"])
        assert done.exit_code == errors[0].exit_code, (command, done.output)
        assert "internal" not in json.loads(done.stdout)["error"]["code"]
    for error in errors:
        assert all(text in error.message for text in says), (says, error.message)
        assert error.hint or not hint, error.message
    assert digests(source) == before
    no_checkpoint(destination)
    assert set(source.parent.iterdir()) - beside <= {destination}
    return errors[0]


def _open(source: Path, _: Path) -> None:
    ucp.open(str(source)).close()


def _convert(source: Path, destination: Path) -> None:
    ucp.convert(str(source), str(destination))


def _verify(source: Path, _: Path) -> None:
    from ucp.converter import read_catalog
    from ucp.run.verify import verify

    catalog, store = read_catalog(str(source))
    verify(catalog, store, deep=True)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
