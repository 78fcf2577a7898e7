"""The second moment: damped in units that no rescaling changes, and the factor of its inverse."""

import pytest
import torch
from bounds import sum_error
from layer_inputs import layer, statistics

from fairseq.quantization.rounding import second_moment
from fairseq.quantization.rounding.second_moment import damped, inverse_factor


def test_the_damping_grows_until_it_can_be_factorized():
    w, x = layer()
    h = damped(statistics(x).second_moment, w)
    factor = inverse_factor(h - 3 * h.diagonal().mean() * torch.eye(len(h)))  # far from positive definite
    assert torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all()


def test_the_scales_of_the_inputs_do_not_matter():
    """Small integers, scales and a number of tokens that are powers of two: every sum is exact, in whatever order."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-9, 10, (24, 80), generator=generator).float()
    x = torch.randint(-9, 10, (256, 80), generator=generator).float()
    r = torch.randint(-1, 3, (80,), generator=generator).float().exp2()
    h, scaled = damped(statistics(x).second_moment, w), damped(statistics(x * r).second_moment, w / r)
    assert torch.equal(scaled, h * torch.outer(r, r).double())


@pytest.mark.parametrize("block", [256, 7, 1])
def test_the_factor_is_that_of_the_inverse(monkeypatch, block):
    monkeypatch.setattr(second_moment, "BLOCK", block)
    w, x = layer()
    h = damped(statistics(x).second_moment, w)
    factor = inverse_factor(h)
    assert torch.equal(factor, factor.triu())
    error = len(h) * sum_error(len(h), float(torch.linalg.cond(h)), h.dtype)  # Higham, 2002, section 14.3
    torch.testing.assert_close(factor.T @ factor @ h, torch.eye(len(h), dtype=h.dtype), atol=error, rtol=0)
