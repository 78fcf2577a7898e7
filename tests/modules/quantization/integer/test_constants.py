"""The constants keep the ranges that the kernels' arithmetic rests on, whatever the scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.modules.quantization.integer import constants

scales = st.floats(2.0**-60, 2.0**30).map(lambda scale: torch.tensor([scale], dtype=torch.float64))


@given(scales)
def test_fine_scale(scale):
    k, fine = constants.fine_scale(scale)
    assert torch.equal(torch.ldexp(fine, k), scale)
    assert 2.0**-15 <= fine < 2.0**-14


@given(scales, st.sampled_from([2, 4]))
def test_erf_constants(scale, degree):
    found = constants.erf_constants(scale, degree)
    assert 0 < found.b < 2**17
    assert 0 < found.c < 2**42
    assert 2**14 <= found.one <= 2**15
    assert found.clip == 2**52 or found.clip.double() * 2.0 ** int(found.shift) >= found.b
    assert int(found.clip) << max(int(found.shift), 0) < 2**62


@given(scales)
def test_exp_constants(scale):
    found = constants.exp_constants(scale)
    assert 2**29 <= found.c < 2**32
    assert found.c / 2**constants.EXP_HALVINGS < 0.5
    assert int(found.clip) << max(int(found.shift), 0) < 2**61


def test_degree_is_checked():
    with pytest.raises(ValueError, match="degree must be one of 2, 4, got 3"):
        constants.erf_constants(torch.tensor([0.1], dtype=torch.float64), 3)


@given(scales, st.integers(1, 5000), st.sampled_from([0.0, 1e-12, 1e-5, 1.0]))
def test_eps_leaves_room_for_the_squares(scale, size, eps):
    weight, bias = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    found = constants.layernorm_constants(scale, weight, bias, eps, 32)
    assert size <= 4**found.half_log
    assert found.eps_mantissa * 2.0 ** -(found.eps_exponent + 2 * found.eps_shift) <= 2.0**48
    assert (found.eps_mantissa == 0) == (eps == 0)


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_eps_is_checked(eps):
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        constants.layernorm_constants(one, one, one, eps, 8)


def test_bias_and_weight_are_checked():
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="bias holds NaN or Inf"):
        constants.layernorm_constants(one, one, one * float("nan"), 1e-5, 8)
    with pytest.raises(ValueError, match="finite"):
        constants.layernorm_constants(one, one * float("inf"), one, 1e-5, 8)
    with pytest.raises(OverflowError, match="IntLayerNorm bias"):
        constants.layernorm_constants(one, one * 1e-9, one, 1e-5, 8)
