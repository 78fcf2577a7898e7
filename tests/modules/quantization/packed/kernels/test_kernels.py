"""The kernels against the reference, the memory that they share, and the function that chooses among them."""

import itertools
import sys
import warnings

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear, kernels
from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import choose, cpu, functional, reference

CPU = torch.device("cpu")
choosing = sys.modules[choose.__module__]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", None), ("histogram", 32)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(
    bits=8, method="channel", activations="dynamic", group_size=None, symmetric=False, dtype=torch.float32, **more
):
    """A layer of odd width, its last group shorter than the others."""
    torch.manual_seed(0)
    linear = nn.Linear(more.pop("inputs", 75), more.pop("outputs", 21), dtype=dtype)
    input_range = more.pop("input_range", (-1.5, 3.0) if activations == "static" else None)
    config = LinearConfig(bits, method, activations, group_size, symmetric, **more)
    return PackedLinear.from_float(linear, config, "query", input_range).eval()


def integers(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=generator(seed)).to(torch.int8)


# The product.


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 75, 21), (19, 3072, 8), (2, 33, 1), (17, 768, 40), (5, 7, 3), (64, 64, 64)]
)
def test_cpu_product_is_exact(shape):
    rows, inner, columns = shape
    q, codes = integers(rows, inner), integers(columns, inner, seed=1)
    expected = reference.product(q, codes)
    assert expected.tolist() == (q.double() @ codes.double().T).int().tolist()
    got = cpu.product(q, codes)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("signs", list(itertools.product([127, -128, -127], [127, -128])))
def test_cpu_product_of_extreme_integers_is_exact(signs):
    """Neighbouring products add up past 16 bits, where some instructions saturate."""
    for rows, inner in itertools.product((1, 9), (1, 2, 63, 3072)):
        q = torch.full((rows, inner), signs[0], dtype=torch.int8)
        codes = torch.full((5, inner), signs[1], dtype=torch.int8)
        assert bool((cpu.product(q, codes) == inner * signs[0] * signs[1]).all())


@pytest.mark.parametrize("rows", [1, 10])
def test_cpu_product_of_tensors_with_strides(rows):
    q, codes = integers(40, 2 * rows).T[::2], integers(9, 80, seed=1)[:, ::2]
    assert not codes.is_contiguous()
    assert torch.equal(cpu.product(q, codes), reference.product(q, codes))


# The whole layer. T is the sum of the absolute terms that a result is made of; every bound is a multiple of it.


def absolute_terms(layer, x):
    q, scale = layer.input_grid.quantize(x.to(layer.scale.dtype)) if layer.config.activations else (x, 1)
    bias = layer.bias.double().abs()
    if layer.input_correction is not None:
        bias = bias + layer.input_correction.abs()
    return (q.double() * scale).abs() @ layer.dequantize().double().abs().T + bias


def integer_bound(layer, x):
    """Integers are exact: what rounds is int32 to float, each group's scale and sum, token scale, bias; then ``out``.

    A fixed grid's correction is rounded twice more, once for itself and once with the bias. With G groups that is
    2 G + 3 roundings of the compute dtype, half an eps of T each, on each side, and one of the
    dtype of x on each side, where that is another one.
    """
    compute, terms = torch.finfo(layer.scale.dtype), absolute_terms(layer, x)
    groups = layer.scale.shape[1] if layer.scale.ndim == 2 else 1
    bound = (2 * groups + (5 if layer.config.activations == "static" else 3)) * compute.eps * terms
    return bound + (0 if x.dtype == layer.scale.dtype else torch.finfo(x.dtype).eps * terms)


