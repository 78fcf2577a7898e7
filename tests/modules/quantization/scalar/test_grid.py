"""The quantization grid, against exact answers."""

import math

import pytest
import torch

from fairseq.modules.quantization.scalar import ops


@pytest.mark.parametrize("bits", range(2, 9))
def test_known_answers(bits):
    """A range of exactly one unit per level: the integers are the numbers, the zero point is minus the smallest."""
    levels = torch.arange(2**bits) - 2 ** (bits - 1)
    got, scale, zero_point = ops.emulate_int(levels.float(), bits, "tensor")
    assert scale.tolist() == [1.0]
    assert zero_point.tolist() == [2 ** (bits - 1)]
    assert torch.equal(got, levels.float())
    halves = ops.quantize_to_int(torch.tensor([-0.5, 0.5, 1.5]), scale, zero_point, bits)
    assert (halves.int() - zero_point).tolist() == ([0, 0, 2] if bits > 2 else [0, 0, 1])  # to even; then the clamp


def test_clamps_to_the_range_of_its_own_width():
    scale, zero_point = torch.tensor([1.0]), torch.tensor([3], dtype=torch.int32)
    far = torch.tensor([-1e6, 1e6])
    for bits in range(2, 9):
        assert ops.quantize_to_int(far, scale, zero_point, bits).tolist() == [0, 2**bits - 1]
        assert ops.fake_quantize(far, scale, zero_point, bits).tolist() == [-3.0, 2.0**bits - 4]


def test_largest_float16_does_not_become_inf():
    w = torch.tensor([-1000.0, 65504.0], dtype=torch.float16)
    for bits in range(2, 9):
        assert bool(torch.isfinite(ops.emulate_int(w, bits, "tensor")[0]).all())


def test_range_to_qparams_exactly():
    low, high = torch.tensor([-1.0, 0.0, -3.0, 0.0]), torch.tensor([2.0, 30.0, 0.0, 0.0])
    scale, zero_point = ops.range_to_qparams(low, high, 4)
    assert scale.tolist() == [pytest.approx(0.2), 2.0, pytest.approx(0.2), torch.finfo(torch.float32).tiny]
    assert zero_point.tolist() == [5, 0, 15, 0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 1.0), (-1.0, -0.1), (-math.inf, 0.0), (0.0, math.nan)], ids=["low", "high", "inf", "nan"]
)
def test_range_to_qparams_refuses(low, high):
    with pytest.raises(ValueError, match="include 0"):
        ops.range_to_qparams(torch.tensor([low]), torch.tensor([high]), 8)
