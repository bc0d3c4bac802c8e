"""Explicit options of a load: new and ignored names, another vocabulary, adapters on a frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ucp
from tests.support.gloo import spawn
from ucp.errors import FitError, UsageError
from ucp.train.items import Rng
from ucp.train.options import trainable
from ucp.train.save import save


class Net(nn.Module):
    """A tied embedding, a layer, and what a test adds."""

    def __init__(self, vocab: int = 10, *, tied: bool = True, **more: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.embed(tokens))
        for name, module in self.named_children():
            if name not in ("embed", "layer", "head"):
                x = x + module(x)
        logits: Tensor = self.head(x)
        return logits


def job(seed: int, vocab: int = 10, steps: int = 0, **more: Any) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net(vocab, **more)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, foreach=False)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        tokens = torch.arange(8).view(2, 4).roll(step)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Net, torch.optim.AdamW]:
    """A checkpoint of a model and optimizer after three steps, and these."""
    url = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    model, optimizer = job(1, steps=3)
    save((model, optimizer), url, step=3)
    return url, model, optimizer


def test_new_names_keep_their_values_and_start_without_states(saved: Any) -> None:
    url, source, _ = saved
    model, optimizer = job(2, extra=nn.Linear(4, 4))
    before = model.extra.weight.clone()
    with pytest.raises(FitError, match=r"missing: extra\.weight") as raised:
        ucp.load((model, optimizer), url)
    assert raised.value.hint is not None and "new=" in raised.value.hint
    report = ucp.load((model, optimizer), url, new="extra.*")
    assert report.missing == ("extra.weight", "extra.bias")
    assert torch.equal(model.extra.weight, before)
    assert torch.equal(model.layer.weight, source.layer.weight)
    assert model.extra.weight not in optimizer.state
    train(model, optimizer, 1)
    assert (optimizer.state[model.layer.weight]["step"], optimizer.state[model.extra.weight]["step"]) == (4, 1)


def test_an_optimizer_that_was_saved_before_its_first_step(tmp_path: Path) -> None:
    url = str(tmp_path / "fresh")
    save(job(1), url)
    model, optimizer = job(2, steps=2)
    report = ucp.load((model, optimizer), url)
    assert not optimizer.state
    assert set(report.without_state) == {"embed.weight", "layer.weight", "layer.bias"}
    save(model, str(tmp_path / "alone"))
    with pytest.raises(FitError, match="the source holds none; load the module alone"):
        ucp.load(job(2), str(tmp_path / "alone"))


def test_new_allows_nothing_else(saved: Any) -> None:
    model, optimizer = job(2, extra=nn.Linear(4, 4), other=nn.Linear(4, 4))
    with pytest.raises(FitError) as raised:
        ucp.load((model, optimizer), saved[0], new=["extra.*"])
    assert "missing: other.weight" in str(raised.value)
    assert "extra" not in str(raised.value)


def test_new_names_may_be_training_state(saved: Any) -> None:
    model, optimizer = job(2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    target = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "rng": Rng(), "count": 3}
    with pytest.raises(FitError, match="missing: lr_scheduler"):
        ucp.load(target, saved[0])
    report = ucp.load(target, saved[0], new=["lr_scheduler", "rng", "count"])
    assert report.missing == ("lr_scheduler", "rng", "count")
    assert target["count"] == 3


def test_ignored_names_of_the_source(tmp_path: Path) -> None:
    url = str(tmp_path / "bigger")
    source = job(1, steps=2, extra=nn.Linear(4, 4))
    save(source, url)
    model, optimizer = job(2)
    with pytest.raises(FitError, match=r"unexpected: extra\.bias"):
        ucp.load((model, optimizer), url)
    report = ucp.load((model, optimizer), url, ignore=["extra.*"])
    assert sorted(report.unexpected) == ["extra.bias", "extra.weight"]
    assert torch.equal(model.layer.weight, source[0].layer.weight)


def test_ignored_optimizer_states(saved: Any) -> None:
    model, _ = job(2)
    optimizer = torch.optim.AdamW([model.embed.weight, model.layer.weight])
    with pytest.raises(FitError, match=r"unexpected: layer\.bias\[optimizer state\]"):
        ucp.load((model, optimizer), saved[0])
    report = ucp.load((model, optimizer), saved[0], ignore="layer.bias")
    assert report.unexpected == ("layer.bias[optimizer state]",)
    assert torch.equal(model.layer.bias, saved[1].layer.bias)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"new": "exta.*"}, r"new: exta\.\* \(no such name in the target\)"),
        ({"ignore": ["exta"]}, r"ignore: exta \(no such name in the source\)"),
        ({"resize": {"embd.weight": 0}}, r"resize: embd\.weight \(no such name in the target\)"),
    ],
)
def test_patterns_that_select_nothing(saved: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(FitError, match=told):
        ucp.load(job(2), saved[0], **options)


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("vocab", [13, 7])
def test_another_vocabulary(saved: Any, vocab: int, stepped: int) -> None:
    url, source, old = saved
    model, optimizer = job(2, vocab)
    # A step of its own, so that states are there already.
    if stepped:
        tokens = torch.arange(6).view(2, 3)
        model(tokens).square().mean().backward()
        optimizer.step()
    with pytest.raises(FitError, match=r"shape: embed\.weight"):
        ucp.load((model, optimizer), url)
    before, common = model.embed.weight.detach().clone(), min(vocab, 10)
    report = ucp.load((model, optimizer), url, resize={"embed.weight": 0})
    assert report.resized == {"embed.weight": ((10, 4), (vocab, 4))}
    assert "1 resized" in str(report)
    assert torch.equal(model.embed.weight[:common], source.embed.weight[:common])
    assert torch.equal(model.embed.weight[common:], before[common:])
    state, expected = optimizer.state[model.embed.weight], old.state[source.embed.weight]
    assert state["step"] == 3
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][:common], expected[name][:common])
        assert not state[name][common:].any()
    assert torch.equal(model.layer.weight, source.layer.weight)


def test_untied_vocabularies_and_patterns(tmp_path: Path) -> None:
    url = str(tmp_path / "untied")
    source, _ = job(1, tied=False)
    save(source, url)
    model, _ = job(2, 12, tied=False)
    report = ucp.load(model, url, resize={"*.weight": 0})
    assert report.resized.keys() == {"embed.weight", "head.weight"}
    assert torch.equal(model.head.weight[:10], source.head.weight)


def test_a_tied_target_of_an_untied_source(tmp_path: Path) -> None:
    url = str(tmp_path / "untied")
    source, _ = job(1, tied=False)
    with torch.no_grad():
        source.head.weight.copy_(source.embed.weight)
    save(source, url)
    model, _ = job(2, 12)
    ucp.load(model, url, resize={"embed.weight": 0})
    assert torch.equal(model.head.weight[:10], source.embed.weight)
    with torch.no_grad():
        source.head.weight[3, 1] += 1
    save(source, str(tmp_path / "apart"))
    with pytest.raises(ucp.ConflictError, match="one tensor in the target"):
        ucp.load(model, str(tmp_path / "apart"), resize={"embed.weight": 0})


def test_a_renamed_and_resized_tensor(saved: Any) -> None:
    room = {"words.weight": torch.full((12, 4), 7.0)}
    report = ucp.load(room, saved[0], map={"words.weight": "embed.weight"}, only="words.weight", resize={"words.*": 0})
    assert torch.equal(room["words.weight"][:10], saved[1].embed.weight)
    assert bool((room["words.weight"][10:] == 7).all())
    assert report.resized == {"embed.weight": ((10, 4), (12, 4))}


def test_resizing_is_along_the_dim_that_was_given(saved: Any) -> None:
    room = {"embed.weight": torch.zeros(10, 6)}
    with pytest.raises(FitError, match=r"shape: embed\.weight"):
        ucp.load(room, saved[0], only="embed.*", resize={"embed.weight": 0})
    ucp.load(room, saved[0], only="embed.*", resize={"embed.weight": 1})
    assert torch.equal(room["embed.weight"][:, :4], saved[1].embed.weight)
    both = {"embed.weight": torch.zeros(12, 6)}
    with pytest.raises(FitError, match=r"shape: embed\.weight"):
        ucp.load(both, saved[0], only="embed.*", resize={"embed.weight": 1})


@pytest.mark.parametrize("dim", [-1, "0", True, None])
def test_a_dim_is_a_number(saved: Any, dim: Any) -> None:
    with pytest.raises(UsageError, match="a dim is a number"):
        ucp.load(job(2), saved[0], resize={"embed.weight": dim})


def test_programs_resize_by_themselves(saved: Any) -> None:
    with pytest.raises(UsageError, match="not for a program"):
        ucp.load(job(2), saved[0], resize={"embed.weight": 0}, program="source")


def resized_on_ranks(rank: int, world: int, url: str, kind: str) -> dict[str, Tensor]:
    model, optimizer = job(2, 13)
    before = model.embed.weight.detach().clone()
    wrapped: nn.Module = model
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        cpu = torch.device("cpu")
        wrapped = FullyShardedDataParallel(model, use_orig_params=kind == "fsdp1", device_id=cpu)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, foreach=False)
    ucp.load((wrapped, optimizer), url, resize={"embed.weight": 0})
    again = f"{url}-{kind}"
    save((wrapped, optimizer), again)
    with ucp.open(again) as ckpt:
        held = ckpt["embed.weight"]
        return {"before": before, **{state: held[state][...] for state in ("value", "exp_avg", "exp_avg_sq")}}


@pytest.mark.parametrize(
    "kind", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow), pytest.param("fsdp1-flat", marks=pytest.mark.slow)]
)
def test_resizing_what_ranks_hold_in_parts(saved: Any, tmp_path: Path, kind: str) -> None:
    url, source, old = saved
    place = tmp_path / "checkpoint"
    place.symlink_to(url)
    found, other = spawn(resized_on_ranks, 2, str(place), kind)
    assert all(torch.equal(found[key], other[key]) for key in found)
    assert torch.equal(found["value"][:10], source.embed.weight.detach())
    assert torch.equal(found["value"][10:], found["before"][10:])
    for state in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[state][:10], old.state[source.embed.weight][state])
        assert not found[state][10:].any()


class Lora(nn.Module):
    """A layer with a low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.down(x))
        return added


