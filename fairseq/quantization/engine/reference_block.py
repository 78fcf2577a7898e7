"""What an encoder block computes, in plain PyTorch: slow, and the definition of correct."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.quantization.engine.spec import BlockSpec, Call, Norm


def run(spec: BlockSpec, call: Call, x: Tensor) -> Tensor:
    """The block's output for hidden states, floating (rows, width) -> the same, in their dtype."""
    h = x + _scaled(normalize(spec.norm("post1"), attend(spec, call, normalize(spec.norm("norm1"), x))), spec.scale1)
    return h + _scaled(normalize(spec.norm("post2"), _mlp(spec, normalize(spec.norm("norm2"), h))), spec.scale2)


def attend(spec: BlockSpec, call: Call, x: Tensor) -> Tensor:
    """Attention with its projections: (rows, width) -> (rows, width)."""
    places = _placed(call, x)  # (images * tokens, width)
    query, key, value = (_heads(spec, call, part) for part in _projected(spec, places))  # (images, heads, tokens, size)
    query, key = normalize(spec.norm("query_norm"), query), normalize(spec.norm("key_norm"), key)
    query, key = _rotated(call, query), _rotated(call, key)
    scale = spec.scaling if spec.head_scale is None else spec.head_scale.to(x.dtype).view(-1, 1, 1)
    scores = query @ key.transpose(-1, -2) * scale  # (images, heads, tokens, tokens)
    if call.bias is not None:
        scores = scores + call.bias.to(x.dtype)
    if call.mask is not None:
        repeated = call.mask.to(x.dtype)[torch.arange(call.images, device=x.device) % len(call.mask)]
        scores = scores + repeated[:, None]
    attended = torch.softmax(scores, dim=-1) @ value
    joined = attended.transpose(1, 2).reshape(call.images * call.tokens, -1)
    return _returned(call, spec.layers["output"](normalize(spec.norm("attended_norm"), joined)))


def normalize(norm: Norm, x: Tensor) -> Tensor:
    """(..., width) -> the same."""
    if norm.kind == "none":
        return x
    weight, bias = (None if t is None else t.to(x.dtype) for t in (norm.weight, norm.bias))
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.epsilon)
    if norm.kind == "l2":
        return F.normalize(x, dim=-1, eps=norm.epsilon)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)
    return x if weight is None else x * weight


def activate(activation: str, x: Tensor) -> Tensor:
    """One of ``ACTIVATIONS``."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
    return functions[activation](x)


def _mlp(spec: BlockSpec, x: Tensor) -> Tensor:
    hidden = spec.layers["fc1"](x)
    if spec.gating == "layer":
        hidden = activate(spec.activation, spec.layers["gate"](x)) * hidden
    elif spec.gating == "halves":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activate(spec.activation, gate) * up
    else:
        hidden = activate(spec.activation, hidden)
    return spec.layers["fc2"](normalize(spec.norm("hidden_norm"), hidden))


def _projected(spec: BlockSpec, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, (rows, heads * head_size) each."""
    query = spec.layers["query"](x)
    if spec.query_bias is not None:
        query = query + spec.query_bias.to(x.dtype)
    if spec.projections == 1:
        return query.chunk(3, dim=-1)
    return query, spec.layers["key"](x), spec.layers["value"](x)


def _heads(spec: BlockSpec, call: Call, x: Tensor) -> Tensor:
    return x.reshape(call.images, call.tokens, spec.heads, spec.head_size).transpose(1, 2)


def _rotated(call: Call, x: Tensor) -> Tensor:
    """Each row of each head, (..., tokens, head_size), rotated."""
    if call.cos is None or call.sin is None:
        return x
    if call.neighbours:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x * call.cos.to(x.dtype) + turned * call.sin.to(x.dtype)


def _placed(call: Call, x: Tensor) -> Tensor:
    """The rows where attention takes them, zeros for padding."""
    if call.rows is None:
        return x
    rows = call.rows.long()
    return torch.where((rows >= 0)[:, None], x[rows.clamp(min=0)], torch.zeros((), dtype=x.dtype, device=x.device))


def _returned(call: Call, x: Tensor) -> Tensor:
    """The rows back where hidden states have them, without padding."""
    if call.rows is None:
        return x
    rows, kept = call.rows.long(), call.rows >= 0
    out = x.new_empty(call.row_count, x.shape[-1])
    out[rows[kept]] = x[kept]
    return out


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)
