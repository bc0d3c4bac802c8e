"""Opening a checkpoint of many ranks takes little time and memory: their model files are all but equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.converters.deepspeed.fake import Fake, write

RANKS, LAYERS = 64, 60
PROGRAM = """
import json, resource, sys, time
from ucp.converters.deepspeed import CONVERTER
from ucp.store import open_store
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
catalog = CONVERTER.read(open_store(sys.argv[1]))
used = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
pieces = sum(len(fragments) for fragments in catalog.fragments.values())
print(json.dumps([len(catalog.tensors), pieces, *used]))
"""


@pytest.mark.slow
def test_zero_3_on_64_ranks(tmp_path: Path) -> None:
    matrices = {f"layers.{i}.{n}.weight": (16, 16) for i in range(LAYERS) for n in "q k v o gate up down".split()}
    vectors = {f"layers.{i}.{n}.weight": (16,) for i in range(LAYERS) for n in "abcde"}
    write(Fake([matrices, vectors], dp=RANKS, stage=3), tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    tensors, pieces, seconds, kib = json.loads(run.stdout)
    assert tensors == LAYERS * 12
    # A vector of 16 elements has an element on each of 16 ranks.
    assert pieces == 3 * LAYERS * (7 * RANKS + 5 * 16)
    assert seconds < 2
    assert kib < 100 << 10
