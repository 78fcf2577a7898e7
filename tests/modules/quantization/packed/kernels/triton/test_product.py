"""The product and what follows it: on a GPU, or interpreted on the CPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import integers
from torch.nn import functional as F

from fairseq.modules.quantization.packed.kernels import reference
from fairseq.modules.quantization.packed.kernels.epilogue import finish
from fairseq.modules.quantization.packed.weight import code_offset
from fairseq.modules.quantization.scalar.tokens import quantize_static

pytest.importorskip("triton")

from fairseq.modules.quantization.packed.kernels.triton import product
from fairseq.modules.quantization.packed.kernels.triton.quantize import Rows
from fairseq.modules.quantization.packed.kernels.triton.tiles import Tile

SMALL, WITH_DESCRIPTORS = Tile(16, 32, 32, 4, 2), Tile(32, 16, 64, 4, 2, descriptors=True)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_rounded(got, x, dtype):
    """Whether float32 numbers ``x`` were rounded to ``dtype``; interpreted, Triton cuts bfloat16 off instead."""
    error = torch.finfo(dtype).eps * x.abs() if dtype == torch.bfloat16 and not x.is_cuda else 0 * x
    return got.dtype == dtype and bool(((got.float() - x.to(dtype).float()).abs() <= error).all())


class Case:
    """Quantized rows, a weight, and what the definition makes of them: ``expected``, float32."""

    def __init__(self, rows, columns, inner, device, bits=8, one=False, bias=True, correction=False, centred=False):
        q = integers(rows, inner).to(device)
        scale = (random(rows).abs() + 0.1).to(device)
        codes = integers(columns, inner, seed=1).to(torch.int16)
        codes = (codes if bits == 8 else codes + 128 & 2**bits - 1).to(torch.int8)
        shape = 1 if one else columns
        weight_scale = (random(shape, seed=2).abs() + 0.1).to(device)
        zero = torch.arange(shape).remainder(2**bits).to(torch.uint8)
        zero = torch.full_like(zero, code_offset(bits)) if centred else zero
        b = random(columns, seed=3).to(device) if bias else None
        c = random(columns, seed=4).to(device) if correction else None
        self.rows = Rows(q, scale, q.sum(-1, dtype=torch.int32)[None])
        self.weight = product.Weight(codes.to(device), weight_scale, zero.to(device), bits, centred, b, c)
        z = zero.to(torch.int64) - code_offset(bits)
        exact = q.cpu().long() @ (codes.long() - z[:, None]).T
        added = c if b is None else b if c is None else b + c
        self.expected = finish([exact.to(device)], weight_scale, scale[:, None], added)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 21, 75), (40, 70, 256)])
def test_it_has_the_bits_of_the_definition(sizes, bits, device):
    for tile in (SMALL, WITH_DESCRIPTORS):
        case = Case(*sizes, device, bits)
        assert torch.equal(product.run(case.rows, case.weight, tile, torch.float32), case.expected)


@settings(max_examples=12)
@given(rows=st.integers(1, 200), columns=st.integers(1, 80), inner=st.integers(1, 300), described=st.booleans())
def test_tiles_that_are_not_full(rows, columns, inner, described):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(rows, columns, inner, device, correction=True)
    tile = WITH_DESCRIPTORS if described else SMALL
    assert torch.equal(product.run(case.rows, case.weight, tile, torch.float32), case.expected)


@pytest.mark.parametrize(
    "changes", [{"one": True}, {"bias": False}, {"bias": False, "correction": True}, {"correction": True},
                 {"centred": True}], ids=str,
)  # fmt: skip
def test_what_a_layer_may_have_or_lack(changes, device):
    case = Case(5, 21, 75, device, **changes)
    assert torch.equal(product.run(case.rows, case.weight, SMALL, torch.float32), case.expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_once_to_the_dtype_asked_for(dtype, device):
    case = Case(5, 21, 32, device)
    case.rows = case.rows._replace(scale=case.rows.scale * 1e-3)
    expected = product.run(case.rows, case.weight, SMALL, torch.float32)
    assert is_rounded(product.run(case.rows, case.weight, SMALL, dtype), expected, dtype)


@pytest.mark.parametrize("tile", [SMALL, WITH_DESCRIPTORS])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 33, 80)])
def test_the_raw_product_is_exact(sizes, tile, device):
    rows, columns, inner = sizes
    q, codes = integers(rows, inner).to(device), integers(columns, inner, seed=1).to(device)
    assert torch.equal(product.run_raw(q, codes, tile), reference.product(q, codes))


def test_the_largest_sums(device):
    q = torch.full((3, 4096), -128, dtype=torch.int8, device=device)
    assert bool((product.run_raw(q, q, SMALL) == 4096 * 2**14).all())


ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, device):
    case = Case(40, 21, 32, device)
    case.rows = case.rows._replace(scale=case.rows.scale * 1e-4)
    x = product.run(case.rows, case.weight, SMALL, torch.float32)
    assert 4 < x.abs().max() < 100  # on both sides of where GELU is cut off
    got = product.run(case.rows, case.weight, SMALL, torch.float32, activation)
    error = 6e-5 + 2e-6 * x.abs() if activation == "gelu" else 8 * torch.finfo(x.dtype).eps * x.abs() + 1e-7
    assert bool(((got - ACTIVATIONS[activation](x)).abs() <= error).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_added_before_it_rounds(dtype, device):
    case = Case(19, 21, 75, device)
    residual = random(19, 21, seed=5).to(device, dtype)
    got = product.run(case.rows, case.weight, SMALL, dtype, residual=residual)
    assert is_rounded(got, case.expected + residual.float(), dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_for_the_next_layer(bits, device):
    case = Case(40, 70, 75, device, bits)
    scale, zero_point = torch.tensor([300.0], device=device), torch.tensor([-100], dtype=torch.int32, device=device)
    rows = product.run_to_rows(case.rows, case.weight, SMALL, "relu", product.Next(scale, zero_point))
    q, scales = quantize_static(case.expected.relu(), scale, zero_point)
    assert rows.sums.shape == (math.ceil(70 / SMALL.columns), 40)
    assert torch.equal(rows.q, q.to(torch.int8))
    assert torch.equal(rows.scale, scales[:, 0])
    assert torch.equal(rows.sums.sum(0), rows.q.sum(-1))
    following = Case(40, 21, 70, device)  # which adds up the parts
    whole = rows._replace(sums=rows.sums.sum(0, keepdim=True, dtype=torch.int32))
    got, expected = (product.run(r, following.weight, SMALL, torch.float32) for r in (rows, whole))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_no_other_becomes_so(bad, device):
    case = Case(40, 70, 75, device)
    case.rows.scale[3] = bad
    finite = torch.arange(40) != 3
    y = product.run(case.rows, case.weight, SMALL, torch.float32, "gelu")
    assert torch.equal(y.isfinite().all(-1).cpu(), finite)
    assert not bool(y[3].isfinite().any())
    following = product.Next(torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device))
    rows = product.run_to_rows(case.rows, case.weight, SMALL, "gelu", following)
    assert torch.equal(rows.scale.isfinite().cpu(), finite)


def test_no_rows(device):
    case = Case(0, 21, 75, device)
    assert product.run(case.rows, case.weight, SMALL, torch.float32).shape == (0, 21)
