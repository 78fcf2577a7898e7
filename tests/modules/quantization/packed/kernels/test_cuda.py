"""The CUDA kernels: their padding on the CPU, where torch._int_mm takes any size, and the rest on a GPU."""

import dataclasses

import pytest
import torch
from bounds import agrees
from pairwise import pairwise
from products import integers
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import cuda, reference

each_size = pairwise(rows=[1, 16, 17, 18], inner=[1, 7, 8, 71], columns=[1, 8, 33])
pytestmark = pytest.mark.usefixtures("exact_int_mm")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@each_size
def test_product_of_any_size_is_exact(rows, inner, columns, device):
    q, codes = integers(rows, inner).to(device), integers(columns, inner, seed=1).to(device)
    got = cuda.product(q, codes)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.product(q.cpu(), codes.cpu()).to(device))


@each_size
def test_only_sizes_that_cublaslt_takes_are_multiplied(monkeypatch, rows, inner, columns):
    original, shapes = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: shapes.append((*a.shape, *b.shape)) or original(a, b))
    cuda.product(integers(rows, inner), integers(columns, inner))
    ((m, k, k_, n),) = shapes
    assert m > 16
    assert k == k_
    assert k % 8 == n % 8 == 0
    assert (m, k - inner, n - columns) <= (max(rows, 17), 7, 7)  # and no more padding than that


def test_product_of_tensors_with_strides(device):
    q, codes = integers(30, 10).to(device).T[::2], integers(9, 60).to(device)[:, ::2]
    assert torch.equal(cuda.product(q, codes), reference.product(q.cpu(), codes.cpu()).to(device))


def test_product_of_the_largest_integers(device):
    q = torch.full((3, 3072), 127, dtype=torch.int8, device=device)
    assert bool((cuda.product(q, -q[:2] - 1) == -3072 * 127 * 128).all())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("traced_with", "called_with"), [(5, 40), (40, 5), (5, 9)])
def test_a_traced_product_takes_another_number_of_rows(traced_with, called_with):
    codes = integers(6, 16)
    traced = torch.jit.trace(lambda q: cuda.product(q, codes), integers(traced_with, 16), check_trace=False)
    q = integers(called_with, 16, seed=1)
    assert torch.equal(traced(q), reference.product(q, codes))


@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (3, 32), (4, None), (4, 32), (8, None), (8, 32)])
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_layer_is_close_to_the_reference(bits, group_size, activations, device):
    torch.manual_seed(0)
    config = LinearConfig(bits, "channel", activations, group_size)
    input_range = (-1.5, 3.0) if activations == "static" else None
    layer = PackedLinear.from_float(nn.Linear(75, 21).to(device), config, input_range=input_range)
    x = torch.randn(5, 75, device=device)
    form = "integer" if activations else "weight_only"
    arguments = x, layer.weight_matrix, layer.bias, *([layer.input_grid] if activations else [])
    assert agrees(getattr(cuda, form)(*arguments), layer, x)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 197])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_layer_runs_on_cuda_kernels(rows, dtype, backend):
    torch.manual_seed(0)
    config = LinearConfig(4, "channel", backend=backend)
    layer = PackedLinear.from_float(nn.Linear(75, 21), dataclasses.replace(config, backend="auto")).cuda()
    layer.config = config
    assert layer.backend == backend
    x = torch.randn(rows, 75, device="cuda", dtype=dtype)
    assert layer(x).dtype == dtype
    assert agrees(layer(x), layer, x)
    on_cuda, x = layer(x).cpu(), x.cpu()
    layer.config = dataclasses.replace(config, backend="auto")
    layer.cpu()
    assert torch.equal(on_cuda, reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))


@needs_cuda
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_moving_to_cuda_and_back_keeps_everything(bits):
    layer = PackedLinear.from_float(nn.Linear(75, 21), LinearConfig(bits, "channel"))
    x = torch.randn(5, 75)
    before, integers_before = layer(x), layer.integers()
    assert torch.equal(layer.cuda().integers().cpu(), integers_before)
    got = layer(x.cuda()).cpu()
    assert torch.equal(got, before)
    assert torch.equal(layer.cpu()(x), before)


@needs_cuda
def test_a_cuda_layer_refuses_cpu_kernels():
    layer = PackedLinear.from_float(nn.Linear(8, 8), LinearConfig(backend="cpu"))
    with pytest.raises(ValueError, match="backend='cpu' runs on cpu, but the layer is on cuda"):
        layer.cuda()(torch.randn(2, 8, device="cuda"))
