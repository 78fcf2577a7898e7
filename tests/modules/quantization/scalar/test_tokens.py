"""Activations per token: the integers, how far they are from the numbers, and the gradient that passes through."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import tensors

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.tokens import (
    CLIPS,
    _sum_in_order,
    check_static_state,
    fake_quantize_tokens,
    quantize_static,
    quantize_tokens,
    static_qparams,
    token_limit,
    token_scale,
)

NAN, INF = float("nan"), float("inf")


def compute(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def test_known_answers():
    x = torch.tensor([[127.0, -127.0, 0.0, 63.4, -1.5, 2.5], [254.0, 3.0, -5.0, 1.0, 7.0, 0.0]])
    q, scale = quantize_tokens(x)
    eps = torch.finfo(torch.float32).eps  # 1 / 127 and the product with it are rounded
    assert scale.flatten().tolist() == pytest.approx([1.0, 2.0], rel=eps)
    assert q.tolist() == [[127, -127, 0, 63, -2, 2], [127, 2, -2, 0, 4, 0]]  # half to even


@pytest.mark.parametrize(("bits", "limit"), [(2, 3), (3, 7), (4, 15), (7, 127), (8, 127)])
def test_limits(bits, limit):
    assert token_limit(bits) == limit
    q, _ = quantize_tokens(torch.tensor([5.0, 0.0]), bits)
    assert q.tolist() == [limit, 0]
    q, _ = quantize_tokens(torch.tensor([-5.0, 0.0]), bits)
    assert q.tolist() == [-limit, 0]


def test_bits_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 9"):
        quantize_tokens(torch.zeros(2, 3), 9)
    for bits in (0, 1, 9):
        with pytest.raises(ValueError, match="bits"):
            fake_quantize_tokens(torch.zeros(2, 3), bits)


def by_hand(row, bits):
    """The integers and the scale of one token below 8 bits, from the definition: every range is tried in turn."""
    top, best = 2**bits - 1, None
    for clip in CLIPS:
        low, high = clip * row.min().clamp(max=0), clip * row.max().clamp(min=0)
        scale = (high / top - low / top).clamp(min=torch.finfo(row.dtype).tiny)
        zero_point = (-low / scale).round()
        q = ((row / scale).round() + zero_point).clamp(0, top) - zero_point
        error = (q * scale - row).square().sum()
        if best is None or error < best[0]:
            best = error, q, scale
    return best[1:]


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("kind", ["normal", "gelu", "outlier"])
def test_below_eight_bits_a_token_has_the_best_of_some_ranges(bits, kind):
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    if kind == "gelu":
        x = torch.nn.functional.gelu(x)
    elif kind == "outlier":
        x[:, 3] = 9
    q, scale = quantize_tokens(x, bits)
    for row, got, step in zip(x, q, scale, strict=True):
        expected = by_hand(row, bits)
        assert torch.equal(got, expected[0])
        assert step == expected[1]
    assert int((q.amax(-1) - q.amin(-1)).max()) == token_limit(bits)


@pytest.mark.parametrize("width", [1, 2, 3, 75, 768])
def test_errors_are_added_up_in_one_order(width):
    """Whatever lies where in memory: the range that is chosen must not depend on it."""
    x = torch.rand(33, width, generator=torch.Generator().manual_seed(0))
    columns = [column.numpy() for column in x.unbind(1)]
    while len(columns) > 1:
        half = -(-len(columns) // 2)
        columns = [a + b for a, b in itertools.zip_longest(columns[:half], columns[half:], fillvalue=np.float32(0))]
    expected = torch.from_numpy(columns[0])[:, None]
    for laid_out in (x, x.T.contiguous().T, x.repeat(1, 2)[:, :width]):
        assert torch.equal(_sum_in_order(laid_out), expected)


def test_two_ranges_that_are_nearly_as_good():
    """Their errors are equal to the last place, and which of them is the smaller follows from how they are added up."""
    row = torch.tensor([978581.0, 1034748, -751273, -395188, -231847, -920388]) / 2**18
    x = row.expand(33, 6)
    expected = quantize_tokens(row, 2)
    for laid_out in (x.contiguous(), x.T.contiguous().T):
        q, scale = quantize_tokens(laid_out, 2)
        assert torch.equal(q, expected[0].expand(33, 6))
        assert torch.equal(scale, expected[1].expand(33, 1))


def test_a_one_sided_token_uses_all_levels():
    """A GELU's output is nearly positive: a symmetric grid would spend half of its levels on nothing."""
    x = torch.nn.functional.gelu(2 * torch.randn(50, 200, generator=torch.Generator().manual_seed(1)))
    error = (fake_quantize_tokens(x, 4) - x).square().sum()
    scale = x.abs().amax(-1, keepdim=True) / 7
    assert error < 0.4 * ((x / scale).round() * scale - x).square().sum()


