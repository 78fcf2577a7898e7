"""Requantization, against Python's integers."""

import random

import pytest
import torch

from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.dyadic import Requantize, dyadic, power_of_two, requantize, round_shift


def tensor(values):
    return torch.tensor(values, dtype=torch.int64)


def test_round_shift_is_half_up_at_ties_and_extremes():
    assert round_shift(tensor([-3, -2, -1, 0, 1, 2, 3]), 1).tolist() == [-1, -1, 0, 0, 1, 1, 2]
    assert round_shift(tensor([-5, 7]), 0).tolist() == [-5, 7]
    assert round_shift(tensor([2**60, 2**60 - 1, -(2**60), -(2**60) - 1]), 61).tolist() == [1, 0, 0, -1]
    assert round_shift(tensor([-6, -6, -6]), tensor([0, 2, 61])).tolist() == [-6, -1, 0]


def test_requantize_is_exact():
    draw = random.Random(0)
    for _ in range(300):
        shift, bits = draw.randrange(62), draw.choice([8, 16, 22, 24])
        value = draw.randrange(-(2 ** draw.randrange(1, 44)), 2**43)
        multiplier, offset = draw.randrange(-(2**16), 2**16), draw.randrange(-(2**60), 2**60)
        exact = (2 * (value * multiplier + offset) + 2**shift) // 2 ** (shift + 1)
        expected = min(max(exact, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
        got = requantize(tensor([value]), tensor([multiplier]), tensor([shift]), tensor([offset]), bits)
        assert got.tolist() == [expected]


def test_an_overflow_is_seen_in_checked_mode_alone():
    arguments = tensor([2**46]), tensor([2**16]), tensor([9]), 0, 8
    requantize(*arguments)
    with checked(), pytest.raises(OverflowError, match="past 62 bits"):
        requantize(*arguments)
    with checked(), pytest.raises(OverflowError, match="here: 0 to 8796093022208"):
        Requantize(torch.ones(1).double(), None, 8, "here")(tensor([0, 2**43]))


def test_checked_mode_says_how_many_bits_were_taken():
    layer = Requantize(torch.ones(1).double(), None, 8, "here")
    with checked() as widths:
        layer(tensor([3, -(2**20)]))
        layer(tensor([2**10, 0]))
    assert widths == {"here": (44, 21)}
    with checked() as widths:
        layer(tensor([2**20]))
    assert widths == {"here": (44, 22)}


def test_dyadic_is_within_a_part_in_2_to_the_16():
    corners = torch.tensor([2.0**15 - 1, 1.0 - 2.0**-20, 1.0, 0.5, 0.0])
    factor = torch.cat([torch.logspace(-13, 4, 997, dtype=torch.float64), corners])
    factor = torch.cat([factor, -factor])
    multiplier, shift, offset = dyadic(factor)
    assert offset is None
    assert multiplier.abs().max() < 2**16
    assert 0 <= shift.min() <= shift.max() <= 61
    assert ((multiplier / torch.exp2(shift.double()) - factor).abs() <= 2.0**-16 * factor.abs()).all()


def test_an_offset_takes_bits_of_the_factor_only_where_it_must():
    factor, added = torch.tensor([2.0**-30, 2.0**-30]).double(), torch.tensor([100.5, -(2.0**20)]).double()
    multiplier, shift, offset = dyadic(factor, added)
    assert shift.tolist() == [45, 39]
    assert (offset / torch.exp2(shift.double())).tolist() == added.tolist()
    assert (multiplier / torch.exp2(shift.double())).tolist() == factor.tolist()
    assert offset.abs().max() < 2**61


@pytest.mark.parametrize("factor", [2.0**17, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused_by_name(factor):
    with pytest.raises(ValueError, match=r"blocks\.0, fc1"):
        Requantize(torch.tensor([factor]).double(), None, 8, "blocks.0, fc1")


def test_power_of_two_is_the_largest_that_fits():
    for limit in (0.001, 1.0, 127.0, 128.0, 3000.0):
        e = power_of_two(limit, 8)
        assert limit * 2.0**e <= 127 < limit * 2.0 ** (e + 1)
