"""Random equations at random meshes: shards on disk are put together, and every rank of a job is filled again."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ucp
from tests.lang.test_random_programs import Case, cases
from tests.mapping.made import part, read, whole, zero
from ucp.checkpoint import Checkpoint
from ucp.mapping import consolidate, scatter
from ucp.store import open_store


@given(cases, st.sampled_from([whole, zero(2), zero(3)]))
@settings(max_examples=60, deadline=None)
def test_the_engine_does_what_arrays_in_memory_do(case: Case, cut) -> None:
    program, setting, shards = case.program(), case.equation.setting, case.scatter()
    recorded = {"cuts": setting.cuts, "placements": setting.placements}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        parts = [part(store, dict(at), tensors, cut=cut) for at, tensors in shards.items()]
        catalog = consolidate(parts, program, mesh=setting.mesh, sizes=dict(setting.sizes), **recorded)
        assert catalog.tensors.keys() == case.logical.keys()
        for name, array in case.logical.items():
            np.testing.assert_array_equal(read(catalog, store, name), array, err_msg=name)
        for at, expected in shards.items():
            room = {name: torch.full(array.shape, -1) for name, array in expected.items()}
            here = {"mesh": setting.mesh, "coordinate": dict(at), "sizes": dict(setting.sizes), **recorded}
            ucp.load(room, Checkpoint(catalog, store), program=program, **here)
            for name, array in expected.items():
                np.testing.assert_array_equal(room[name].numpy(), array, err_msg=name)
        scattered = scatter(catalog, program, mesh=setting.mesh, sizes=dict(setting.sizes), **recorded)
        for at, again in scattered.parts:
            expected = {frozenset(key): held for key, held in shards.items()}.get(frozenset(at.items()), {})
            assert again.tensors.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(read(again, store, name), array, err_msg=name)