@given(x=tensors(), bits=st.integers(2, 8))
def test_integers_are_within_the_limit_and_no_worse_than_the_whole_range(x, bits):
    x = compute(x)
    q, scale = quantize_tokens(x, bits)
    assert scale.shape == (*x.shape[:-1], 1)
    assert q.dtype == scale.dtype == x.dtype
    assert bool((scale >= torch.finfo(x.dtype).tiny).all())
    assert torch.equal(q, q.round())
    assert float((q.amax(-1) - q.amin(-1)).max()) <= (254 if bits == 8 else token_limit(bits))
    assert float(q.abs().max()) <= 127
    # x / scale, up to 127, is itself rounded: 127 eps more than half a step; below 8 bits also the zero point
    error = (x.double() - q.double() * scale.double()).abs()
    half = 0.5 + 127 * torch.finfo(x.dtype).eps
    if bits == 8:
        assert torch.equal(scale, token_scale(x))
        assert bool((error <= scale.double() * half).all())
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0).double(), x.amax(-1, keepdim=True).clamp(min=0).double()
        step = ((high - low) / token_limit(bits)).clamp(min=torch.finfo(x.dtype).tiny)
        whole = (2 * half * step).square().sum(-1) * x.shape[-1]
        assert bool((error.square().sum(-1) <= whole).all())


@given(x=tensors())
def test_a_token_uses_its_whole_range(x):
    x = compute(x)
    q, _ = quantize_tokens(x)
    largest = x.abs().amax(-1)
    normal = largest > 254 * torch.finfo(x.dtype).tiny  # below, the scale ends at the smallest normal number
    assert bool((q.abs().amax(-1)[normal] == 127).all())


@given(x=tensors())
def test_the_sign_does_not_matter(x):
    x = compute(x)
    assert torch.equal(quantize_tokens(-x)[0], -quantize_tokens(x)[0])


def test_a_token_has_no_neighbours():
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    alone = quantize_tokens(x[2])
    x[[0, 1, 3]] *= 1e4
    together = quantize_tokens(x)
    assert torch.equal(together[0][2], alone[0])
    assert torch.equal(together[1][2], alone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zeros(dtype):
    q, scale = quantize_tokens(torch.zeros(3, 5, dtype=dtype))
    assert torch.equal(q, torch.zeros(3, 5, dtype=dtype))
    assert bool((scale == torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3)])
def test_nothing_to_quantize(shape):
    q, scale = quantize_tokens(torch.zeros(shape))
    assert q.shape == shape
    assert scale.shape == (*shape[:-1], 1)
    assert fake_quantize_tokens(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_token(value):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    clean = token_scale(x)
    x[1, 2] = value
    scale = token_scale(x)
    assert not bool(torch.isfinite(scale[1]))
    assert torch.equal(scale[[0, 2]], clean[[0, 2]])


@given(x=tensors(), bits=st.sampled_from([4, 8]))
def test_fake_quantization_is_integers_times_scale_in_the_dtype_of_the_input(x, bits):
    got = fake_quantize_tokens(x, bits)
    q, scale = quantize_tokens(compute(x), bits)
    assert got.dtype == x.dtype
    assert torch.equal(got, (q * scale).to(x.dtype))
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_is_that_of_the_identity(dtype):
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 5, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    fake_quantize_tokens(x).backward(upstream)
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, upstream)


