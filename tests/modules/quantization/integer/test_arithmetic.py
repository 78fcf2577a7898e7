"""Integer arithmetic against Python's own exact integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.modules.quantization.integer import arithmetic
from fairseq.modules.quantization.integer.arithmetic import batch_frexp, isqrt, requantize

near_powers = sorted(
    {min(max(2**k + d, 0), 2**62 - 1) for k in range(63) for d in (-2, -1, 0, 1, 2)}
    | {min(max(r * r + d, 0), 2**62 - 1) for k in range(32) for r in (2**k - 1, 2**k, 2**k + 1) for d in (-1, 0, 1)}
)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_isqrt_is_exact_beside_every_power_of_two_and_square(device):
    n = torch.tensor(near_powers, device=device)
    assert isqrt(n).tolist() == [math.isqrt(k) for k in near_powers]


def test_isqrt_is_exact_up_to_two_hundred_thousand():
    n = torch.arange(200_000)
    assert isqrt(n).tolist() == [math.isqrt(k) for k in range(200_000)]


@given(st.lists(st.integers(0, 2**62 - 1), min_size=1))
def test_isqrt_is_exact_anywhere(values):
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(k) for k in values]


@given(st.lists(st.integers(2**30, 2**31 - 1), min_size=1))
def test_isqrt_is_exact_beside_large_squares(roots):
    values = [r * r + d for r in roots for d in (-1, 0, 1)]
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(k) for k in values]


def test_isqrt_refuses():
    with pytest.raises(ValueError, match="n >= 0, got -1"):
        isqrt(int64(4, -1))
    with pytest.raises(OverflowError, match=f"isqrt: {2**62}"):
        isqrt(int64(2**62))
    with pytest.raises(TypeError, match="int64"):
        isqrt(torch.tensor([4.0]))


@given(st.lists(st.integers(0, 2**62), min_size=1))
def test_bit_length(values):
    assert arithmetic.bit_length(torch.tensor(values)).tolist() == [v.bit_length() for v in values]


@given(q=st.integers(-(2**62), 2**62), n=st.integers(0, 61))
def test_shift_right_rounds_half_to_even(q, n):
    assert arithmetic.shift_right(int64(q), n).item() == round(Fraction(q, 2**n))
    assert arithmetic.shift_right(int64(q), int64(n)).item() == round(Fraction(q, 2**n))


@given(odd=st.integers(-(2**20), 2**20), n=st.integers(1, 30))
def test_shift_right_at_ties(odd, n):
    q = (2 * odd + 1) * 2 ** (n - 1)
    assert arithmetic.shift_right(int64(q), n).item() == round(Fraction(q, 2**n))


@given(q=st.integers(-(2**40), 2**40), n=st.integers(-200, 20))
def test_shift_either_way(q, n):
    assert arithmetic.shift(int64(q), int64(n)).item() == round(Fraction(q) * Fraction(2) ** n)


@given(a=st.integers(-(2**61), 2**61), b=st.integers(1, 2**61))
def test_divide_rounds_half_to_even(a, b):
    assert arithmetic.divide(int64(a), int64(b)).item() == round(Fraction(a, b))
    assert arithmetic.divide(int64(a % 2001 - 1000), int64(b % 40 + 1)).item() == round(
        Fraction(a % 2001 - 1000, b % 40 + 1)
    )


multipliers = st.floats(2.0**-70, 2.0**40) | st.sampled_from([1.0, 0.5, 2.0**-20, 1 - 2.0**-40, 2.0**30, 3.0, 2.0**-60])


@given(multipliers, st.sampled_from([31, 31, 8, 52]))
def test_batch_frexp_is_the_nearest_dyadic_number(multiplier, bits):
    m, e = (int(part) for part in batch_frexp(torch.tensor([multiplier], dtype=torch.float64), bits))
    assert 2 ** (bits - 1) <= m < 2**bits
    assert abs(Fraction(m) / Fraction(2) ** e - Fraction(multiplier)) <= Fraction(multiplier) / 2**bits
    exact = Fraction(multiplier) * Fraction(2) ** e
    assert m == round(exact) or m == 2 ** (bits - 1)  # rounded up into the next power of two


def test_batch_frexp_shape_zero_and_refusals():
    m, e = batch_frexp(torch.tensor([[0.0, 0.75]]))
    assert m.tolist() == [[0, 3 * 2**29]]
    assert e.tolist() == [[0, 31]]
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="finite inputs >= 0"):
            batch_frexp(torch.tensor([wrong]))


def exact_requantize(q, m, e, bits):
    n = 2 ** (bits - 1) - 1
    return max(-n, min(n, round(Fraction(q * m) / Fraction(2) ** e)))


integers = st.integers(-(2**51), 2**51) | st.integers(-(2**24), 2**24) | st.sampled_from([2**31, -(2**31), 2**51, 0, 1])


@given(q=st.lists(integers, min_size=1), multiplier=multipliers, bits=st.integers(2, 32))
def test_requantize_is_exact(q, multiplier, bits):
    m, e = batch_frexp(torch.tensor([multiplier], dtype=torch.float64))
    expected = [exact_requantize(v, int(m), int(e), bits) for v in q]
    assert requantize(torch.tensor(q), m, e, bits).tolist() == expected


@given(odd=st.integers(-(2**20), 2**20), lift=st.integers(1, 30), bits=st.integers(8, 32), off=st.integers(-1, 1))
def test_requantize_at_ties_and_beside_them(odd, lift, bits, off):
    """The product of the parts must not lose its lowest bit: half way between two integers, or next to it."""
    q = (2 * odd + 1) * 2 ** (lift - 1) + off
    m, e = batch_frexp(torch.tensor([2.0**-lift]))
    assert requantize(int64(q), m, e, bits).item() == exact_requantize(q, int(m), int(e), bits)


@given(
    m=st.integers(2**29, 2**30 - 1).map(lambda half: 2 * half + 1),
    e=st.integers(25, 51),
    off=st.integers(-(2**23), 2**23) | st.integers(-2, 2),
)
def test_requantize_of_products_that_end_beside_one_half(m, e, off):
    """q is chosen so that q * m / 2**e has the fractional part 1/2 + off / 2**e."""
    q = (2 ** (e - 1) + off) * pow(m, -1, 2**e) % 2**e
    for signed in (q, -q):
        assert requantize(int64(signed), int64(m), int64(e), 32).item() == exact_requantize(signed, m, e, 32)


@given(q=integers, m=st.integers(2**30, 2**31 - 1), e=st.integers(-10, 120))
def test_requantize_is_exact_for_every_dyadic_number(q, m, e):
    assert requantize(int64(q), int64(m), int64(e), 32).item() == exact_requantize(q, m, e, 32)


def test_requantize_takes_a_multiplier_per_entry_of_the_last_dimension(device):
    q = torch.tensor([[3, 3], [5, 5], [7, 7]], device=device)
    m, e = batch_frexp(torch.tensor([0.5, 2.0], device=device))
    assert requantize(q, m, e, 8).tolist() == [[2, 6], [2, 10], [4, 14]]


def test_requantize_refuses():
    m, e = batch_frexp(torch.tensor([0.5]))
    with pytest.raises(OverflowError, match=f"requantize: {2**51 + 1}"):
        requantize(int64(2**51 + 1), m, e, 8)
    with pytest.raises(ValueError, match="mantissas of 31 bits"):
        requantize(int64(3), int64(3), e, 8)
    with pytest.raises(ValueError, match="mantissas of 31 bits"):
        requantize(int64(3), -m, e, 8)
    with pytest.raises(ValueError, match="bits must be from 2 to 32"):
        requantize(int64(3), m, e, 40)
