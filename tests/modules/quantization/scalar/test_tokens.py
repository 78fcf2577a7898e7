"""Activations per token: the integers, how far they are from the numbers, and the gradient that passes through."""

import pytest
import torch
from hypothesis import given
from strategies import tensors

from fairseq.modules.quantization.scalar.tokens import LIMIT, fake_quantize_tokens, quantize_tokens, token_scale


def compute(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def test_known_answers():
    x = torch.tensor([[127.0, -127.0, 0.0, 63.4, -1.5, 2.5], [254.0, 3.0, -5.0, 1.0, 7.0, 0.0]])
    q, scale = quantize_tokens(x)
    assert scale.flatten().tolist() == pytest.approx([1.0, 2.0])
    assert q.tolist() == [[127, -127, 0, 63, -2, 2], [127, 2, -2, 0, 4, 0]]  # half to even


@given(x=tensors())
def test_integers_are_within_127_and_half_a_step_of_the_numbers(x):
    x = compute(x)
    q, scale = quantize_tokens(x)
    assert torch.equal(scale, token_scale(x))
    assert scale.shape == (*x.shape[:-1], 1)
    assert q.dtype == scale.dtype == x.dtype
    assert bool((scale >= torch.finfo(x.dtype).tiny).all())
    assert torch.equal(q, q.round())
    assert float(q.abs().max()) <= LIMIT
    # x / scale, up to 127, is itself rounded: 127 eps more than half a step
    error = (x.double() - q.double() * scale.double()).abs()
    assert bool((error <= scale.double() * (0.5 + 127 * torch.finfo(x.dtype).eps)).all())


@given(x=tensors())
def test_a_token_uses_its_whole_range(x):
    x = compute(x)
    q, _ = quantize_tokens(x)
    largest = x.abs().amax(-1)
    normal = largest > LIMIT * 2 * torch.finfo(x.dtype).tiny  # below, the scale ends at the smallest normal number
    assert bool((q.abs().amax(-1)[normal] == LIMIT).all())


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


@given(x=tensors())
def test_fake_quantization_is_integers_times_scale_in_the_dtype_of_the_input(x):
    got = fake_quantize_tokens(x)
    q, scale = quantize_tokens(compute(x))
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
