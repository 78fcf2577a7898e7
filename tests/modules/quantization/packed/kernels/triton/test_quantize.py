"""Rows to integers, alone and behind a LayerNorm: on a GPU, or interpreted on the CPU."""

import pytest
import torch
from torch.nn import functional as F

from fairseq.modules.quantization.scalar.tokens import quantize_static, quantize_tokens

pytest.importorskip("triton")

from fairseq.modules.quantization.packed.kernels.triton import norm, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 75), (2, 768)]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def activations(rows, columns, dtype, device):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 3
    if rows > 1:
        x[1, columns // 2] = torch.nan
    return x.to(device, dtype)


def grid(device):
    return torch.tensor([0.02], device=device), torch.tensor([-64], dtype=torch.int32, device=device)


def same(rows, q, scale):
    """Whether rows have those integers and scales, and those with a NaN a scale of NaN."""
    finite = scale[:, 0].isfinite()
    assert torch.equal(rows.q[finite], q[finite].to(torch.int8))
    assert torch.equal(rows.scale[finite], scale[finite, 0])
    assert bool(rows.scale[~finite].isnan().all())
    return torch.equal(rows.sums.sum(0)[finite], rows.q.sum(-1)[finite])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_those_of_the_reference(shape, dtype, device):
    x = activations(*shape, dtype, device)
    assert same(quantize.run(x, None, None, None), *quantize_tokens(x.float()))
    assert same(quantize.run(x, *grid(device), None), *quantize_static(x.float(), *grid(device)))


def test_what_saturates_is_at_the_ends(device):
    x = torch.tensor([[1e30, -1e30, torch.inf, 0.01, 0.03]], device=device)
    rows = quantize.run(x, *grid(device), None)
    assert rows.q.tolist() == [[127, -128, 127, -64, -62]]  # 0.5 and 1.5 steps: half to even


def test_numbers_between_two_integers_go_where_division_takes_them(device):
    """To the half and to the neighbours of it, for scales of all sizes."""
    steps = torch.logspace(-34, 30, 9, dtype=torch.float64)[:, None]
    middles = ((torch.arange(-126, 127) + 0.5) * steps).float()
    near = torch.stack([middles.view(torch.int32) + offset for offset in (-1, 0, 1)]).view(torch.float32)
    x = torch.cat([*near, (127 * steps).float()], 1).to(device)
    assert same(quantize.run(x, None, None, None), *quantize_tokens(x))
    for row, step in zip(x, steps.float().to(device)):
        given = step, torch.tensor([-3], dtype=torch.int32, device=device)
        if step > 1e-30:
            assert same(quantize.run(row[None], *given, None), *quantize_static(row[None], *given))


def test_a_row_of_zeros_and_one_of_the_smallest_numbers(device):
    x = torch.tensor([[0.0, 0.0], [1e-42, -1e-42]], device=device)
    assert same(quantize.run(x, None, None, None), *quantize_tokens(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_multiplies_as_pytorch_does(dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("interpreted, Triton does not round to bfloat16 but cuts it off")
    x = activations(3, 75, dtype, device)
    factor = torch.rand(75, generator=torch.Generator().manual_seed(1)).to(device) + 0.5
    assert same(quantize.run(x, None, None, factor), *quantize_tokens((x * factor.to(dtype)).float()))


def test_rows_may_lie_apart(device):
    x = activations(3, 150, torch.bfloat16, device)[:, :75]
    assert same(quantize.run(x, None, None, None), *quantize_tokens(x.float()))


def test_rows_may_lie_more_than_two_billion_numbers_apart(device):
    try:
        x = torch.empty(3, 2**30, dtype=torch.float16, device=device)[:, :75]  # pages that are not touched take nothing
    except RuntimeError:
        pytest.skip("6 GB of addresses cannot be had")
    x.copy_(activations(3, 75, torch.float16, device).nan_to_num())
    assert same(quantize.run(x, None, None, None), *quantize_tokens(x.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", [(3, 75), (2, 768)])
def test_a_norm_is_off_by_half_a_step_and_float32(shape, static, dtype, device):
    x = activations(*shape, dtype, device)
    weight, bias = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(2)).to(device)
    given = grid(device) if static else (None, None)
    rows = norm.run(x, weight, bias, 0.5, *given)
    exact = F.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double(), 0.5)
    step = rows.scale[:, None].double()
    got = (rows.q.double() - (given[1] if static else 0)) * step
    low, high = (step * (end + 64) for end in (-128, 127)) if static else (-torch.inf, torch.inf)
    exact = exact.clamp(low, high) if static else exact
    # A sum of K numbers, twice; then five roundings of numbers up to 30.
    error = (2 * shape[1] + 5) * torch.finfo(torch.float32).eps * 30
    finite = rows.scale.isfinite()
    assert finite.tolist() == [True, False, True][: shape[0]]
    assert bool(((got - exact).abs() <= step / 2 + error)[finite].all())
    assert torch.equal(rows.sums.sum(0)[finite], rows.q.sum(-1)[finite])
