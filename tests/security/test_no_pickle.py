"""Our own forms are read without a pickle: neither Python's, nor torch's, nor our own inert one is ever asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import BASES
from tests.real.hostile import ROOT

LOADS = """
import json, sys
import torch
import ucp
from tests.fuzz.seed_jobs import trained

def refuse(*arguments, **options):
    raise AssertionError("a pickle is read")

import pickle, _pickle
import ucp.container.machine
from ucp.converter import read_catalog
from ucp.run.verify import verify

model, optimizer = trained()
for folder in sys.argv[1:]:  # what is imported at first use is imported
    ucp.load({"model": model, "optimizer": optimizer}, folder)

found = []
sys.addaudithook(lambda event, arguments: found.append(event) if event.startswith(("pickle.", "marshal.")) else None)
ucp.container.machine.Machine.__init__ = refuse
pickle.load = pickle.loads = _pickle.load = _pickle.loads = torch.load = refuse
pickle.Unpickler = pickle._Unpickler = refuse

told = {}
for folder in sys.argv[1:]:
    with ucp.open(folder) as checkpoint:
        values = {name: checkpoint[name]["value"][...] for name in checkpoint}
    catalog, store = read_catalog(folder)
    verify(catalog, store, deep=True)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    ucp.load({"model": model, "optimizer": optimizer}, folder)
    same = all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    told[folder] = [len(values), same]
print(json.dumps([told, found]))
"""


def test_reading_loading_and_verifying_without_a_pickle() -> None:
    folders = [str(BASES / name) for name in ("native", "universal")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADS, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    told, found = json.loads(done.stdout.splitlines()[-1])
    assert told == {folder: [8, True] for folder in folders}
    assert found == []


@pytest.mark.parametrize("name", ["native", "universal"])
def test_no_object_of_ours_is_a_pickle(name: str) -> None:
    for path in Path(BASES / name).rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:4]
            assert not head.startswith((b"\x80", b"PK")), path
