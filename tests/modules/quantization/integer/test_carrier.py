"""The rule by which integers travel in floats, at its very limits, and what the checks say."""

import pytest
import torch

from fairseq.modules.quantization.integer import carrier
from fairseq.modules.quantization.integer.straight_through import read_integers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_integer_up_to_the_limit_is_read_back(dtype, device):
    limit = carrier.recoverable_limit(dtype)
    assert limit == {torch.float16: 2**9, torch.bfloat16: 2**6, torch.float32: 2**22, torch.float64: 2**51}[dtype]
    near = torch.arange(max(limit - 2**14, 1), limit + 1, device=device).double()
    for scale in (0.1, 1 / 3, 1.9999999, 0.0123456789):
        scale = torch.tensor([scale], dtype=torch.float64, device=device)
        for q in (near, -near):
            assert torch.equal(read_integers((q * scale).to(dtype), scale, "test"), q)


def test_float32_loses_integers_of_24_bits():
    """Why the limit exists: two bits further the same round trip fails."""
    q = torch.arange(2**24 - 2**16, 2**24).double()
    assert not torch.equal(torch.round((q * 0.1).float().double() / 0.1), q)


def test_read_integers_refuses_what_it_cannot_read():
    scale = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(OverflowError, match=r"layer 7: -4194305 is past the limit of \+-4194304; torch.float32"):
        read_integers(torch.tensor([1.0, -(2.0**21) - 0.5]), scale, "layer 7")
    with pytest.raises(ValueError, match="layer 7: the input is not a multiple of its scaling factor"):
        read_integers(torch.tensor([1.0, 0.6]), scale, "layer 7")
    with pytest.raises(ValueError, match="layer 7: the input holds NaN or Inf"):
        read_integers(torch.tensor([1.0, float("nan")]), scale, "layer 7")
    with pytest.raises(ValueError, match="NaN or Inf"):
        read_integers(torch.tensor([float("inf")]), scale, "layer 7")
    assert read_integers(torch.empty(0, 3), scale, "layer 7").shape == (0, 3)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (23, torch.float32), (24, torch.float64)])
def test_carrier_dtype_holds_the_whole_width(bits, dtype):
    assert carrier.carrier_dtype(bits) == dtype
    assert carrier.symmetric_limit(bits) <= carrier.recoverable_limit(dtype)
    assert carrier.symmetric_limit(8) == 127


def test_check_magnitude_names_the_value_on_either_side():
    carrier.check_magnitude(torch.tensor([-5, 5]), 5, "op")
    carrier.check_magnitude(torch.empty(0), 5, "op")
    with pytest.raises(OverflowError, match=r"op: -6 is past the limit of \+-5; do this"):
        carrier.check_magnitude(torch.tensor([-6, 5]), 5, "op", "do this")
    with pytest.raises(OverflowError, match="op: -9223372036854775808"):
        carrier.check_magnitude(torch.tensor([-(2**63)]), 5, "op")


def test_check_integers():
    with pytest.raises(TypeError, match=r"q must be an int64 tensor, got a tensor of torch.int32"):
        carrier.check_integers(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match="got list"):
        carrier.check_integers([1])
    with pytest.raises(OverflowError, match=f"q: {2**51 + 1}"):
        carrier.check_integers(torch.tensor([2**51 + 1]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**-61, 2.0**31])
def test_check_scale_refuses_values(scale):
    with pytest.raises(ValueError, match=r"op: a scaling factor must be from 2\*\*-60 to 2\*\*30"):
        carrier.check_scale(torch.tensor([scale]), torch.zeros(3), "op")


def test_check_scale_shapes():
    x = torch.zeros(2, 3)
    assert carrier.check_scale(0.5, x, "op").shape == (1,)
    assert carrier.check_scale(torch.ones(3), x, "op").dtype == torch.float64
    with pytest.raises(ValueError, match=r"op: 2 scaling factors for an input of shape \(2, 3\)"):
        carrier.check_scale(torch.ones(2), x, "op")
    with pytest.raises(ValueError, match="op needs one scaling factor for the whole input, got 3"):
        carrier.check_scale(torch.ones(3), x, "op", single=True)
    with pytest.raises(ValueError, match="op is quantized and needs the scaling factor"):
        carrier.check_scale(None, x, "op")


def test_quant_mode_and_width():
    assert carrier.check_quant_mode("symmetric") == "symmetric"
    with pytest.raises(NotImplementedError, match="asymmetric"):
        carrier.check_quant_mode("asymmetric")
    with pytest.raises(ValueError, match="quant_mode must be one of none, symmetric, got 'int8'"):
        carrier.check_quant_mode("int8")
    with pytest.raises(ValueError, match="bits must be from 2 to 32, got 33"):
        carrier.check_width(33, "bits")
    for wrong in (True, 8.0):
        with pytest.raises(TypeError, match="bits must be an int"):
            carrier.check_width(wrong, "bits")