def adapted(seed: int) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net(lora=Lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lora"))
    return model, torch.optim.AdamW(model.lora.parameters(), lr=0.01, foreach=False)


def test_adapters_are_saved_alone_and_loaded_onto_a_base(saved: Any, tmp_path: Path) -> None:
    base, source, _ = saved
    model, optimizer = adapted(3)
    ucp.load(model, base, new="lora.*")
    train(model, optimizer, 2)
    url = str(tmp_path / "adapter")
    save({"model": trainable(model), "optimizer": optimizer}, url, step=2)
    with ucp.open(url) as ckpt:
        assert sorted(ckpt) == ["lora.down.weight", "lora.up.weight"]
    again, other = adapted(4)
    ucp.load(again, base, new="lora.*")
    report = ucp.load({"model": trainable(again), "optimizer": other}, url)
    assert report.tensors == 2
    assert torch.equal(again.embed.weight, source.embed.weight)
    train(model, optimizer, 2)
    train(again, other, 2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
def test_a_base_under_the_names_of_peft(saved: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["layer"]))
    assert any("base_layer" in name for name, _ in model.named_parameters())
    base = {
        name: name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        for name, _ in model.named_parameters()
    }
    report = ucp.load(model, saved[0], map=lambda name: base.get(name, name), new="*.lora_*")
    assert {name.split(".")[4] for name in report.missing} == {"default"}
    assert torch.equal(model.base_model.model.layer.base_layer.weight, saved[1].layer.weight)
