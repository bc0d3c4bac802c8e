from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.train.handmade import columns, flat, make, whole
from ucp.checkpoint import Checkpoint
from ucp.train.report import Cast


class Net(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def trained(**options: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model, **options)
    for _ in range(3):
        train_step(model, optimizer)
    model.calls.fill_(17)
    return model, optimizer


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "lr": 0.02, "weight_decay": 0.1}, {"params": others, "lr": 0.01, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.8, 0.9), **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    tokens = torch.arange(22).reshape(2, 11) % 11
    logits = model(tokens).float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), (tokens * 3 % 11).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def checkpoint(path: Path | str, model: Net, optimizer: torch.optim.Optimizer, **options: Any) -> Checkpoint:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {"value": p.detach()} for name, p in model.named_parameters()}
    steps: dict[str, float] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key == "step":
                steps[names[id(parameter)]] = float(value)
            else:
                tensors[names[id(parameter)]][key] = value
    tensors["calls"] = {"value": model.calls}
    groups = [
        ([names[id(p)] for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]
    options = {"kinds": {"calls": "buffer"}, "steps": steps, "groups": groups, **options}
    ties = {"head.weight": "embed.weight"} if model.head.weight is model.embed.weight else {}
    return Checkpoint(*make(str(path), tensors, **{"ties": ties, **options}))


@pytest.fixture
def source(tmp_path: Path) -> tuple[Net, torch.optim.Optimizer, Checkpoint]:
    model, optimizer = trained()
    return model, optimizer, checkpoint(tmp_path, model, optimizer, cut=flat(3))


def assert_same_state(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


@pytest.mark.parametrize("cut", [whole, flat(1), flat(3), flat(5), columns(2)])
def test_a_model_and_its_optimizer_go_on_as_if_never_stopped(tmp_path: Path, cut: Any) -> None:
    model, optimizer = trained()
    ckpt = checkpoint(tmp_path, model, optimizer, cut=cut)
    torch.manual_seed(1)
    other = Net()
    resumed = torch.optim.AdamW(
        [{"params": [p for p in other.parameters() if p.ndim > 1]}, {"params": list(other.norm.parameters())}], lr=1.0
    )
    report = ucp.load((other, resumed), ckpt)
    assert_same_state(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight
    for group, wanted in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in wanted.items() if k != "params"}
        for mine, theirs in zip(group["params"], wanted["params"], strict=True):
            assert_same_state(resumed.state[mine], optimizer.state[theirs])
    losses = [(train_step(model, optimizer), train_step(other, resumed)) for _ in range(3)]
    assert all(a == b for a, b in losses)
    assert (report.tensors, report.missing, report.unexpected, report.casts) == (4, (), (), ())
    assert "loaded step 7" in str(report)


class Vectors(nn.Module):
    """Parameters as small as what the optimizer is tried on to learn which states it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        self.third, self.fourth = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(()))


def test_equal_and_tiny_parameters_have_states_of_their_own(tmp_path: Path) -> None:
    model = Vectors()
    optimizer = torch.optim.AdamW(model.parameters())
    sum((p * p * (i + 1)).sum() for i, p in enumerate(model.parameters())).backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    tensors = {name: {"value": p.detach(), **optimizer.state[p]} for name, p in model.named_parameters()}
    steps = {name: float(states.pop("step")) for name, states in tensors.items()}
    hyper = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    ckpt = Checkpoint(*make(str(tmp_path), tensors, steps=steps, groups=[(names, hyper)]))
    other = Vectors()
    resumed = torch.optim.AdamW(other.parameters())
    ucp.load((other, resumed), ckpt)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(resumed.state[mine], optimizer.state[theirs])
    held = [value.data_ptr() for state in resumed.state.values() for value in state.values()]
    assert len(set(held)) == len(held)


def test_an_optimizer_that_has_state_is_filled_in_place(source: Any) -> None:
    model, optimizer, ckpt = source
    other, resumed = trained()
    train_step(other, resumed)
    before = {id(v) for state in resumed.state.values() for k, v in state.items() if k != "step"}
    ucp.load({"model": other, "optimizer": resumed}, ckpt)
    after = {id(v) for state in resumed.state.values() for k, v in state.items() if k != "step"}
    assert before == after
    assert train_step(model, optimizer) == train_step(other, resumed)


def test_groups_are_matched_by_name_and_not_by_position(source: Any) -> None:
    model, optimizer, ckpt = source
    other = Net()
    norm, embed = list(other.norm.parameters()), [other.embed.weight]
    resumed = torch.optim.AdamW([{"params": [norm[1]]}, {"params": embed}, {"params": [norm[0]]}])
    ucp.load((other, resumed), ckpt)
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.02, 0.01]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.0, 0.1, 0.0]
    assert resumed.param_groups[0]["betas"] == (0.8, 0.9)
    for _ in range(2):
        assert train_step(model, optimizer) == train_step(other, resumed)


def test_one_group_cannot_hold_two_learning_rates(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ucp.FitError, match=r"group 0 lr \(0.02 for embed.weight; 0.01 for norm.weight, norm.bias\)"
    ) as no:
        ucp.load((other, resumed), ckpt)
    assert "hyper_parameters=False" in str(no.value.hint)
    assert_same_state(other.state_dict(), before)
    assert not resumed.state
    ucp.load((other, resumed), ckpt, hyper_parameters=False)
    assert resumed.param_groups[0]["lr"] == 0.5
    assert len(resumed.state) == 3


def test_all_problems_are_told_at_once_and_nothing_is_touched(source: Any) -> None:
    _, _, ckpt = source
    other = Net(tied=False)
    other.norm = nn.LayerNorm(5)
    other.extra = nn.Linear(2, 2)
    other.calls = torch.tensor(1.0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ucp.FitError) as no:
        ucp.load(other, ckpt)
    text = str(no.value)
    for line in (
        "missing: extra.weight (nearest: ",
        "missing: extra.bias",
        "shape: norm.weight ([6] in the source, [5] in the target)",
        "dtype: calls (int64 in the source would lose its meaning as float32)",
    ):
        assert line in text
    assert_same_state(other.state_dict(), before)


def test_what_the_target_lacks_is_unexpected(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    del other.norm
    with pytest.raises(ucp.FitError, match=r"unexpected: norm.weight\n  unexpected: norm.bias"):
        ucp.load(other, ckpt)
    report = ucp.load(other, ckpt, strict=False)
    assert report.unexpected == ("norm.weight", "norm.bias")


def test_part_of_a_model_by_globs(source: Any) -> None:
    model, _, ckpt = source
    other = Net()
    embed = other.embed.weight.clone()
    report = ucp.load(other, ckpt, only=["norm.*"])
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert torch.equal(other.embed.weight, embed)
    assert report.tensors == 2


@pytest.mark.parametrize("rename", [{"tokens.weight": "embed.weight"}, lambda name: name.replace("tokens", "embed")])
def test_renaming(source: Any, rename: Any) -> None:
    model, _, ckpt = source
    other = Net()
    other.tokens, other.embed = other.embed, None
    report = ucp.load(other, ckpt, map=rename)
    assert torch.equal(other.tokens.weight, model.embed.weight)
    assert report.renamed == {"tokens.weight": "embed.weight"}


def test_a_rename_of_nothing_is_a_spelling_mistake(source: Any) -> None:
    with pytest.raises(ucp.FitError, match=r"map: embd\.weight"):
        ucp.load(Net(), source[2], map={"embd.weight": "embed.weight"})


def test_wrappers_do_not_change_names(source: Any) -> None:
    model, _, ckpt = source
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    other = Net()
    other.norm = checkpoint_wrapper(other.norm)
    wrapped = torch.compile(nn.DataParallel(other), backend="eager")
    assert any(name.startswith("_orig_mod.module.") for name, _ in wrapped.named_parameters())
    report = ucp.load(wrapped, ckpt)
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert report.renamed["_orig_mod.module.norm._checkpoint_wrapped_module.bias"] == "norm.bias"


def test_names_that_wrappers_make_ambiguous_match_nothing(tmp_path: Path) -> None:
    catalog, store = make(
        str(tmp_path), {"module.w": {"value": torch.ones(2)}, "_orig_mod.w": {"value": torch.zeros(2)}}
    )
    with pytest.raises(ucp.FitError, match="missing: w\n"):
        ucp.load({"w": torch.empty(2)}, Checkpoint(catalog, store))


def test_masters_round_to_the_working_dtype(source: Any) -> None:
    model, _, ckpt = source
    other = Net().bfloat16()
    resumed = adamw(other)
    report = ucp.load((other, resumed), ckpt)
    assert torch.equal(other.embed.weight, model.embed.weight.bfloat16())
    # The optimizer keeps its moments in the parameter's dtype, and could not step with others.
    assert resumed.state[other.norm.bias]["exp_avg"].dtype == torch.bfloat16
    assert Cast("norm.bias", "value", "float32", "bfloat16") in report.casts
    assert Cast("norm.bias", "exp_avg_sq", "float32", "bfloat16") in report.casts
    train_step(other, resumed)


@pytest.mark.parametrize(
    ("stored", "wanted", "fits"),
    [
        (torch.float32, torch.int32, False),
        (torch.int64, torch.float64, False),
        (torch.int64, torch.int32, False),
        (torch.int32, torch.int64, True),
        (torch.bool, torch.uint8, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.bfloat16, True),
    ],
)
def test_numbers_stay_what_they_are(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, fits: bool) -> None:
    truth = torch.tensor([0.0, 1.0, 1.00390625, 77.77]).to(stored)
    ckpt = Checkpoint(*make(str(tmp_path), {"x": {"value": truth}}))
    target = torch.full((4,), 9).to(wanted)
    if fits:
        ucp.load({"x": target}, ckpt)
        assert torch.equal(target, truth.to(wanted))
    else:
        with pytest.raises(ucp.FitError, match="dtype: x"):
            ucp.load({"x": target}, ckpt)


def test_dicts_of_tensors_and_of_states(source: Any) -> None:
    model, optimizer, ckpt = source
    target: dict[str, Any] = {
        "embed.weight": torch.empty(11, 6),
        "norm.bias": {"exp_avg": torch.empty(6), "step": torch.zeros(())},
    }
    ucp.load(target, ckpt, only=["embed.*", "norm.bias"])
    assert torch.equal(target["embed.weight"], model.embed.weight)
    assert torch.equal(target["norm.bias"]["exp_avg"], optimizer.state[model.norm.bias]["exp_avg"])
    assert target["norm.bias"]["step"] == 3


def test_views_are_filled_and_what_lies_between_is_not(source: Any) -> None:
    model, _, ckpt = source
    memory = torch.full((6, 30), 9.0)
    ucp.load({"embed.weight": memory[:, 2:24:2].T}, ckpt, only=["embed.weight"])
    assert torch.equal(memory[:, 2:24:2].T, model.embed.weight)
    assert (memory[:, 1::2] == 9).all()
    assert (memory[:, 24:] == 9).all()


def test_a_tie_of_the_target_needs_equal_tensors_in_the_source(tmp_path: Path) -> None:
    same = torch.randn(11, 6)
    tensors = {name: {"value": same.clone()} for name in ("embed.weight", "head.weight")}
    rest = {"norm.weight": {"value": torch.ones(6)}, "norm.bias": {"value": torch.ones(6)}}
    rest["calls"] = {"value": torch.tensor(1)}
    model = Net()
    ucp.load(model, Checkpoint(*make(str(tmp_path / "same"), {**tensors, **rest})))
    assert torch.equal(model.head.weight, same)
    tensors["head.weight"]["value"][5, 5] += 1
    with pytest.raises(ucp.ConflictError, match=r"embed.weight.* and head.weight"):
        ucp.load(Net(), Checkpoint(*make(str(tmp_path / "other"), {**tensors, **rest})))


def test_a_tie_of_the_source_fills_both_tensors_of_the_target(source: Any) -> None:
    model, _, ckpt = source
    other = Net(tied=False)
    ucp.load(other, ckpt)
    assert torch.equal(other.embed.weight, other.head.weight)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_another_optimizer_is_refused(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    with pytest.raises(ucp.FitError) as no:
        ucp.load((other, torch.optim.SGD(other.parameters(), momentum=0.9)), ckpt, hyper_parameters=False)
    assert "missing: norm.bias[momentum_buffer]" in str(no.value)
    assert "unexpected: norm.bias[exp_avg]" in str(no.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.01}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
        (torch.optim.Adafactor, {"lr": 0.01}),
    ],
)
def test_optimizers_of_torch(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        train_step(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {name: {"value": p.detach()} for name, p in model.named_parameters()}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            small = not torch.is_tensor(value) or value.ndim == 0
            (scalars if small else tensors).setdefault(names[id(parameter)], {})[key] = value
    tensors["calls"] = {"value": model.calls}
    catalog, store = make(str(tmp_path), tensors, ties={"head.weight": "embed.weight"}, cut=flat(2))
    for name, found in scalars.items():
        held: Any = catalog.tensors[name].scalars
        held.update({key: ucp.Scalar(float(value), "float32") for key, value in found.items()})
    other = Net()
    resumed = kind(other.parameters(), **options)
    ucp.load((other, resumed), Checkpoint(catalog, store), hyper_parameters=False)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(
            resumed.state.get(mine, {}), {k: v for k, v in optimizer.state[theirs].items() if v is not None}
        )
    assert [train_step(model, optimizer) for _ in range(2)] == [train_step(other, resumed) for _ in range(2)]


def test_a_parameter_that_never_had_a_gradient_starts_without_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    model.norm.bias.requires_grad_(False)
    optimizer = adamw(model)
    train_step(model, optimizer)
    ckpt = checkpoint(tmp_path, model, optimizer)
    other, resumed = trained()
    report = ucp.load((other, resumed), ckpt)
    assert report.without_state == ("norm.bias",)
    assert other.norm.bias not in resumed.state


def test_a_source_without_optimizer_state(tmp_path: Path) -> None:
    model, optimizer = trained()
    tensors = {name: {"value": p.detach()} for name, p in model.state_dict().items() if name != "head.weight"}
    ckpt = Checkpoint(*make(str(tmp_path), tensors, ties={"head.weight": "embed.weight"}))
    with pytest.raises(ucp.FitError, match="missing: optimizer state"):
        ucp.load((model, optimizer), ckpt)
    ucp.load(model, ckpt)


def test_schedulers_follow_the_groups(tmp_path: Path) -> None:
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(3):
        train_step(model, optimizer)
        schedule.step()
    ckpt = checkpoint(tmp_path, model, optimizer, state={"lr_scheduler": schedule.state_dict(), "rng": 1})
    other = Net()
    resumed = torch.optim.AdamW([{"params": list(other.norm.parameters())}, {"params": [other.embed.weight]}])
    again = torch.optim.lr_scheduler.StepLR(resumed, 2, gamma=0.5)
    report = ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": again}, ckpt)
    assert again.base_lrs == [0.01, 0.02]
    assert report.not_loaded == ("rng",)
    for _ in range(3):
        assert train_step(model, optimizer) == train_step(other, resumed)
        schedule.step()
        again.step()
        assert again.get_last_lr() == schedule.get_last_lr()[::-1]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 5)
    with pytest.raises(ucp.FitError, match=r"missing: lr_scheduler.T_max"):
        ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": cosine}, ckpt)


def test_damage_is_found(source: Any, tmp_path: Path) -> None:
    _, _, ckpt = source
    path = tmp_path / "rank1.bin"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    model = Net()
    optimizer = adamw(model)
    with pytest.raises(ucp.CorruptError, match=r"rank1\.bin"):
        ucp.load((model, optimizer), ckpt)
    assert not optimizer.state
    ucp.load((model, optimizer), ckpt, verify=False)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_read_stops_all_workers(source: Any, tmp_path: Path, workers: int) -> None:
    (tmp_path / "rank2.bin").write_bytes(b"short")
    with pytest.raises(ucp.CorruptError, match=r"rank2\.bin.*early"):
        ucp.load(Net(), source[2], workers=workers)


def test_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucp.train.transfer.BLOCK_BYTES", 64)
    truth = torch.randn(7, 5, 9)
    ckpt = Checkpoint(*make(str(tmp_path), {"x": {"value": truth}, "y": {"value": truth[0, 0, 0]}}, cut=flat(3)))
    target = {"x": torch.empty(9, 5, 7).permute(2, 1, 0), "y": torch.empty((), dtype=torch.float64)}
    ucp.load(target, ckpt, workers=3)
    assert torch.equal(target["x"], truth)
    assert target["y"] == truth[0, 0, 0].double()


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (3, "int"),
        ({}, "nothing to load into"),
        ({"x": {"value": 3}}, r"x\[value\]"),
        ({"model": {"x": torch.ones(1)}, "y": object()}, "object"),
    ],
)
def test_targets_of_unknown_kinds(source: Any, target: Any, problem: str) -> None:
    with pytest.raises(ucp.UsageError, match=problem):
        ucp.load(target, source[2])


def test_memory_that_cannot_be_filled(source: Any) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ucp.FitError, match=r"memory: norm.weight \(.*meta device.*to_empty"):
        ucp.load(model, source[2])


@pytest.mark.gpu
def test_onto_an_accelerator(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucp.train.transfer.BLOCK_BYTES", 64)
    model, _, ckpt = source
    other = Net().to(torch.accelerator.current_accelerator())
    resumed = adamw(other, fused=True)
    ucp.load((other, resumed), ckpt)
    assert_same_state({k: v.cpu() for k, v in other.state_dict().items()}, model.state_dict())
    half = Net().to(torch.accelerator.current_accelerator()).bfloat16()
    ucp.load(half, ckpt)
    assert torch.equal(half.embed.weight.cpu(), model.embed.weight.bfloat16())
