"""A job of Megatron-Core tells how its ranks lie, so that what each rank has of its own goes to the same place."""

from __future__ import annotations

import pytest

from tests.support.gloo import spawn

pytest.importorskip("megatron.core")


def meshes(rank, world, splits):
    from megatron.core import parallel_state

    from ucp.train.frameworks.megatron_mesh import mesh_of_job

    found = []
    for split in splits:
        assert mesh_of_job() is None
        parallel_state.initialize_model_parallel(**split)
        mesh = mesh_of_job()
        found.append([axis for axis in mesh.axes if axis[1] > 1])
        assert mesh.ranks == tuple(range(world))
        parallel_state.destroy_model_parallel()
    return found


def test_axes_are_told_and_splits_of_one_size_told_apart():
    splits = [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "order": "tp-pp-dp"},
        {"tensor_model_parallel_size": 2, "order": "tp-cp-ep-dp-pp", "expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ]
    of_all = spawn(meshes, 4, splits)
    assert all(one == of_all[0] for one in of_all)
    found = of_all[0]
    assert found[:4] == [[("dp", 4)], [("dp", 2), ("tp", 2)], [("pp", 2), ("dp", 2)], [("pp", 2), ("tp", 2)]]
    assert found[5:] == [
        [("dp_ep2_etp2", 2), ("tp_ep2_etp2", 2)],
        [("dp_ep2_etp1", 4)],
        [("dp_ep1_etp1", 2), ("tp_ep1_etp1", 2)],
    ]
    assert len({tuple(one) for one in found}) == len(splits) - 1  # the order of axes of one rank says nothing


def test_a_process_alone_has_no_mesh():
    from ucp.train.frameworks.megatron_mesh import mesh_of_job

    assert mesh_of_job() is None
