"""A decoder that knows tensors by their logical names alone, after ``spec/logical-names.md``.

What a model computes is the judge of a program: if any tensor were swapped, transposed or cut in the wrong place, the
logits of the logical tensors would not be those of the framework's module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the logical tensors do not say. `rotary` is the number of rotated elements of a head, 0 for none."""

    layers: int
    heads: int
    groups: int
    d: int
    rotary: int
    base: float
    eps: float
    act: Callable[[Tensor], Tensor]
    parallel: bool = False
    renormalize: bool = True
    top_k: int = 0


def logits(tensors: Tensors, ids: Tensor, shape: Shape) -> Tensor:
    """Logits ``[tokens, vocab]`` of the sequence `ids`."""
    x = tensors["embed.weight"][ids]
    if "pos_embed.weight" in tensors:
        x = x + tensors["pos_embed.weight"][: len(ids)]
    for layer in range(shape.layers):
        start = f"layers.{layer}."
        of = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        attended = attention(norm(x, of, "attn.norm", shape), of, shape)
        after = x + attended
        inner = norm(x if shape.parallel else after, of, "mlp.norm", shape)
        x = after + (experts(inner, of, shape) if "moe.up" in of else mlp(inner, of, shape))
    x = norm(x, tensors, "norm", shape)
    return linear(x, tensors, "lm_head") if "lm_head.weight" in tensors else x @ tensors["embed.weight"].T


def linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def norm(x: Tensor, tensors: Tensors, name: str, shape: Shape) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if bias is not None:
        return functional.layer_norm(x, weight.shape, weight, bias, shape.eps)
    return x * (x.pow(2).mean(-1, keepdim=True) + shape.eps).rsqrt() * weight


def attention(x: Tensor, of: Tensors, shape: Shape) -> Tensor:
    q = linear(x, of, "attn.q").unflatten(-1, (shape.heads, shape.d))
    k = linear(x, of, "attn.k").unflatten(-1, (shape.groups, shape.d))
    v = linear(x, of, "attn.v").unflatten(-1, (shape.groups, shape.d))
    if "attn.q_norm.weight" in of:
        q, k = norm(q, of, "attn.q_norm", shape), norm(k, of, "attn.k_norm", shape)
    q, k = rotate(q, shape), rotate(k, shape)
    # Query head h uses key head h // r.
    use = torch.arange(shape.heads) // (shape.heads // shape.groups)
    scores = torch.einsum("thd,shd->hts", q, k[:, use]) / shape.d**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    context = torch.einsum("hts,shd->thd", scores.softmax(-1), v[:, use])
    return linear(context.flatten(1), of, "attn.o")


def rotate(x: Tensor, shape: Shape) -> Tensor:
    """Rotary embedding of ``[tokens, heads, d]``: element i turns with element i + rotary/2."""
    if not shape.rotary:
        return x
    half = shape.rotary // 2
    angle = torch.arange(len(x))[:, None] / shape.base ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x[..., :half], x[..., half : shape.rotary], x[..., shape.rotary :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def mlp(x: Tensor, of: Tensors, shape: Shape) -> Tensor:
    up = linear(x, of, "mlp.up")
    inner = shape.act(linear(x, of, "mlp.gate")) * up if "mlp.gate.weight" in of else shape.act(up)
    return linear(inner, of, "mlp.down")


def experts(x: Tensor, of: Tensors, shape: Shape) -> Tensor:
    weights, chosen = (x @ of["moe.router.weight"].T).softmax(-1).topk(shape.top_k)
    if shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(len(of["moe.up"])):
        inner = shape.act(x @ of["moe.gate"][expert].T) * (x @ of["moe.up"][expert].T)
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        out = out + share * (inner @ of["moe.down"][expert].T)
    return out
