"""Sources for the tests: a plain job that was saved after some steps, and trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

from tests.converters.dcp import write_jobs
from tests.support.model import group_names
from tests.train import jobs
from ucp.catalog import Catalog
from ucp.converter import converter
from ucp.run.integrity import Ledger, Spans
from ucp.run.worker import write_object
from ucp.store import Store, open_store
from ucp.train.save import save

STEPS = 3


class Trained:
    """A plain job after `STEPS` steps: its checkpoint at `url`, what it held, and its next losses."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.model = write_jobs.build(kind)
        self.optimizer = write_jobs.optimizer_of(self.model, group_names(self.model, 2))
        for step in range(STEPS):
            jobs.train_step(self.model, self.optimizer, step)
        self.url = str(folder / "source")
        save((self.model, self.optimizer), self.url, step=STEPS)
        self.state = write_jobs.whole_state(self.model, self.optimizer)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        self.nested = detached({"model": model, "optim": optimizer})
        self.hyper = write_jobs.hyper(self.optimizer)
        self.losses = [jobs.train_step(self.model, self.optimizer, step) for step in range(STEPS, STEPS + 3)]


def detached(tree: Any) -> Any:
    """A copy that training on does not change."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: detached(value) for key, value in tree.items()}
    return [detached(value) for value in tree] if isinstance(tree, list) else tree


def check_resumed(result: Mapping[str, Any], trained: Trained) -> None:
    begun = {f"{state}/spare" for state in ("step", "exp_avg", "exp_avg_sq")} if trained.kind == "unused" else set()
    assert result["state"].keys() == trained.state.keys() | begun
    assert not any(result["state"][key].any() for key in begun), "as optimizers begin"
    for key, value in trained.state.items():
        assert result["state"][key].dtype == value.dtype, key
        assert np.array_equal(result["state"][key], value), key
    assert result["hyper"] == trained.hyper


def written(catalog: Catalog, store: Store, url: str, **options: Any) -> Any:
    """Write a catalog that lies in no family's folder; the target."""
    target = converter("dcp").target(catalog, store, **options)
    destination = open_store(url)
    for task in target.tasks:
        write_object(store, destination, task, ledger=Ledger(Spans(catalog.checksums)), advance=lambda _: None)
    for path, data in target.finish({}):
        destination.put(path, data)
    return target