def weight_only_bound(layer, x):
    """K products and sums, in float32 at least, and two roundings of the dtype of x: of the product, of the bias."""
    terms = absolute_terms(layer, x)
    accumulated = x.shape[-1] * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return (accumulated + 2 * torch.finfo(x.dtype).eps) * terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activations", "activation_bits"), [("dynamic", 8), ("dynamic", 4), ("static", 8), ("static", 5), (None, 8)]
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_kernels_agree_with_the_reference(bits, method, group_size, symmetric, activations, activation_bits, dtype):
    layer = make(bits, method, activations, group_size, symmetric, dtype, activation_bits=activation_bits)
    x = torch.randn(7, 75, generator=generator(), dtype=torch.float64).to(dtype)
    x[0] *= 100
    weight = layer.weight_matrix
    if activations is None:
        expected, bound = reference.weight_only(x, weight, layer.bias), weight_only_bound(layer, x)
        results = [cpu.weight_only(x, weight, layer.bias), functional.weight_only(x, weight, layer.bias)]
    else:
        arguments = x, weight, layer.bias, layer.input_grid
        expected, bound = reference.integer(*arguments), integer_bound(layer, x)
        results = [
            cpu.integer(*arguments),
            functional.integer(*arguments, reference.product),
            functional.integer(*arguments, cpu.product),
        ]
    for got in results:
        assert got.dtype == dtype
        assert bool(((got.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", ["packed", "unpacked"])
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_input_of_another_dtype_than_the_layer_agrees_with_the_reference(activations, resident, dtype):
    layer = make(4, activations=activations, resident=resident)  # its scale is float32
    x = torch.randn(7, 75, generator=generator()).to(dtype)
    bound = weight_only_bound if activations is None else integer_bound
    got, expected = (run(kernel, layer, x, layer.bias) for kernel in (cpu, reference))
    assert got.dtype == expected.dtype == dtype
    # a float64 result is float32 rounded once more or less
    slack = torch.finfo(torch.float32).eps * absolute_terms(layer, x)
    assert bool(((got.double() - expected.double()).abs() <= bound(layer, x) + slack).all())


def run(kernel, layer, x, bias):
    """The form of ``kernel`` that the layer takes."""
    if layer.config.activations is None:
        return kernel.weight_only(x, layer.weight_matrix, bias)
    product = (cpu.product,) if kernel is functional else ()
    return kernel.integer(x, layer.weight_matrix, bias, layer.input_grid, *product)


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
@pytest.mark.parametrize("group_size", [None, 32])
def test_without_bias_and_with_strides(activations, group_size):
    layer = make(4, activations=activations, group_size=group_size)
    x = torch.randn(150, 14, generator=generator()).T[::2, ::2]
    expected = run(reference, layer, x, None)
    for kernel in (cpu, functional):
        assert torch.allclose(run(kernel, layer, x, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
@pytest.mark.parametrize("bias", [True, False])
def test_no_rows(activations, bias):
    layer = make(4, activations=activations)
    for kernel in (cpu, reference):
        assert run(kernel, layer, torch.randn(0, 75), layer.bias if bias else None).shape == (0, 21)


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_integers_of_the_cpu_kernel_are_those_of_the_grid(activations, activation_bits, dtype):
    grid = make(activations=activations, activation_bits=activation_bits).input_grid
    x = (3 * torch.randn(50, 75, generator=generator())).to(dtype)
    q, scale = grid.quantize(x.float())
    tokens = cpu._quantize(x, torch.float32, grid)
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


@pytest.mark.parametrize(("size", "at_once"), [(150, 70), (500, 71 * 5), (1, 1)])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_slices_change_nothing(monkeypatch, activations, bits, group_size, size, at_once):
    layer, x = whole_numbers(bits, group_size, activations)
    real = torch.randn(23, 70, generator=generator())  # rows are independent: equal for any numbers, too
    whole = [run(cpu, layer, real, layer.bias), cpu.weight_only(x, layer.weight_matrix, layer.bias)]
    multiply, slices = cpu._multiply, []
    monkeypatch.setattr(cpu, "_multiply", lambda tokens, *a: slices.append(len(tokens.q)) or multiply(tokens, *a))
    for name, value in (("SLICE", size), ("WEIGHTS_AT_ONCE", at_once)):
        monkeypatch.setattr(cpu, name, value)
    assert torch.equal(run(cpu, layer, real, layer.bias), whole[0])
    assert torch.equal(cpu.weight_only(x, layer.weight_matrix, layer.bias), whole[1])
    assert torch.equal(whole[1], x @ layer.dequantize().T + layer.bias)
    assert max(slices) == max(1, size * torch.get_num_threads() // 70)
    assert sum(slices) == 23


# The choice.


@pytest.fixture
def fresh(monkeypatch):
    """No environment variable, and nothing checked so far."""
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choosing, "_checked", {})


def wrong_product(q, codes):
    return cpu.product(q, codes) + (codes.shape[0] > 1)


def failing(*arguments):
    raise NotImplementedError("no such instruction")


def nudged(x, weight, bias, *grid):
    return reference.integer(x, weight, bias, *(grid or [InputGrid()])) + 0.01


def nudged_if_static(x, weight, bias, grid):
    return reference.integer(x, weight, bias, grid) + (0.01 if grid.scale is not None else 0)


BROKEN = {
    "product": ("product", wrong_product, "their integer product differs from the reference's"),
    "dynamic": ("integer", nudged, "at 8 bits, dynamic, they are off by 0.01"),
    "static": ("integer", nudged_if_static, "at 8 bits, static, they are off by 0.01"),
    "weight_only": ("weight_only", nudged, "at 8 bits, weight_only, they are off by"),
}


def break_cpu(monkeypatch, **functions):
    monkeypatch.setitem(choosing.TABLE, "cpu", choosing.TABLE["cpu"]._replace(**functions))


@pytest.mark.usefixtures("fresh")
def test_auto_takes_the_kernels_of_the_device():
    assert choose(CPU).name == "cpu"
    assert make().backend == "cpu"


@pytest.mark.usefixtures("fresh")
def test_a_device_without_kernels_gets_the_reference():
    assert choose(torch.device("meta")).name == "reference"


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.usefixtures("fresh")
def test_the_environment_forces(monkeypatch, name):
    layer = make()
    monkeypatch.setenv(kernels.ENVIRONMENT, name)
    assert choose(CPU).name == layer.backend == name


@pytest.mark.parametrize("name", ["", "auto"])
@pytest.mark.usefixtures("fresh")
def test_the_environment_may_leave_the_choice(monkeypatch, name):
    monkeypatch.setenv(kernels.ENVIRONMENT, name)
    assert choose(CPU).name == "cpu"


@pytest.mark.usefixtures("fresh")
def test_the_argument_wins_over_the_environment(monkeypatch):
    layer = make(backend="reference")
    monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    assert choose(CPU, "reference").name == layer.backend == "reference"
    monkeypatch.setenv(kernels.ENVIRONMENT, "nonsense")
    assert choose(CPU, "cpu").name == "cpu"


@pytest.mark.usefixtures("fresh")
def test_the_forced_kernels_are_those_that_run(monkeypatch):
    layer, x = make(), torch.randn(3, 75)
    monkeypatch.setitem(choosing.TABLE, "reference", choosing.TABLE["reference"]._replace(integer=nudged))
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert torch.equal(layer(x), nudged(x, layer.weight_matrix, layer.bias))


@pytest.mark.usefixtures("fresh")
def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend must be one of auto, reference, cpu, cuda, native; got 'gpu'"):
        choose(CPU, "gpu")
    monkeypatch.setenv(kernels.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match=f"^{kernels.ENVIRONMENT} must be one of auto, .*; got 'gpu'"):
        choose(CPU)


@pytest.mark.usefixtures("fresh")
def test_cuda_kernels_on_a_cpu_layer_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' runs on cuda, but the layer is on cpu"):
        make(backend="cuda")  # when it is made, not at the first forward
    monkeypatch.setenv(kernels.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match=f"{kernels.ENVIRONMENT}='cuda' runs on cuda, but the layer is on cpu"):
        choose(CPU)


@pytest.mark.parametrize("part", BROKEN)
@pytest.mark.usefixtures("fresh")
def test_kernels_with_wrong_numbers_are_left_out_with_one_warning(monkeypatch, part):
    field, function, message = BROKEN[part]
    break_cpu(monkeypatch, **{field: function})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, x = make(), torch.randn(3, 75)
        for _ in range(3):
            assert torch.equal(layer(x), run(reference, layer, x, layer.bias))
            assert layer.backend == "reference"
    assert len(caught) == 1
    assert f"the cpu kernels of packed layers are not used: {message}" in str(caught[0].message)


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError])
@pytest.mark.usefixtures("fresh")
def test_kernels_that_fail_are_left_out(monkeypatch, error):
    def failing(*arguments):
        raise error("no such instruction")

    break_cpu(monkeypatch, product=failing)
    with pytest.warns(UserWarning, match=f"they fail with {error.__name__}: no such instruction"):
        assert choose(CPU).name == "reference"


@pytest.mark.parametrize("forced_by", ["argument", "environment"])
@pytest.mark.filterwarnings("ignore:the cpu kernels")
@pytest.mark.usefixtures("fresh")
def test_forcing_broken_kernels_is_an_error(monkeypatch, forced_by):
    break_cpu(monkeypatch, product=wrong_product)
    if forced_by == "environment":
        monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    origin = "backend" if forced_by == "argument" else kernels.ENVIRONMENT
    for _ in range(2):  # what was found out once is still an error
        with pytest.raises(RuntimeError, match=f"^{origin}='cpu' cannot be used: their integer product differs"):
            choose(CPU, "cpu" if forced_by == "argument" else "auto")


@pytest.mark.usefixtures("fresh")
def test_kernels_are_checked_once(monkeypatch):
    original, calls = choosing._compare, []
    monkeypatch.setattr(choosing, "_compare", lambda *a: calls.append(a) or original(*a))
    layer = make()
    for _ in range(3):
        layer(torch.randn(2, 75))
        choose(CPU), choose(CPU, "cpu")
    assert len(calls) == 1


@pytest.mark.usefixtures("fresh")
def test_the_reference_is_not_checked(monkeypatch):
    monkeypatch.setattr(choosing, "_compare", failing)
    assert choose(CPU, "reference").name == "reference"


def test_the_check_finds_sums_that_saturate_in_16_bits():
    """As processors without VNNI do it: q + 128 as uint8, and two neighbouring products added in 16 bits."""

    def saturating(q, codes):
        pairs = ((q.int()[:, None] + 128) * codes.int()).view(len(q), len(codes), -1, 2).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).int() - 128 * codes.sum(-1, dtype=torch.int32)

    broken = choosing.TABLE["cpu"]._replace(name="saturating", product=saturating)
    assert choosing._compare(broken, CPU) == "their integer product differs from the reference's"


def test_the_check_leaves_the_random_numbers_of_the_process_alone():
    before = torch.get_rng_state()
    choosing._compare(choosing.TABLE["cpu"], CPU)
    assert torch.equal(torch.get_rng_state(), before)
