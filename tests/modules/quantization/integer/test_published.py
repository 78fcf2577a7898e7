"""GELU and softmax of I-BERT and I-ViT: their errors over all inputs, and the formulas that were published."""

import math

import pytest
import torch
from torch.nn import functional as F

from fairseq.modules.quantization.integer import functional
from fairseq.modules.quantization.integer.attention import ONE
from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.published import attend_published, gelu, gelu_constants, shift_exp


@pytest.mark.parametrize(("functions", "bound"), [("ibert", 0.0184), ("ivit", 0.047)])
def test_gelu_on_all_inputs(functions, bound):
    unit = 6 / 2**15
    t = torch.cat((torch.arange(-(2**16), 2**16), torch.tensor([-(2**23), 2**23 - 1])))
    with checked():
        got = gelu(t, gelu_constants(functions, 6.0), functions).double() * unit
    near = t.abs() < 2**15
    error = (got - F.gelu(t.double() * unit)).abs()
    assert 0.9 * bound < error[near].max() < bound
    if functions == "ibert":
        assert error[~near].max() < 1e-6  # exactly x or 0
        other, scale = functional.gelu(t[near], unit)  # the layer's reference, of a finer scale inside
        assert (got[near] - other * scale).abs().max() < 2 * unit
    else:
        assert (got[-1] - t[-1] * unit).abs() <= t[-1] * unit / 127  # the sigmoid's 1 is 127 / 128 or 1
        assert got[-2] == 0


def test_the_exponential_of_shifts():
    one = 5461
    d = torch.arange(0, 14 * one)
    with checked():
        got = shift_exp(d, one) / (one << 17)
    p = d.double() / one * 1.4375
    expected = (1 - (p % 1) / 2) * torch.exp2(-p.floor())
    assert (got - expected).abs().max() < 3 / one  # two shifts rounded down, and once more at a power of two
    assert (got - torch.exp(-d.double() / one)).abs().max() < 0.066


@pytest.mark.parametrize(("functions", "base", "bound"), [("ibert", 2.0, 0.012), ("ivit", math.e, 0.03)])
def test_probabilities(functions, base, bound):
    draw = torch.Generator().manual_seed(0)
    u = (torch.randn(3, 9, 20, generator=draw) * 2 * ONE).long()
    v = torch.eye(20, dtype=torch.int8).expand(3, 20, 20) * 127
    with checked():
        got = attend_published(u, v, functions).double() / (127 * 2**12)
    expected = torch.softmax(u.double() / ONE * math.log(base), -1)
    assert (got - expected).abs().max() < bound
    steps = got * (256 if functions == "ibert" else 2**15)
    assert (steps - steps.round()).abs().max() < 0.04  # normalized first: whole steps of 8 and of 15 bits
    assert (got.sum(-1) <= 1).all()
    alone = torch.zeros(1, 1, 20, dtype=torch.int64)
    alone[..., 0] = 2**30
    assert attend_published(alone, v[:1], functions)[0, 0, 0] == round(
        127 * 2**12 * (1 - 2.0 ** -(8 if base == 2 else 15))
    )
