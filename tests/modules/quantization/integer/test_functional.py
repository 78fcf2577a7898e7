"""Each integer kernel against the float function over its whole input range, and its refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.modules.quantization.integer import functional
from fairseq.modules.quantization.integer.arithmetic import batch_frexp

GELU_ERROR = {2: 0.0182, 4: 0.0094}
ERF_ERROR = {2: 0.0963, 4: 0.0552}
EXP_ERROR = 0.00194
LAYERNORM_ERROR = 6.2e-5
SOFTMAX_ERROR = {4: 2**-4, 8: 2**-8, 16: 0.00191}

SCALES = [1.37 * 2.0**k for k in (-30, -24, -17, -15, -14, -13, -9, -7, -5, -3, -2)] + [2.0**-13, 2.0**-6, 0.5]


def grid(low, high, scale, points=20_001):
    """Every integer whose real value is from low to high, or ``points`` of them."""
    first, last = math.ceil(low / scale), math.floor(high / scale)
    if last - first < points:
        return torch.arange(first, last + 1)
    return torch.linspace(first, last, points, dtype=torch.float64).round().to(torch.int64)


def real(result):
    q, scale = result
    assert q.dtype == torch.int64
    return q * scale


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("scale", SCALES)
def test_erf_and_gelu_errors_over_the_whole_range(scale, degree):
    q = grid(-8, 8, scale)
    x = q.double() * scale
    assert (real(functional.erf(q, scale, degree)) - torch.erf(x)).abs().max() <= ERF_ERROR[degree]
    exact = x / 2 * (1 + torch.erf(x / 2**0.5))
    assert (real(functional.gelu(q, scale, degree)) - exact).abs().max() <= GELU_ERROR[degree]


@pytest.mark.parametrize("degree", [2, 4])
def test_the_documented_gelu_error_is_reached(degree):
    """The bound is measured, not padded."""
    q = grid(-8, 8, 2.0**-13, 200_000)
    x = q.double() * 2.0**-13
    worst = (real(functional.gelu(q, 2.0**-13, degree)) - x / 2 * (1 + torch.erf(x / 2**0.5))).abs().max()
    assert worst > 0.99 * GELU_ERROR[degree]


@given(st.integers(2**4, 2**35), st.floats(2.0**-20, 2.0**20), st.sampled_from([2, 4]))
def test_gelu_is_exact_far_out(q, scale, degree):
    """Past saturation: x itself on the right, 0 on the left, and erf exactly +-1."""
    q = q + math.ceil(4 / scale)
    if q > 2**35:
        return
    both = torch.tensor([q, -q, 0])
    assert torch.allclose(
        real(functional.gelu(both, scale, degree)), torch.tensor([q * scale, 0, 0], dtype=torch.float64), rtol=1e-14
    )
    q_erf, scale_erf = functional.erf(both, scale, degree)
    assert q_erf.tolist() == [one := round(1 / float(scale_erf)), -one, 0]


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.3, 1.0, 4.0])
def test_gelu_of_a_coarse_scale_is_as_good_as_of_a_fine_one(scale):
    q = torch.arange(-127, 128)
    x = q.double() * scale
    assert (real(functional.gelu(q, scale)) - x / 2 * (1 + torch.erf(x / 2**0.5))).abs().max() <= GELU_ERROR[2]


@pytest.mark.parametrize("scale", SCALES)
def test_exp_error_over_the_whole_range(scale):
    q = torch.cat([grid(-30, 0, scale), grid(-1, 0, scale), torch.tensor([-(2**51), -(2**40), 0])])
    got = real(functional.exp(q, scale))
    assert (got - torch.exp(q.double() * scale)).abs().max() <= EXP_ERROR
    assert abs(got[-1] - 1) < 1e-15
    assert got.min() == 0
    assert (got >= 0).all()


@given(st.floats(2.0**-60, 2.0**30))
def test_exp_of_any_scale(scale):
    q = torch.tensor([0, -1, -2, -3, -1000, -(2**30), -(2**51)])
    assert (real(functional.exp(q, scale)) - torch.exp(q.double() * scale)).abs().max() <= EXP_ERROR


@pytest.mark.parametrize("bits", SOFTMAX_ERROR)
@pytest.mark.parametrize("size", [1, 2, 3, 16, 197, 1024])
def test_softmax_error(size, bits):
    generator = torch.Generator().manual_seed(size)
    for spread in (0.1, 1, 3, 10, 40):
        for scale in (2.0**-26, 3e-4, 0.01, 0.3, 1.7):
            x = (torch.randn(20, size, generator=generator, dtype=torch.float64) * spread).clamp(-40, 40)
            q = (x / scale).round().long()
            got = real(functional.softmax(q, scale, bits))
            assert (got - torch.softmax(q.double() * scale, -1)).abs().max() <= SOFTMAX_ERROR[bits]
            assert got.min() >= 0
            assert got.max() < 1


def test_softmax_ignores_a_shift_and_takes_the_extremes():
    q = torch.tensor([[5, 3, -200]])
    assert torch.equal(functional.softmax(q, 0.1)[0], functional.softmax(q + 2**50, 0.1)[0])
    assert functional.softmax(torch.tensor([[2**51, -(2**51)]]), 0.1)[0].tolist() == [[255, 0]]
    assert functional.softmax(torch.zeros(1, 4, dtype=torch.int64), 0.1)[0].tolist() == [[64] * 4]


def layernorm_error(q, scale, weight, bias, eps, bits):
    y, out_scale = functional.layernorm(q, scale, weight, bias, eps, bits)
    assert y.abs().max() <= 2 ** (bits - 1) - 1
    exact = torch.nn.functional.layer_norm(q.double() * scale, weight.shape, weight, bias, eps)
    return (y * out_scale - exact).abs().max(), out_scale


@pytest.mark.parametrize("size", [2, 3, 16, 197, 1024])
@pytest.mark.parametrize("largest", [1, 5, 100, 1e4, 1e6, 2.0**31, 2.0**40])
def test_layernorm_error(size, largest):
    generator = torch.Generator().manual_seed(size)
    weight, bias = torch.randn(2, size, generator=generator, dtype=torch.float64).clamp(-2, 2)
    weight = weight * 2
    for offset in (0, 3):
        x = torch.randn(20, size, generator=generator, dtype=torch.float64) + offset
        q = (x * largest / 8).clamp(-largest, largest).round().long()
        for scale in (2.0**-40, 1e-6, 1e-3, 0.05, 1.0):
            for bits in (8, 22, 32):
                error, step = layernorm_error(q, scale, weight, bias, 1e-5, bits)
                assert error <= LAYERNORM_ERROR + step / 2


@pytest.mark.parametrize("bits", [8, 22, 32])
@pytest.mark.parametrize("size", [2, 16, 1024, 4096])
def test_layernorm_of_the_largest_possible_output_does_not_saturate(size, bits):
    """One entry apart from all others is sqrt(C - 1) deviations out: the most there is."""
    q = torch.zeros(2, size, dtype=torch.int64)
    q[0, 0], q[1, 0] = 10**6, -(2**38)
    weight, bias = torch.full((size,), 4.0).double(), torch.full((size,), 0.5).double()
    error, step = layernorm_error(q, 0.1, weight, bias, 1e-5, bits)
    assert error <= LAYERNORM_ERROR + step / 2


def test_layernorm_of_a_constant_row_and_of_a_zero_weight():
    weight, bias = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 0.25, -1.0]).double()
    rows = torch.tensor([[7, 7, 7], [1, 2, 9]])
    for eps in (1e-5, 0.0):
        y, scale = functional.layernorm(rows, 0.1, weight, bias, eps)
        # the bias is rounded to the scale of the product, which is finer, and then to that of the output
        assert ((y * scale)[0] - bias).abs().max() <= scale
        assert abs((y * scale)[1, 0] - 0.5) <= scale  # the bias alone where the weight is 0


def test_layernorm_uses_eps():
    """A row whose variance is that of eps: without eps the result is larger by sqrt(2)."""
    q, one = torch.tensor([[1, -1]]), torch.ones(2, dtype=torch.float64)
    y, scale = functional.layernorm(q, 1e-3, one, one * 0, eps=1e-6)
    assert (y * scale - torch.tensor([[2**-0.5, -(2**-0.5)]]).double()).abs().max() <= LAYERNORM_ERROR


def test_layernorm_overflow_is_raised_without_handling_and_absent_with_it():
    one = torch.ones(4, dtype=torch.float64)
    q = torch.tensor([[2**40, -(2**40), 5, 7]])
    layernorm_error(q, 1e-6, one, one, 1e-5, 32)
    with pytest.raises(OverflowError, match="overflow_handling=True"):
        functional.layernorm(q, 1e-6, one, one, overflow_handling=False)
    with pytest.raises(OverflowError, match="sum of squares"):
        functional.layernorm(torch.tensor([[2**23, -(2**23), 0, 0]]), 1.0, one, one, overflow_handling=False)
    with pytest.raises(OverflowError, match=r"layernorm \(eps\)"):
        functional.layernorm(torch.tensor([[1, -1, 0, 0]]), 2.0**-50, one, one, overflow_handling=False)
    small = torch.tensor([[2**20, -(2**20), 0, 3]])
    with_it, without = (functional.layernorm(small, 0.1, one, one, overflow_handling=h)[0] for h in (True, False))
    assert torch.equal(with_it, without)
    with pytest.raises(OverflowError, match="sum over the row"):
        functional.layernorm(torch.tensor([[2**50, 0, 0, 0]]), 1.0, one, one)


def test_linear_is_exact_at_the_ends_of_int32_and_raises_past_them(device):
    q, weight = torch.tensor([[2**16, 1]], device=device), torch.tensor([[2**15 - 1, 2**16 - 1]], device=device)
    assert functional.linear(q, weight).item() == 2**31 - 1
    assert functional.linear(-q, weight).item() == -(2**31) + 1
    assert functional.linear(q, weight, torch.tensor([-5], device=device)).item() == 2**31 - 6
    with pytest.raises(OverflowError, match=rf"int32 accumulator.*{2**31} is past the limit of \+-{2**31 - 1}"):
        functional.linear(q, weight, torch.tensor([1], device=device))
    with pytest.raises(OverflowError, match="int64 products"):
        functional.linear(q * 2**34, weight)


@given(st.data())
def test_linear_is_a_matrix_product(data):
    sizes = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows, inner, outer = sizes
    q = torch.randint(-127, 128, (rows, inner), generator=generator)
    weight = torch.randint(-127, 128, (outer, inner), generator=generator)
    bias = torch.randint(-1000, 1000, (outer,), generator=generator)
    assert torch.equal(functional.linear(q, weight, bias), q @ weight.T + bias)


def test_kernels_take_integers_only_and_refuse_what_does_not_fit():
    for kernel in (functional.erf, functional.gelu, functional.exp, functional.softmax):
        with pytest.raises(TypeError, match="int64"):
            kernel(torch.tensor([-1.0]), 0.1)
        with pytest.raises(ValueError, match="scaling factor must be from"):
            kernel(torch.tensor([-1]), 0.0)
        with pytest.raises(OverflowError, match=f"{-(2**52)} is past"):
            kernel(torch.tensor([-(2**52)]), 0.1)
    with pytest.raises(OverflowError, match=rf"gelu: {2**35 + 1} is past the limit of \+-{2**35}"):
        functional.gelu(torch.tensor([2**35 + 1]), 0.1)
    with pytest.raises(ValueError, match="exp needs q <= 0, got 1"):
        functional.exp(torch.tensor([1]), 0.1)
    with pytest.raises(ValueError, match="output_bit must be from 2 to 16, got 17"):
        functional.softmax(torch.tensor([[1]]), 0.1, 17)
    with pytest.raises(ValueError, match="one scaling factor"):
        functional.softmax(torch.tensor([[1, 2]]), torch.tensor([0.1, 0.2]))


def test_one_scale_per_entry_of_the_last_dimension(device):
    q = torch.randint(-900, 900, (5, 3), device=device)
    scales = torch.tensor([0.001, 0.01, 2.0], device=device)
    for kernel, values in ((functional.erf, q), (functional.gelu, q), (functional.exp, -q.abs())):
        together, scale = kernel(values, scales)
        for column in range(3):
            alone, alone_scale = kernel(values[:, column], float(scales[column]))
            assert torch.equal(together[:, column], alone)
            assert scale.expand(3)[column] == alone_scale
    assert functional.requantize(q, *batch_frexp(scales), 32).device == q.device
