"""The kernels of PyTorch's operations against the reference, and the memory that those for the CPU share."""

import itertools
import sys

import pytest
import torch
from bounds import agrees
from packed_layers import GRIDS, INPUTS, make
from pairwise import pairwise
from products import SMALL, integers, is_exact_here
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import choose, cpu, functional, reference

choosing = sys.modules[choose.__module__]  # the package has the function by that name
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(kernel, layer, x, product=reference.product):
    """The form of ``kernel`` that the layer takes."""
    if layer.config.activations is None:
        return kernel.weight_only(x, layer.weight_matrix, layer.bias)
    more = (product,) if kernel is functional else ()
    return kernel.integer(x, layer.weight_matrix, layer.bias, layer.input_grid, *more)


# The product.

SHAPES = [(1, 1, 1), (1, 75, 21), (19, 3072, 8), (2, 33, 1), (17, 768, 40), (5, 7, 3), (64, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_product_is_exact(shape):
    rows, inner, columns = shape
    q, codes = integers(rows, inner, half=SMALL), integers(columns, inner, seed=1, half=SMALL)
    expected = reference.product(q, codes)
    assert expected.tolist() == (q.double() @ codes.double().T).int().tolist()
    got = cpu.product(q, codes)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


def test_the_check_finds_whether_this_processor_has_exact_products():
    """Neighbouring products add up past 16 bits, where some instructions saturate: of any sign, in any shape."""
    problem = choosing._compare(choosing.TABLE["cpu"], torch.device("cpu"))
    assert problem == (None if is_exact_here() else "their integer product differs from the reference's")
    extreme = [
        (torch.full((rows, inner), one, dtype=torch.int8), torch.full((5, inner), other, dtype=torch.int8))
        for one, other in itertools.product([127, -128, -127], [127, -128])
        for rows, inner in itertools.product((1, 9), (1, 2, 63, 3072))
    ]
    mixed = [(integers(rows, inner), integers(columns, inner, seed=1)) for rows, inner, columns in SHAPES]
    exact = all(torch.equal(cpu.product(q, codes), reference.product(q, codes)) for q, codes in extreme + mixed)
    assert exact == (problem is None)


@pytest.mark.parametrize("inner", [1, 63, 1024, 1025, 2047, 3072])
def test_products_of_floats_are_exact_on_every_processor(inner):
    """The largest of one sign, which add up to 2**24 in the pieces of 1,024, and mixed ones.

    Of 2,047 the sum is an odd number above that, which no float32 is.
    """
    ends = torch.tensor([127, -128], dtype=torch.int8)
    q, codes = (torch.cat([ends[:, None].expand(-1, inner), integers(9, inner, seed=seed)]) for seed in (0, 1))
    expected = reference.product(q, codes)
    assert torch.equal(cpu.product_of_floats(q, codes), expected)
    with torch.autocast("cpu"):
        assert torch.equal(cpu.product_of_floats(q, codes), expected)
    strided = torch.stack([q, q], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(cpu.product_of_floats(strided, codes), expected)


@pytest.mark.parametrize("rows", [1, 10])
def test_cpu_product_of_tensors_with_strides(rows):
    q, codes = integers(40, 2 * rows, half=SMALL).T[::2], integers(9, 80, seed=1, half=SMALL)[:, ::2]
    assert not codes.is_contiguous()
    assert torch.equal(cpu.product(q, codes), reference.product(q, codes))


# The whole layer.


@pairwise(
    bits=[2, 3, 4, 5, 8],
    grid=GRIDS,
    inputs=INPUTS,
    dtype=DTYPES,
    layer_dtype=DTYPES,
    symmetric=[False, True],
    weight_storage=["packed", "unpacked"],
    bias=[True, False],
    rows=[7, 1],
    strides=[False, True],
)
@pytest.mark.usefixtures("exact_int_mm")
def test_kernels_agree_with_the_reference(
    bits, grid, inputs, dtype, layer_dtype, symmetric, weight_storage, bias, rows, strides
):
    (method, group_size), (activations, activation_bits) = grid, inputs
    layer = make(
        bits, method, activations, group_size, symmetric, dtype=layer_dtype, weight_storage=weight_storage, bias=bias,
        activation_bits=activation_bits,
    )  # fmt: skip
    x = torch.randn(rows, 150, generator=generator(), dtype=torch.float64).to(dtype)
    x[0] *= 100
    x = x[:, ::2] if strides else x[:, :75].contiguous()
    results = [run(kernel, layer, x) for kernel in (reference, cpu, functional)]
    if layer.config.activations is not None:
        results.append(cpu.integer_of_floats(x, layer.weight_matrix, layer.bias, layer.input_grid))
    for got in (*results, run(functional, layer, x, cpu.product), run(functional, layer, x, cpu.product_of_floats)):
        assert got.dtype == dtype
        assert agrees(got, layer, x)


@pairwise(inputs=INPUTS, bias=[True, False], kernel=[cpu, reference, functional])
def test_no_rows(inputs, bias, kernel):
    layer = make(4, activations=inputs[0], activation_bits=inputs[1], bias=bias)
    assert run(kernel, layer, torch.randn(0, 75)).shape == (0, 21)


@pairwise(
    activation_bits=range(2, 9),
    activations=["dynamic", "static"],
    dtype=DTYPES,
    compute=[torch.float32, torch.float64],
    strides=[False, True],
)
def test_integers_of_the_cpu_kernel_are_those_of_the_grid(activations, activation_bits, dtype, compute, strides):
    grid = make(activations=activations, activation_bits=activation_bits).input_grid
    x = (3 * torch.randn(50, 75, generator=generator())).to(dtype)
    x = x.T.contiguous().T if strides else x
    q, scale = grid.quantize(x.to(compute))
    tokens = cpu._quantize(x, compute, grid)
    assert torch.equal(tokens.q, q.to(torch.int8))
    assert torch.equal(tokens.scale, scale)
    assert torch.equal(tokens.sums, q.sum(-1, keepdim=True).int())


# Slices.


def whole_numbers(bits, group_size=None, activations="dynamic"):
    """A layer with the scale 1 and whole inputs: every sum is exact in float32, in whatever order it is made."""
    linear = nn.Linear(70, 33)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (33, 70), generator=generator()))
        linear.weight[:, ::32] = -(2 ** (bits - 1))  # both ends in each group, so that the scale is 1
        linear.weight[:, 1::32] = 2 ** (bits - 1) - 1
        linear.bias.copy_(torch.arange(33.0))
    config = LinearConfig(bits, "channel", activations, group_size)
    layer = PackedLinear.from_float(linear, config, input_range=(-1, 2) if activations == "static" else None)
    assert bool((layer.scale == 1).all())
    return layer, torch.randint(-9, 10, (23, 70), generator=generator()).float()


@pairwise(
    sizes=[(150, 70), (500, 71 * 5), (1, 1)],
    group_size=[None, 32],
    bits=[3, 4, 8],
    activations=["dynamic", "static"],
)
def test_slices_change_nothing(monkeypatch, activations, bits, group_size, sizes):
    layer, x = whole_numbers(bits, group_size, activations)
    real = torch.randn(23, 70, generator=generator())  # rows are independent: equal for any numbers, too
    whole = [run(cpu, layer, real), cpu.weight_only(x, layer.weight_matrix, layer.bias)]
    multiply, slices = cpu._multiply, []
    monkeypatch.setattr(cpu, "_multiply", lambda tokens, *a: slices.append(len(tokens.q)) or multiply(tokens, *a))
    for name, value in zip(("SLICE", "WEIGHTS_AT_ONCE"), sizes, strict=True):
        monkeypatch.setattr(cpu, name, value)
    assert torch.equal(run(cpu, layer, real), whole[0])
    assert torch.equal(cpu.weight_only(x, layer.weight_matrix, layer.bias), whole[1])
    assert torch.equal(whole[1], x @ layer.dequantize().T + layer.bias)
    assert max(slices) == max(1, sizes[0] * torch.get_num_threads() // 70)
    assert sum(slices) == 23


@pairwise(bits=[3, 8], method=["tensor", "channel"], dtype=DTYPES)
def test_a_weight_that_is_dequantized_in_parts_gives_the_same(monkeypatch, bits, method, dtype):
    layer, x = make(bits, method, None), torch.randn(3, 75, generator=generator()).to(dtype)
    monkeypatch.setattr(cpu, "WEIGHTS_AT_ONCE", 75 * 4)  # of 21 outputs, each with a scale and a zero point of its own
    assert agrees(run(cpu, layer, x), layer, x)
