"""Cut arrays are put together to what DeepSpeed's own ``ds_to_universal`` makes of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.converters.deepspeed.cut_arrays import (
    SUBS,
    Array,
    affine,
    affine_info,
    cut,
    cut_parts,
    joined,
    sub,
    taken,
    whole,
)
from tests.support.deepspeed_job import job_environment

MERGE = """
import sys, torch
from pathlib import Path
from deepspeed.checkpoint.ds_to_universal import merge_tp_slices
root, merged = Path(sys.argv[1]), []
for number, (info, shapes) in enumerate(torch.load(root / "asked.pt", weights_only=False)):
    folder = root / str(number)
    merge_tp_slices(info, str(folder / "out"), str(folder / "slices"), len(shapes), ("w", shapes))
    merged.append(torch.load(folder / "out" / "w" / "exp_avg.pt", weights_only=False)["param"])
torch.save(merged, root / "merged.pt")
"""


MERGED: list[tuple[Mapping[str, Any], list[Array]]] = [
    ({}, cut(whole(4, 3), 0)),
    ({"tp_replicated_parameter_patterns": ["w"]}, [whole(4, 3), whole(4, 3)]),
    ({"parameter_to_average_patterns": ["w"]}, [whole(4, 3), 3 * whole(4, 3)]),
    ({"parameter_with_row_parallelism_patterns": ["w"]}, cut(whole(4, 6), 1)),
    ({"parameter_with_2_sub_params_cat_dim_0": ["w"]}, cut_parts(whole(12, 2), 0, [[3, 3], [3, 3]])),
    ({"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 5}, cut(whole(8, 3), 0)),
    (
        {
            "vocabulary_parameter_patterns": ["w"],
            "original_vocab_size": 5,
            "parameter_with_row_parallelism_patterns": ["w"],
        },
        cut(whole(8, 4), 1),
    ),
    (
        {"universal_checkpoint_version": 0.2, SUBS: [sub(((8, 4, 4), 3), 0)]},
        cut_parts(whole(16, 3), 0, [[4, 4], [2, 2], [2, 2]]),
    ),
    ({"universal_checkpoint_version": 0.3, SUBS: [sub((3, -1), 0)]}, cut_parts(whole(12, 3), 0, [[2, 2]] * 3)),
    (
        {
            "universal_checkpoint_version": 0.4,
            SUBS: [sub(((5, 3, 3), -1), 0)],
            "sub_param_shard_widths": {"w": [[3, 2], [2, 1], [2, 1]]},
        },
        cut_parts(whole(11, 4), 0, [[3, 2], [2, 1], [2, 1]]),
    ),
    (
        affine_info(affine((4, 6), 1, [[(0, 1), (3, 2)], [(1, 2), (5, 1)]])),
        taken(whole(4, 6), 1, [[(0, 1), (3, 2)], [(1, 2), (5, 1)]]),
    ),
    (
        affine_info(affine((5, 3), 0, [[(0, 2), (4, 1)], [(2, 2), (4, 1)]])),
        taken(whole(5, 3), 0, [[(0, 2), (4, 1)], [(2, 2), (4, 1)]]),
    ),
]


@pytest.mark.slow
def test_it_is_what_deepspeeds_own_merge_makes(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; the merge is its own (pip install deepspeed)")
    for number, (_, parts) in enumerate(MERGED):
        for rank, part in enumerate(parts):
            folder = tmp_path / str(number) / "slices" / "w" / str(rank)
            folder.mkdir(parents=True)
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save(torch.from_numpy(part.reshape(-1).copy()), folder / f"{state}.00")
    torch.save([(dict(info), [part.shape for part in parts]) for info, parts in MERGED], tmp_path / "asked.pt")
    command = [sys.executable, "-c", MERGE, str(tmp_path)]
    subprocess.run(command, env=job_environment(), check=True, capture_output=True, timeout=120)
    for (info, parts), merged in zip(MERGED, torch.load(tmp_path / "merged.pt"), strict=True):
        np.testing.assert_array_equal(joined(info, {"w": parts})["w"], merged.numpy(), str(info))