# With a fixed range.


@pytest.mark.parametrize(
    ("input_range", "bits", "scale", "zero_point"),
    [
        ((-1.0, 1.55), 8, 0.01, -28),
        ((0.0, 2.55), 8, 0.01, -128),
        ((1.0, 2.55), 8, 0.01, -128),  # 0 is included
        ((-2.55, -1.0), 8, 0.01, 127),
        ([-8, 7], 4, 1.0, 0),
        (torch.tensor([-1.0, 2.0]), 2, 1.0, -1),
    ],
)
def test_known_grids(input_range, bits, scale, zero_point):
    got = static_qparams("static", input_range, bits, "query")
    assert got[0].tolist() == pytest.approx([scale], rel=4 * torch.finfo(torch.float32).eps)  # four roundings
    assert got[1].tolist() == [zero_point]
    assert [t.dtype for t in got] == [torch.float32, torch.int32]


def test_a_range_without_width_keeps_zero():
    scale, zero_point = static_qparams("static", (0.0, 0.0), 8, "query")
    q, _ = quantize_static(torch.zeros(2, 3), scale, zero_point)
    assert bool((q == zero_point).all())


@pytest.mark.parametrize(
    "input_range", [(NAN, 1.0), (-INF, 1.0), (0.0, 1e300), (2.0, 1.0), (1.0,), (1.0, 2.0, 3.0), 3.0, ()], ids=str
)
def test_what_is_no_range_is_refused(input_range):
    with pytest.raises(ValueError, match=r"the input_range of query must be \(low, high\), finite, low <= high; got"):
        static_qparams("static", input_range, 8, "query")


def test_a_range_goes_with_static_only():
    assert static_qparams("dynamic", None, 8, "query") == static_qparams(None, None, 8, "query") == (None, None)
    with pytest.raises(ValueError, match=r"^query has activations='static' and needs an input_range"):
        static_qparams("static", None, 8, "query")
    for activations in ("dynamic", None):
        with pytest.raises(ValueError, match=f"^query takes an input_range only .* has activations={activations!r}"):
            static_qparams(activations, (0.0, 1.0), 8, "query")


@given(x=tensors(), bits=st.integers(2, 8), ends=st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)))
def test_a_fixed_grid_is_that_of_the_weights_moved_down(x, bits, ends):
    x = compute(x)
    scale, zero_point = static_qparams("static", (-ends[0], ends[1]), bits, "query")
    q, scales = quantize_static(x, scale, zero_point, bits)
    half = 2 ** (bits - 1)
    assert torch.equal(q + half, ops.quantize_to_int(x, scale, zero_point + half, bits).to(x.dtype))
    assert scales.shape == (*x.shape[:-1], 1)
    assert bool((scales == scale).all())


def test_what_is_outside_of_a_fixed_range_saturates_and_a_nan_spoils_its_token():
    scale, zero_point = static_qparams("static", (-1.0, 3.0), 8, "query")
    x = torch.tensor([[-1.0, 3.0, 0.0], [-9.0, 1e38, 0.0], [-INF, INF, 0.0], [NAN, 1.0, 0.0]])
    q, scales = quantize_static(x, scale, zero_point)
    assert q[:3].tolist() == [[-128, 127, int(zero_point)]] * 3
    assert torch.equal(scales[:3], scale.expand(3, 1))
    assert bool(scales[3].isnan())


def test_state_with_and_without_a_fixed_range():
    with_range, without = ({"a.settings": 0, "a.input_scale": 0}, {"a.settings": 0})
    check_static_state(with_range, "a.", True, "query")
    check_static_state(without, "a.", False, "query")
    check_static_state({}, "a.", True, "query")  # a float state, or that of another layer
    with pytest.raises(ValueError, match=r"^a was saved without .* has one; .* activations other than 'static'$"):
        check_static_state(without, "a.", True, "query")
    with pytest.raises(ValueError, match=r"^query was saved with .* has none; .* activations='static'$"):
        check_static_state({"settings": 0, "input_scale": 0}, "", False, "query")
