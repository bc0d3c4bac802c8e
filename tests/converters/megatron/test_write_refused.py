"""What cannot be written is refused with what to give; what would not be exact is a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.converters.megatron.write_made import OPTIONS, TRAINED, llama, make, source
from tests.programs.megatron import emulated
from tests.support.megatron import Model
from ucp.catalog import Catalog, ParamGroup, Scalar
from ucp.converter import Layout
from ucp.converters._megatron.target import make_target
from ucp.converters._megatron.write_buffer import laid
from ucp.converters._megatron.write_choice import choose
from ucp.converters._megatron.write_order import place
from ucp.converters._megatron.write_scatter import scattered
from ucp.errors import FitError, UsageError
from ucp.plan import TensorSpec
from ucp.store import open_store


@pytest.mark.parametrize(
    ("mesh", "options", "told"),
    [
        ({"cp": 2}, {}, "no mesh axis 'cp'"),
        ({"ep": 2}, {}, "no experts"),
        ({"vpp": 2}, {}, "there is one"),
        ({}, {"form": "zarr"}, "torch_dist or legacy"),
        ({}, {"layers": "some"}, "stacked or each"),
        ({}, {"optimizer": "sgd"}, "distributed, float16, fp32 or none"),
        ({}, {"dtype": "int8"}, "float32, float16 or bfloat16"),
        ({}, {"colour": "red"}, "unknown option 'colour'"),
    ],
)
def test_options_that_are_none(tmp_path, mesh, options, told):
    with pytest.raises(UsageError, match=told):
        make(source(llama()), tmp_path, mesh, **options)


def test_experts_of_the_legacy_form_are_cut_like_the_rest(tmp_path):
    with pytest.raises(UsageError, match="etp must be tp"):
        make(source(llama(experts=4)), tmp_path, {"tp": 2, "etp": 1}, form="legacy")


@pytest.mark.parametrize(
    ("mesh", "options", "told"),
    [
        ({"pp": 2}, {"stages": "1,2"}, "not 2 layers in 2 stages"),
        ({"pp": 2}, {"stages": "2,0"}, "not 2 layers in 2 stages"),
        ({"pp": 3}, {"stages": "1,1"}, "not 2 layers in 3 stages"),
        ({"pp": 2}, {"stages": "1,1", "form": "torch_dist"}, "for form=legacy"),
    ],
)
def test_stages_that_cannot_be(tmp_path, mesh, options, told):
    with pytest.raises(UsageError, match=told):
        make(source(llama()), tmp_path, mesh, **{"form": "legacy", **options})


def test_grouped_experts_without_transformer_engine(tmp_path):
    layout = Layout(flags={"te": False, "grouped": True})
    with pytest.raises(UsageError, match="GroupedMLP"):
        make_target(source(llama(experts=4)), open_store(str(tmp_path)), layout=layout, form="legacy")
    assert make_target(source(llama(experts=4)), open_store(str(tmp_path)), layout=layout).tasks


def test_names_of_the_source_say_nothing_to_megatron(tmp_path):
    with pytest.raises(UsageError, match="own names") as caught:
        make(replace(source(llama()), program=None), tmp_path)
    assert "--program" in caught.value.hint


@pytest.mark.parametrize("form", ["torch_dist", "legacy"])
@pytest.mark.parametrize("mesh", [{"tp": 3}, {"pp": 3}, {"pp": 2, "vpp": 2}, {"ep": 3}], ids=str)
def test_sizes_that_ranks_do_not_divide(tmp_path, mesh, form):
    if form == "torch_dist" and "pp" in mesh:
        assert make(source(llama()), tmp_path, mesh, form=form).tasks  # stages of a job may differ
        return
    with pytest.raises(FitError, match="cannot cut evenly"):
        make(source(llama(experts=4 if "ep" in mesh else 0)), tmp_path, mesh, form=form)


@pytest.mark.parametrize("form", ["torch_dist", "legacy"])
def test_tensors_that_no_gpt_of_megatron_has(tmp_path, form):
    with pytest.raises(FitError, match="conv"):
        make(source({**llama(), "layers.0.conv.weight": (4, 4)}), tmp_path, form=form)


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    catalog = source(llama(), sizes={})
    with pytest.raises(FitError, match="cannot be told") as caught:
        make(catalog, tmp_path)
    assert caught.value.hint.startswith("give --to-size d=N")
    assert make(catalog, tmp_path, sizes={"groups": 2, "d": 8}).tasks


@pytest.mark.parametrize("form", ["torch_dist", "legacy"])
def test_states_of_some_parameters_only(tmp_path, form):
    catalog = source(llama(), states=TRAINED)
    bare = replace(catalog.tensors["norm.weight"], states={"value": TensorSpec((32,), "float32")})
    catalog = replace(catalog, tensors={**catalog.tensors, "norm.weight": bare})
    with pytest.raises(FitError, match=r"norm\.weight has no state 'exp_avg'") as caught:
        make(catalog, tmp_path, form=form)
    assert "optimizer=none" in caught.value.hint
    made = make(catalog, tmp_path, form=form, optimizer="none")
    assert made.losses == ()
    assert any(note.startswith("left out: states exp_avg exp_avg_sq") for note in made.notes)


def test_an_optimizer_whose_step_is_not_known(tmp_path):
    catalog = source(llama(), states=TRAINED)
    without = {name: replace(tensor, scalars={}) for name, tensor in catalog.tensors.items()}
    with pytest.raises(FitError, match="how many steps"):
        make(replace(catalog, tensors=without), tmp_path)
    assert make(replace(catalog, tensors=without, step=7), tmp_path).losses == ()


def test_weights_alone_that_would_be_rounded(tmp_path):
    catalog = source(llama())
    assert make(catalog, tmp_path).losses == ()
    (loss,) = make(catalog, tmp_path, dtype="bfloat16").losses
    assert "rounded from float32 to bfloat16" in loss


def test_rounded_weights_beside_masters_are_no_loss(tmp_path):
    catalog = source(llama(), states=TRAINED)
    assert make(catalog, tmp_path, dtype="bfloat16").losses == ()
    assert make(catalog, tmp_path, dtype="bfloat16", optimizer="float16").losses == ()
    assert len(make(catalog, tmp_path, dtype="bfloat16", optimizer="none").losses) == 1
    with pytest.raises(UsageError, match="dtype is float32"):
        make(catalog, tmp_path, dtype="bfloat16", optimizer="fp32")


def test_bfloat16_does_not_fit_float16(tmp_path):
    catalog = source(llama(), dtype="bfloat16")
    assert make(catalog, tmp_path, dtype="float32").losses == ()
    (loss,) = make(catalog, tmp_path, dtype="float16").losses
    assert "rounded from bfloat16 to float16" in loss


def test_hyper_parameters_that_differ_within_a_group(tmp_path):
    catalog = source(llama(), states=TRAINED)
    first, *others = catalog.tensors
    groups = (ParamGroup((first,), OPTIONS), ParamGroup(tuple(others), {**OPTIONS, "lr": 0.2}))
    (loss,) = make(replace(catalog, param_groups=groups), tmp_path).losses
    assert loss.startswith("lr is 0.1 of embed.weight and 0.2 of ")


def test_decay_by_kind_of_parameter_is_what_megatron_has(tmp_path):
    catalog = source(llama(), states=TRAINED)
    norms = tuple(name for name in catalog.tensors if "norm" in name)
    rest = tuple(name for name in catalog.tensors if "norm" not in name)
    groups = (ParamGroup(rest, OPTIONS), ParamGroup(norms, {**OPTIONS, "weight_decay": 0.0}))
    made = make(replace(catalog, param_groups=groups), tmp_path)
    assert made.losses == ()
    assert not any("decays" in note for note in made.notes)
    assert any("decays norms and biases by 0.1" in note for note in make(catalog, tmp_path).notes)


def test_steps_that_differ(tmp_path):
    catalog = source(llama(), states=TRAINED)
    late = replace(catalog.tensors["norm.weight"], scalars={"step": Scalar(3.0, "float32")})
    (loss,) = make(replace(catalog, tensors={**catalog.tensors, "norm.weight": late}), tmp_path).losses
    assert "5 of embed.weight and 3 of norm.weight" in loss


def test_hyper_parameters_that_are_made_up(tmp_path):
    catalog = replace(source(llama(), states=TRAINED), param_groups=())
    losses = make(catalog, tmp_path).losses
    assert all("the source has no lr betas eps weight_decay" in loss for loss in losses)
    assert losses


def local_names(catalog: Catalog, *, te: bool) -> set[str]:
    """Names that one rank would hold."""
    layout = Layout(flags={"te": te, "grouped": te})
    choice = choose(catalog, layout, form="legacy", optimizer=None, dtype=None, layers="stacked", stages=None)
    ((_, part),) = scattered(catalog, choice).parts
    names = set(part.tensors)
    assert all(place(name) is not None for name in names)
    return names


@pytest.mark.parametrize("experts", [(0, 0), (1, 1), (0, 1)], ids=["dense", "experts", "mixed"])
def test_names_of_layers_of_transformer_engine(experts):
    """Where layers of both kinds are mixed, the norm before the MLP has a name of its own in each."""
    dense, sparse = llama(), llama(experts=4)
    shapes = {name: shape for name, shape in dense.items() if not name.startswith("layers.")}
    for layer, sort in enumerate(experts):
        of = sparse if sort else dense
        shapes |= {name: shape for name, shape in of.items() if name.startswith(f"layers.{layer}.")}
    model = Model("", layers=2, experts=4 if any(experts) else None, expert_layers=experts)
    plain = local_names(source(shapes), te=False)
    assert local_names(source(shapes), te=True) == set(emulated.transformer_engine(dict.fromkeys(plain), model))


def test_keys_of_torch_dist_with_layers_of_transformer_engine(tmp_path):
    shapes = {name: shape for name, shape in llama().items() if not name.startswith("layers.1.")}
    shapes |= {name: shape for name, shape in llama(experts=4).items() if name.startswith("layers.1.")}
    (metadata,) = [
        data for path, data in make(source(shapes), tmp_path, te=True).finish({}) if path.endswith(".metadata")
    ]
    assert b"decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in metadata
    assert b"decoder.layers.1.pre_mlp_layernorm.weight" in metadata
    assert b"decoder.layers.0.pre_mlp_layernorm.weight" not in metadata
    assert b"decoder.layers.1.self_attention.core_attention._extra_state/shard_0_1" in metadata


def test_buckets_of_tables_that_stages_share():
    assert laid([10, 70, 5], [False, False, False]) == ([192, 64, 0], 202)
    # The last stage's head comes first, and what is behind it starts anew right at its end.
    assert laid([10, 70, 5], [False, False, True]) == ([133, 5, 0], 143)
    # The first stage's embedding comes last, in a bucket that ends the one before at a multiple of 64.
    assert laid([10, 70, 5], [True, False, False]) == ([192, 64, 0], 202)
