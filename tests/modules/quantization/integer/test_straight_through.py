"""Roundings against exact fractions, and their gradients against finite differences of the surrogate."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.modules.quantization.integer import (
    SymmetricQuantFunction,
    batch_frexp,
    fixedpoint_mul,
    floor_ste,
    round_ste,
)


def finite_difference(surrogate, x, h=1e-6):
    """The derivative of an elementwise function."""
    return (surrogate(x + h) - surrogate(x - h)) / (2 * h)


def gradient(function, x, weights):
    x = x.clone().requires_grad_()
    (function(x) * weights).sum().backward()
    return x.grad


def test_floor_and_round():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 2.6])
    assert floor_ste.apply(x).tolist() == [-2, -1, 0, 1, 2, 2]
    assert round_ste.apply(x).tolist() == [-2, 0, 0, 2, 2, 3]  # half to even
    weights = torch.randn(6)
    for function in (floor_ste.apply, round_ste.apply):
        assert torch.equal(gradient(function, x, weights), weights)


@pytest.mark.parametrize("bits", [4, 8, 22, 32])
def test_symmetric_quantization_gradient(bits, device):
    """1 / scale inside the range and 0 outside, as the surrogate clamp(x / scale, -n, n) has it."""
    n, scale = 2 ** (bits - 1) - 1, torch.tensor([0.037], device=device)
    x = torch.linspace(-2 * n, 2 * n, 997, device=device, dtype=torch.float64) * 0.037
    weights = torch.randn(997, device=device, dtype=torch.float64)
    h = 0.25 * 0.037  # of a function without curvature
    expected = finite_difference(lambda x: (x / scale.double()).clamp(-n, n), x, h) * weights
    got = gradient(lambda x: SymmetricQuantFunction.apply(x, bits, False, scale), x, weights)
    away = ((x / scale).abs() - n).abs() > 1  # the corner of the surrogate has no derivative
    # The upstream gradient has the dtype of the integers. x + h, x - h and both quotients, up to 2 n, are rounded in
    # float64; their difference is a half.
    carrier = torch.float32 if bits <= 23 else torch.float64
    rounding = torch.finfo(carrier).eps + 16 * n * torch.finfo(torch.float64).eps
    assert torch.allclose(got[away], expected[away], rtol=rounding, atol=0)
    assert (got == 0).any()
    assert (got != 0).any()


def test_symmetric_quantization_rounds_clamps_and_keeps_dtypes():
    scale = torch.tensor([0.5])
    x = torch.tensor([0.25, 0.75, 100.0, -100.0, 3.5, -3.5])
    assert SymmetricQuantFunction.apply(x, 4, False, scale).tolist() == [0, 2, 7, -7, 7, -7]
    for bits, dtype in ((8, torch.float32), (23, torch.float32), (24, torch.float64)):
        assert SymmetricQuantFunction.apply(x.half(), bits, False, scale).dtype == dtype
    leaf = x.half().requires_grad_()
    SymmetricQuantFunction.apply(leaf, 8, False, scale).sum().backward()
    assert leaf.grad.dtype == torch.float16


def test_symmetric_quantization_of_32_bits_is_exact():
    values = torch.tensor([2**31 - 1, 2**31 - 2, 2**24 + 1, -(2**31) + 1], dtype=torch.float64)
    assert torch.equal(SymmetricQuantFunction.apply(values * 0.25, 32, False, torch.tensor([0.25])), values)


def test_symmetric_quantization_of_a_square_matrix_goes_along_the_axis_told():
    x, scale = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 0.1])
    assert SymmetricQuantFunction.apply(x, 8, False, scale).tolist() == [[1, 1], [10, 10]]
    assert SymmetricQuantFunction.apply(x, 8, False, scale, -1).tolist() == [[1, 10], [1, 10]]
    weights = torch.randn(2, 2)
    for axis, shape in ((0, (2, 1)), (-1, (1, 2))):
        got = gradient(lambda x, axis=axis: SymmetricQuantFunction.apply(x, 8, False, scale, axis), x, weights)
        assert torch.allclose(got, weights / scale.reshape(shape))


def test_symmetric_quantization_refuses():
    x, one = torch.ones(3), torch.ones(1)
    with pytest.raises(ValueError, match="percentile_mode must be False"):
        SymmetricQuantFunction.apply(x, 8, True, one)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            SymmetricQuantFunction.apply(x, 8, False, one * wrong)
    with pytest.raises(ValueError, match="2 scales do not fit axis 0"):
        SymmetricQuantFunction.apply(x, 8, False, torch.ones(2))


def exact(q, scale, new_scale):
    m, e = batch_frexp(torch.tensor([scale], dtype=torch.float64) / torch.tensor([new_scale], dtype=torch.float64))
    return round(Fraction(q * int(m)) / Fraction(2) ** int(e))


@given(
    q=st.lists(st.integers(-(2**31), 2**31), min_size=1),
    scale=st.floats(2.0**-30, 2.0),
    new_scale=st.floats(2.0**-30, 2.0),
    bits=st.sampled_from([4, 8, 16, 22, 23, 24, 32]),
)
def test_fixedpoint_mul_is_exact(q, scale, new_scale, bits):
    n = 2 ** (bits - 1) - 1
    x, s = torch.tensor(q, dtype=torch.float64) * scale, torch.tensor([scale], dtype=torch.float64)
    z = fixedpoint_mul.apply(x, s, bits, "symmetric", torch.tensor([new_scale], dtype=torch.float64))
    assert z.dtype == (torch.float32 if bits <= 23 else torch.float64)
    assert z.tolist() == [max(-n, min(n, exact(v, scale, new_scale))) for v in q]


@given(q=st.integers(-(2**20), 2**20), r=st.integers(-(2**20), 2**20), scales=st.tuples(*[st.floats(1e-3, 1)] * 3))
def test_fixedpoint_mul_adds_the_identity(q, r, scales):
    s, t, z = (torch.tensor([scale], dtype=torch.float64) for scale in scales)
    got = fixedpoint_mul.apply(q * s, s, 32, "symmetric", z, r * t, t)
    assert got.item() == exact(q, scales[0], scales[2]) + exact(r, scales[1], scales[2])


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (2, 2, 3, 3)])
def test_fixedpoint_mul_scales_belong_to_the_last_dimension_of_any_rank(shape, device):
    """I-BERT reshaped the scales of a 2-D activation to its rows."""
    q = torch.randint(-1000, 1000, shape, device=device).double()
    s = torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64, device=device)
    z = torch.tensor([0.05], device=device)
    together = fixedpoint_mul.apply(q * s, s, 16, "symmetric", z)
    for column in range(3):
        one = s[column : column + 1]
        assert torch.equal(together[..., column], fixedpoint_mul.apply(q[..., column] * one, one, 16, "symmetric", z))


def test_fixedpoint_mul_gradient(device):
    """That of clamp((x + identity) / z_scale, -n, n), for both inputs."""
    scale, z_scale, n = 0.01, 0.05, 127
    s, z = torch.tensor([scale], device=device).double(), torch.tensor([z_scale], device=device).double()
    x = torch.arange(-2000, 2000, 7, device=device).double() * scale
    identity = torch.full_like(x, 0.5)
    weights = torch.randn_like(x)
    expected = finite_difference(lambda x: ((x + 0.5) / z_scale).clamp(-n, n), x) * weights
    away = (((x + 0.5) / z_scale).abs() - n).abs() > 1  # the corner of the surrogate has no derivative
    for which in (0, 1):
        leaves = [x.clone().requires_grad_(which == 0), identity.clone().requires_grad_(which == 1)]
        (fixedpoint_mul.apply(leaves[0], s, 8, "symmetric", z, leaves[1], s) * weights).sum().backward()
        assert torch.allclose(leaves[which].grad[away], expected[away], rtol=1e-6)
    assert (expected[away] == 0).any()


def test_fixedpoint_mul_refuses():
    x, s = torch.tensor([0.1, 0.2]), torch.tensor([0.1])
    with pytest.raises(ValueError, match="quant_mode must be 'symmetric', got 'none'"):
        fixedpoint_mul.apply(x, s, 8, "none", s)
    with pytest.raises(ValueError, match="give both or neither"):
        fixedpoint_mul.apply(x, s, 8, "symmetric", s, x)
    with pytest.raises(ValueError, match="not a multiple"):
        fixedpoint_mul.apply(x + 0.03, s, 8, "symmetric", s)
    with pytest.raises(OverflowError, match=r"fixedpoint_mul: .*torch\.float32 carries no larger integer"):
        fixedpoint_mul.apply(torch.tensor([2.0**23]), torch.tensor([1.0]), 8, "symmetric", s)
