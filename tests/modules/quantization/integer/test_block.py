"""A whole transformer block: the chain of integer layers against the float block."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq.modules.quantization.integer import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantLinear,
    freeze_model,
)

D, HEADS, HIDDEN = 32, 4, 64


class FloatBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.query, self.key, self.value, self.output = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (split(layer(h)) for layer in (self.query, self.key, self.value))
        attention = F.softmax(q @ k.mT / (D // HEADS) ** 0.5, dim=-1)
        x = x + self.output(merge(attention @ v))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class IntegerBlock(nn.Module):
    """The widths of I-BERT: weights and activations 8, residual 22, LayerNorm 32, bias and accumulators 32."""

    def __init__(self, block, quant_mode="symmetric"):
        super().__init__()
        mode = {"quant_mode": quant_mode}
        for name, layer in block.named_children():
            new = (
                IntLayerNorm(32, **mode)
                if isinstance(layer, nn.LayerNorm)
                else QuantLinear(8, per_channel=True, **mode)
            )
            new.set_param(layer)
            self.add_module(name, new)
        self.softmax, self.gelu = IntSoftmax(8, **mode), IntGELU(**mode)
        names = ("norm1", "query", "key", "value", "context", "norm2", "up")
        self.acts = nn.ModuleDict({name: QuantAct(8, **mode) for name in names})
        self.acts.update({name: QuantAct(22, **mode) for name in ("input", "attention", "result")})

    def forward(self, x):
        x, xs = self.acts["input"](x)
        h, hs = self.acts["norm1"](*self.norm1(x, xs))
        (q, qs), (k, ks), (v, vs) = (
            self.acts[name](*layer(h, hs))
            for name, layer in (("query", self.query), ("key", self.key), ("value", self.value))
        )
        root = (D // HEADS) ** 0.5
        scores = split(q.double()) @ split(k.double()).mT / root
        attention, s = self.softmax(scores, None if qs is None else qs * ks / root)
        context = merge(attention.double() @ split(v.double()))
        context, s = self.acts["context"](context, None if s is None else s * vs)
        context, s = self.output(context.to(h.dtype), s)
        x, xs = self.acts["attention"](context, s, x, xs)
        h, hs = self.acts["norm2"](*self.norm2(x, xs))
        h, hs = self.acts["up"](*self.gelu(*self.up(h, hs)))
        return self.acts["result"](*self.down(h, hs), x, xs)


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)  # (B, heads, N, d)


def merge(x):
    return x.transpose(-3, -2).flatten(-2)  # (B, N, D)


def make():
    torch.manual_seed(0)
    block, x = FloatBlock(), torch.randn(4, 10, D)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return block, x


def test_integer_block_follows_the_float_block(device):
    """Within 2% of the output's spread on average, and 10% at worst, with 8-bit weights and activations."""
    block, x = make()
    block, x = block.to(device), x.to(device)
    integer = IntegerBlock(block).to(device)
    with torch.no_grad():
        integer(x)
        freeze_model(integer)
        integer.eval()
        y, scale = integer(x)
        expected = block(x)
    error = (y - expected).abs() / expected.std()
    assert error.mean() < 0.02
    assert error.max() < 0.1
    assert torch.equal(y.double(), (torch.round(y.double() / scale) * scale).float().double())
    alone = torch.cat([integer(image[None])[0] for image in x])
    assert torch.equal(alone, y)  # an image's result does not depend on its neighbours


def test_block_in_none_is_the_float_block():
    block, x = make()
    y, scale = IntegerBlock(block, "none")(x)
    expected = block(x)
    assert scale is None
    # the attention is computed in float64, which changes the rounding of its sums of 32 to 64 float32 terms
    assert (y - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_block_trains_and_its_state_loads_into_a_fresh_one():
    block, x = make()
    integer = IntegerBlock(block)
    target = torch.randn_like(x)
    optimizer = torch.optim.SGD(integer.parameters(), lr=0.3)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(integer(x)[0], target)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in integer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    fresh = IntegerBlock(FloatBlock()).eval()
    with pytest.raises(RuntimeError, match="has not observed a range"):
        fresh(x)
    fresh.load_state_dict(integer.state_dict())
    assert torch.equal(fresh(x)[0], integer.eval()(x)[0])
    assert torch.equal(copy.deepcopy(integer)(x)[0], integer(x)[0])
