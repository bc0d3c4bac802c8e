"""What is written beside tensors: arguments, optimizer, loss scale, schedule."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.converters.megatron.write_made import OPTIONS, TRAINED, llama, make, source
from ucp.catalog import ParamGroup
from ucp.converter import Layout
from ucp.converters._megatron.target import make_target
from ucp.store import open_store

SCHEDULE = {
    "max_lr": 0.2,
    "min_lr": 0.0,
    "num_steps": 160,
    "lr_warmup_steps": 10,
    "lr_decay_steps": 1000,
    "lr_decay_style": "cosine",
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_steps": 1000,
    "wd_incr_style": "constant",
}


def files(target) -> dict[str, bytes]:
    return dict(target.finish({}))


def common(target) -> dict[str, Any]:
    """``common.pt``, as Megatron-Core reads it."""
    (data,) = (data for path, data in files(target).items() if path.endswith("common.pt"))
    found: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=False)
    return found


def trained(**state):
    return replace(source(llama(), states=TRAINED), step=7, state=state)


def test_arguments_are_told_by_the_tensors(tmp_path):
    args = common(make(trained(consumed_samples=160), tmp_path, {"tp": 2, "pp": 2}))["args"]
    told = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "vocab_size": 60,
        "padded_vocab_size": 256,
        "make_vocab_size_divisible_by": 128,
        "untie_embeddings_and_output_weights": True,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "use_distributed_optimizer": True,
        "iteration": 7,
        "consumed_train_samples": 160,
        "ckpt_format": "torch_dist",
        "no_save_rng": True,
    }
    assert {key: getattr(args, key) for key in told} == told


def test_arguments_of_megatron_are_kept_but_for_the_layout(tmp_path):
    own = {"num_layers": 2, "lr_decay_iters": 10, "bf16": True, "tensor_model_parallel_size": 8, "seed": 5}
    own |= {"make_vocab_size_divisible_by": 32, "use_distributed_optimizer": False, "padded_vocab_size": 256}
    made = common(make(trained(args=own), tmp_path, {"tp": 2}))
    args = vars(made["args"])
    assert args["lr_decay_iters"] == 10
    assert args["seed"] == 5
    assert (args["tensor_model_parallel_size"], args["padded_vocab_size"]) == (2, 64)
    assert (args["bf16"], args["fp16"], args["params_dtype"]) == (True, False, torch.bfloat16)
    assert args["use_distributed_optimizer"] is False
    assert made["optimizer"]["optimizer"]["state"]["common_step"] == 5


def test_objects_among_the_arguments_are_left_out_unless_they_are_harmless(tmp_path):
    from ucp.container.values import Reference
    from ucp.tree import Opaque

    strange = Opaque("os", "system", args=("true",))
    target = make(trained(args={"strange": strange, "params_dtype": Reference("torch", "float32")}), tmp_path)
    args = common(target)["args"]
    assert not hasattr(args, "strange")
    assert args.params_dtype is torch.float32
    assert any("args.strange" in note for note in target.notes)


def test_the_schedule_of_megatron_is_carried(tmp_path):
    target = make(trained(lr_scheduler=SCHEDULE), tmp_path)
    assert common(target)["opt_param_scheduler"] == SCHEDULE
    assert not any("override" in note for note in target.notes)


def test_another_schedule_is_stood_in_for(tmp_path):
    target = make(trained(lr_scheduler={"last_epoch": 7}, consumed_samples=96), tmp_path)
    made = common(target)["opt_param_scheduler"]
    assert made.keys() == SCHEDULE.keys()
    assert (made["num_steps"], made["max_lr"], made["lr_decay_style"]) == (96, 0.1, "constant")
    assert any("--override-opt_param-scheduler" in note for note in target.notes)


def test_groups_say_what_megatron_looks_for(tmp_path):
    groups = common(make(trained(), tmp_path))["optimizer"]["optimizer"]["param_groups"]
    keys = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    assert [tuple(group[key] for key in keys) for group in groups] == [(1, 1, False, False), (0, 1, False, False)]
    for group in groups:
        assert {key: group[key] for key in OPTIONS} == OPTIONS
        assert group["step"] == 5


def test_experts_that_are_spread_have_an_optimizer_of_their_own(tmp_path):
    catalog = source(llama(experts=4), states=TRAINED)
    made = common(make(catalog, tmp_path, {"ep": 2}))["optimizer"]
    expert = [[g["is_expert_parallel"] for g in made[n]["optimizer"]["param_groups"]] for n in (0, 1)]
    assert expert == [[False, False], [True]]
    alone = common(make(catalog, tmp_path))["optimizer"]
    assert not any(group["is_expert_parallel"] for group in alone["optimizer"]["param_groups"])


def test_multipliers_of_megatrons_groups_are_kept(tmp_path):
    catalog = source(llama(), states=TRAINED)
    names = list(catalog.tensors)
    head = {**OPTIONS, "lr_mult": 10.0, "is_decoupled_lr": True, "wd_mult": 1.0, "max_lr": 3.0}
    groups = (ParamGroup(("lm_head.weight",), head), ParamGroup(tuple(set(names) - {"lm_head.weight"}), OPTIONS))
    target = make(replace(catalog, param_groups=groups), tmp_path)
    assert target.losses == ()
    made = common(target)["optimizer"]["optimizer"]["param_groups"]
    assert [(g["lr_mult"], g["is_decoupled_lr"], g.get("max_lr")) for g in made] == [
        (1.0, False, None),
        (10.0, True, 3.0),
        (1.0, False, None),
    ]


@pytest.mark.parametrize("optimizer", ["distributed", "float16"])
def test_the_loss_scale_of_fp16(tmp_path, optimizer):
    state = {"loss_scale": {"scale": 4096.0, "growth_tracker": 3}}
    made = common(make(trained(**state), tmp_path, dtype="float16", optimizer=optimizer))["optimizer"]["grad_scaler"]
    assert made["scale"].tolist() == [4096.0]
    assert (made["growth_tracker"], made["hysteresis_tracker"]) == (3, 0)
    target = make(trained(**state), tmp_path, dtype="bfloat16", optimizer=optimizer)
    assert "grad_scaler" not in common(target)["optimizer"]
    assert "left out: loss_scale" in target.notes


def test_weights_alone_are_a_release(tmp_path):
    target = make(source(llama()), tmp_path)
    made = files(target)
    assert list(made)[-1] == target.root == "latest_checkpointed_iteration.txt"
    assert made[target.root] == b"release"
    assert json.loads(made["release/metadata.json"])["sharded_backend"] == "torch_dist"
    held = common(target)
    assert "optimizer" not in held
    assert held["args"].no_save_optim is True


def test_the_tracker_names_the_iteration(tmp_path):
    for form in ("torch_dist", "legacy"):
        target = make(trained(), tmp_path, form=form)
        assert files(target)[target.root] == b"7"
        assert all(task.object.startswith("iter_0000007/") for task in target.tasks)


def test_whose_layers_are_meant_is_said_where_nothing_tells(tmp_path):
    layout, store = Layout(), open_store(str(tmp_path))
    assert any("te=no" in note for note in make_target(trained(), store, layout=layout).notes)
    told = trained(args={"transformer_impl": "local"})
    assert not any("te=no" in note for note in make_target(told, store, layout=layout).notes)
    assert not any("te=no" in note for note in make(trained(), tmp_path).notes)


def test_counters_of_megatron_are_kept(tmp_path):
    target = make(trained(num_floating_point_operations_so_far=12345, content_metadata={"x": 1}), tmp_path)
    assert common(target)["num_floating_point_operations_so_far"] == 12345
    assert not any("left out" in note for note in target.notes)


def test_what_has_no_place_is_listed(tmp_path):
    target = make(trained(rng={"python": 1}, client_state={"epoch": 3}), tmp_path)
    assert "left out: client_state, rng" in target.notes
