"""Symmetric scales, rounding onto them, percentiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.modules.quantization.integer import (
    SymmetricQuantFunction,
    get_percentile_min_max,
    linear_quantize,
    symmetric_linear_quantization_params,
)


@given(
    largest=st.floats(1e-30, 1e30),
    bits=st.integers(2, 23),
    negative=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_largest_magnitude_maps_to_the_last_integer(largest, bits, negative, dtype):
    end = torch.tensor([largest], dtype=dtype)
    low, high = (-end, end / 3) if negative else (-end / 3, end)
    scale = symmetric_linear_quantization_params(bits, low, high)
    assert scale.shape == (1,)
    assert scale.dtype == dtype
    q = SymmetricQuantFunction.apply(torch.stack([low, high]), bits, False, scale)
    assert q.abs().max() == 2 ** (bits - 1) - 1
    assert ((q * scale - torch.stack([low, high])).abs() <= 0.51 * scale).all()


def test_per_channel_gives_one_scale_each_and_otherwise_one_covers_all():
    low, high = torch.tensor([-1.0, -0.1, 0.0]), torch.tensor([0.5, 0.2, 0.0])
    each = symmetric_linear_quantization_params(8, low, high, per_channel=True)
    assert torch.allclose(each * 127, torch.tensor([1.0, 0.2, 1.0]))  # nothing but 0: the scale of [-1, 1]
    assert torch.allclose(symmetric_linear_quantization_params(8, low, high) * 127, torch.tensor([1.0]))
    assert symmetric_linear_quantization_params(8, -1.0, 0.5).dtype == torch.float64
    assert symmetric_linear_quantization_params(8, low.half(), high.half()).dtype == torch.float32


def test_scales_are_never_zero():
    tiny = torch.tensor([1e-44])
    assert symmetric_linear_quantization_params(8, -tiny, tiny) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, torch.tensor([float("nan")]), torch.tensor([1.0])), "finite"),
        ((8, torch.tensor([-1.0]), torch.tensor([1.0, 2.0])), "one shape"),
        ((33, torch.tensor([-1.0]), torch.tensor([1.0])), "num_bits must be from 2 to 32"),
    ],
)
def test_wrong_ranges(arguments, message):
    with pytest.raises(ValueError, match=message):
        symmetric_linear_quantization_params(*arguments)


def test_linear_quantize_rounds_half_to_even_along_the_axis_told():
    x = torch.tensor([[0.5, 1.5], [2.5, -3.5]])
    assert linear_quantize(x, torch.ones(1), 0.0).tolist() == [[0, 2], [2, -4]]
    assert linear_quantize(x, torch.ones(1), 3.0).tolist() == [[4, 4], [6, 0]]  # x + 3 is rounded
    scale = torch.tensor([1.0, 0.5])
    assert linear_quantize(x, scale, 0.0).tolist() == [[0, 2], [5, -7]]
    assert linear_quantize(x, scale, 0.0, axis=-1).tolist() == [[0, 3], [2, -7]]
    with pytest.raises(ValueError, match=r"3 scales do not fit axis 0 of a tensor of shape \(2, 2\)"):
        linear_quantize(x, torch.ones(3), 0.0)


def test_linear_quantize_inplace_writes_into_the_input():
    x = torch.tensor([0.26, -0.74])
    kept = x.clone()
    out = linear_quantize(x, torch.tensor([0.5]), 0.0)
    assert torch.equal(x, kept)
    assert linear_quantize(x, torch.tensor([0.5]), 0.0, inplace=True) is x
    assert torch.equal(x, out)


def test_linear_quantize_refuses_what_its_dtype_does_not_hold():
    with pytest.raises(OverflowError, match="linear_quantize: 16777218"):
        linear_quantize(torch.tensor([16777218.0]), torch.ones(1), 0.0)
    assert linear_quantize(torch.tensor([16777217.0], dtype=torch.float64), torch.ones(1), 0.0) == 16777217


@given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=200), lower=st.integers(0, 50))
def test_percentiles_are_ranked_values(values, lower):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = get_percentile_min_max(x, lower, 100 - lower)
    assert low in values
    assert high in values
    assert (x < low).double().mean() <= lower / 100 + 1 / len(values)
    assert (x > high).double().mean() <= lower / 100 + 1 / len(values)
    if lower == 0:
        assert (low, high) == (min(values), max(values))


def test_percentiles_of_a_known_tensor():
    x = torch.arange(1000.0).reshape(10, 100)[:, torch.randperm(100)]
    assert get_percentile_min_max(x, 1, 99) == (10, 989)
    low, high = get_percentile_min_max(x, 0, 100, output_tensor=True)
    assert (low.ndim, float(low), float(high)) == (0, 0, 999)
    for wrong in ((-1, 50), (60, 50), (0, 101)):
        with pytest.raises(ValueError, match="percentiles must be from 0 to 100, lower <= upper"):
            get_percentile_min_max(x, *wrong)
