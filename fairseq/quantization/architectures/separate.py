"""separated: a copy of a model that calls a Linear layer for each weight which it otherwise multiplies by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.layers import is_pretrained

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Of queries, keys and values."""
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Where modules keep them."""


def separated(model: nn.Module) -> nn.Module:
    """A copy, on the same tensors, whose attention calls its layers; other models come back as they are.

    timm's BEiT and EVA then call their qkv layer and add its bias, and each :class:`torch.nn.MultiheadAttention`, of
    torchvision and OpenCLIP, becomes a :class:`SeparateAttention`. Those within models of transformers stay, whose
    folders have the names of their weights.
    """
    attentions = {} if is_pretrained(model) else _multihead(model)
    if not attentions and not any(hasattr(module, "qkv_bias_separate") for module in model.modules()):
        return model
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    result = copied(model, shared)
    for module in result.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
        if attentions and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # for which it reads the weights itself
    made: dict[int, SeparateAttention] = {}  # blocks may share one
    for name in attentions:
        parent, _, last = name.rpartition(".")
        attention: Any = result.get_submodule(name)
        made[id(attention)] = made.get(id(attention)) or SeparateAttention(attention)
        setattr(result.get_submodule(parent), last, made[id(attention)])
    return result


class SeparateAttention(nn.Module):
    """A :class:`torch.nn.MultiheadAttention` with a Linear layer each for queries, keys, values and the output.

    It is called in the same way and gives the same, but for the order in which sums are rounded.

    Args:
        attention: whose weights, which are shared, and settings it takes; without ``add_bias_kv`` and
            ``add_zero_attn``.
    """

    in_proj_bias = None
    """By which nn.TransformerEncoderLayer knows that it must call this."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        together = attention._parameters.get("in_proj_weight")
        apart = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = together.chunk(3) if together is not None else apart
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)
        for name in HOOKS:
            setattr(self, name, getattr(attention, name))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint that attn_mask is causal; pass attn_mask, too")
        single = query.ndim == 2
        inputs = [x[None] if single else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        layers = (self.get_submodule(name) for name in PROJECTIONS)
        q, k, v = (
            self._heads(layer(x)) for layer, x in zip(layers, inputs, strict=True)
        )  # (B, heads, tokens, size) each
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            products = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = F.dropout((products if mask is None else products + mask).softmax(-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        output = output[0] if single else output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights[0] if single else weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, heads, tokens, size)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _multihead(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """By name, those that a SeparateAttention can stand for; not the model itself."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
        and "forward" not in vars(module)
    }


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer on these tensors."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the products of queries ``q``, (B, heads, tokens, size), and keys.

    Args:
        attention: (tokens, keys), or (B * heads, tokens, keys).
        padding: (B, keys), or (keys).
    """
    total = None
    if attention is not None:
        total = _added(attention, q)
        total = total.unflatten(0, q.shape[:2]) if total.ndim == 3 else total
    if padding is not None:
        keys = _added(padding, q).view(-1, 1, 1, padding.shape[-1])
        total = keys if total is None else total + keys
    return total


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of booleans, True where nothing is looked at, as what is added."""
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask
