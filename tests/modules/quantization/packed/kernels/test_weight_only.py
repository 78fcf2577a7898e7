"""Weight-only layers on the native kernels: integers less their zeros times numbers rounded to bfloat16."""

import itertools

import pytest
import torch
from bounds import eps, is_within
from pairwise import pairwise
from torch.nn import functional as F

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import arguments, library, native, native_calls, operators
from fairseq.modules.quantization.packed.panels import sums_of, to_panels

LEVELS = [native.level_number(name) for name in native.levels()]
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: native.level_names()[level])
INF, NAN = float("inf"), float("nan")

pytestmark = [pytest.mark.skipif(not LEVELS, reason=library.NOT_BUILT), pytest.mark.usefixtures("two_threads")]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer_of(inputs, outputs, bits=8, zero=None, one_scale=False, factor=False):
    """A layer's tensors for the kernels, and its weight in float64."""
    random, offset = generator(0), 128 if bits == 8 else 0
    q = torch.randint(0, 2**bits, (outputs, inputs), generator=random)
    codes, count = (q - offset).to(torch.int8), 1 if one_scale else outputs
    scale = torch.rand(count, generator=random) * 0.01 + 1e-4
    zero_point = torch.randint(0, 2**bits, (count,), generator=random) if zero is None else torch.full((count,), zero)
    bias = torch.randn(outputs, generator=random)
    r = torch.rand(inputs, generator=random) + 0.5 if factor else None
    parts = to_panels(codes, bits), sums_of(codes, bits), scale, zero_point.to(torch.uint8), bias, r, None, None, None
    weight = (q - zero_point[:, None]).double() * scale.double()[:, None]
    return arguments.Prepared(parts, (inputs, outputs, bits, 1)), weight


def exact(x, layer, weight):
    """The output if nothing rounds but the input, and how far roundings of float32 may take it: float64.

    Products of two numbers of 8 bits are exact, and K of them are added up in any order; the sum is multiplied by the
    scale and added to the bias: K + 1 roundings by half of eps of the sum of magnitudes at most, and one for u**2.
    """
    factor, bias = layer.tensors[5], layer.tensors[4].double()
    halves = (x if factor is None else x * factor).bfloat16().double()
    total = halves.abs() @ weight.abs().T + bias.abs()
    return halves @ weight.T + bias, (x.shape[-1] + 2) * eps(torch.float32) / 2 * total


SETTINGS = [
    {"bits": 8}, {"bits": 8, "zero": 0, "one_scale": True}, {"bits": 8, "zero": 255}, {"bits": 5, "zero": 31},
    {"bits": 5, "factor": True}, {"bits": 4}, {"bits": 4, "zero": 15, "one_scale": True}, {"bits": 4, "factor": True},
    {"bits": 3, "zero": 0}, {"bits": 2}, {"bits": 2, "one_scale": True},
]  # fmt: skip
SHAPES = [(1, 1, 1), (1, 75, 21), (33, 33, 70), (70, 16, 32), (33, 48, 1000), (70, 1000, 40), (550, 600, 33)]
"""Rows, inputs and outputs: within a vector and beyond, within a piece of a panel and of several, many tiles."""


@pairwise(level=LEVELS, settings=SETTINGS, shape=SHAPES)
def test_a_layer_is_its_codes_times_numbers_in_bfloat16(level, settings, shape):
    rows, inputs, outputs = shape
    layer, weight = layer_of(inputs, outputs, **settings)
    x = torch.randn(rows, inputs, generator=generator(1))
    expected, bound = exact(x, layer, weight)
    got = native_calls.run_linear(layer.linear, x, level)
    assert is_within(got, expected, bound)
    residual = torch.randn(rows, outputs, generator=generator(2))
    assert torch.equal(native_calls.run_linear(layer.linear, x, level, residual=residual), got + residual)
    activated = native_calls.run_linear(layer.linear, x, level, activation="gelu")
    assert is_within(activated, F.gelu(got.double()), 4e-6 + eps(torch.float32) * got.abs())


@each_level
@pytest.mark.parametrize("inputs", range(1, 71, 3))
def test_every_length_of_a_row(level, inputs):
    """What fills the last group up is zero on both sides, whatever was in memory before."""
    full, _ = layer_of(96, 40)
    native_calls.run_linear(full.linear, torch.full((70, 96), NAN), level)
    layer, weight = layer_of(inputs, 35, 4)
    x = torch.randn(19, inputs, generator=generator(inputs))
    assert is_within(native_calls.run_linear(layer.linear, x, level), *exact(x, layer, weight))


@each_level
def test_a_half_rounds_to_even(level):
    layer, _ = layer_of(48, 3, 8, zero=127)
    layer.parts[0].zero_()
    layer.parts[0].view(-1)[:12] = torch.tensor([0, 0, 0, 0] * 3)  # q = 128: weights of the scale
    x = torch.zeros(4, 48)
    x[:, 0] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    scale, bias = layer.tensors[2], layer.tensors[4]
    rounded = torch.tensor([[1.0], [1 + 2**-6], [1 + 2**-7], [-1.0]])
    assert torch.equal(native_calls.run_linear(layer.linear, x, level), rounded * scale + bias)


@each_level
def test_bad_numbers_stay_in_their_row(level):
    layer, _ = layer_of(40, 50, 4)
    x = torch.randn(6, 40, generator=generator(0))
    broken = x.clone()
    broken[1, 3], broken[4, 39] = NAN, INF
    got, expected = (native_calls.run_linear(layer.linear, rows, level) for rows in (broken, x))
    assert bool(got[1].isnan().all())
    assert not bool(got[4].isfinite().any())
    assert torch.equal(got[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


@each_level
@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_bits_for_any_number_of_threads_and_rows(level, bits):
    layer, _ = layer_of(600, 100, bits)
    x = torch.randn(150, 600, generator=generator(0))
    expected = native_calls.run_linear(layer.linear, x, level)
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(native_calls.run_linear(layer.linear, x, level), expected)
    alone = [native_calls.run_linear(layer.linear, row[None], level) for row in x[::9]]
    assert torch.equal(torch.cat(alone), expected[::9])


def test_the_levels_without_instructions_for_bfloat16_agree():
    layer, _ = layer_of(171, 70, 5, factor=True)
    x = torch.randn(40, 171, generator=generator(0))
    outputs = {name: native_calls.run_linear(layer.linear, x, native.level_number(name)) for name in native.levels()}
    own_order = ("avx512bf16", "amx")
    assert all(torch.equal(y, outputs["portable"]) for name, y in outputs.items() if name not in own_order)


def test_a_level_that_disagrees_is_not_used(monkeypatch):
    run, portable = native_calls.run_linear, native.level_number("portable")

    def wrong(linear, x, level, **keywords):  # truncated, not rounded
        if linear.halves and level == portable:
            x = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
        return run(linear, x, level, **keywords)

    monkeypatch.setattr(native_calls, "run_linear", wrong)
    native.levels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="for portable are not used: their weight-only layer at 8 bits differs"):
            assert "portable" not in native.levels()
    finally:
        native.levels.cache_clear()


def test_what_does_not_fit_together_is_refused():
    layer, _ = layer_of(24, 24)
    with pytest.raises(ValueError, match="rounds its input to bfloat16 makes no integers of it"):
        native_calls.quantize(torch.ones(3, 24), layer, LEVELS[0])
    fixed = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32), torch.zeros(24)
    with pytest.raises(ValueError, match="rounded to bfloat16 has no static range"):
        arguments.Prepared((*layer.parts[:6], *fixed), (24, 24, 8, 1))
    integers = arguments.Prepared(layer.parts, (24, 24, 8))
    layers = dict.fromkeys(("query", "key", "value", "output", "fc1", "fc2"), layer)
    arguments.make_block({**layers, "fc1": integers, "output": integers}, {}, 3, 0.35)
    few = arguments.Prepared(layer.parts, (24, 24, 8, 0, 4))
    for one, other in ((layer, integers), (integers, few)):
        with pytest.raises(ValueError, match="the input of query, key, value is rounded once, to integers"):
            arguments.make_block({**dict.fromkeys(layers, one), "key": other}, {}, 3, 0.35)


# PackedLinear on them.


def packed(inputs=75, outputs=21, **settings):
    torch.manual_seed(0)
    return PackedLinear.from_float(torch.nn.Linear(inputs, outputs), LinearConfig(activations=None, **settings), "fc")


CONFIGS = [
    {},
    {"bits": 4, "method": "channel"},
    {"bits": 4, "weight_storage": "unpacked"},
    {"bits": 2, "symmetric": True},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_a_packed_layer_rounds_its_input_to_bfloat16(settings):
    layer = packed(**settings, backend="native")
    assert layer.backend == "native"
    weight, bias = layer.dequantize().double(), layer.bias.double()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = 2 * torch.randn(3, 5, 75, generator=generator(1)).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        halves = x.bfloat16().double()
        total = halves.abs() @ weight.abs().T + bias.abs()
        expected = halves @ weight.T + bias
        last = 0 if dtype == torch.float32 else eps(dtype) / 2 * 1.01 * expected.abs()
        assert is_within(y, expected, (75 + 4) * eps(torch.float32) / 2 * total + last)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_rounding_to_bfloat16_costs_what_the_guide_says(settings):
    """2**-8 of each input, and so of the sum of magnitudes."""
    layer, plain = packed(**settings, backend="native"), packed(**settings, backend="reference")
    x = torch.randn(40, 75, generator=generator(1))
    total = x.double().abs() @ plain.dequantize().double().abs().T
    roundings = (75 + 4) * eps(torch.float32) * (total + plain.bias.abs())
    assert is_within(layer(x), plain(x), 2**-8 * total + roundings)
    assert not is_within(layer(x), plain(x), roundings)
    assert is_within(layer(x.bfloat16().float()), plain(x.bfloat16().float()), roundings)


def test_where_bits_must_be_the_same_everywhere_other_kernels_run(monkeypatch):
    layer, plain, x = packed(backend="auto"), packed(backend="cpu"), torch.randn(4, 75)
    layer.use_native()
    rounded = layer(x)
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    assert layer.backend in ("cpu", "floats")  # which are the same here
    assert torch.equal(layer(x), plain(x))
    assert layer.reason_not_native() == (
        "activations=None: its products are of bfloat16, which FAIRSEQ_QUANTIZATION_ATTENTION=float32 rules out"
    )
    with pytest.raises(ValueError, match="cannot run fc: activations=None: its products are of bfloat16"):
        layer.use_native()
    monkeypatch.setenv(native_calls.ATTENTION, "bfloat16")
    assert layer.backend == "native"
    assert torch.equal(layer(x), rounded)


@pytest.mark.usefixtures("clean_compiler")
def test_a_compiled_layer_is_the_native_one_and_a_traced_one_is_in_float(monkeypatch):
    layer, plain, x = packed(outputs=90), packed(outputs=90, backend="cpu"), torch.randn(40, 75)
    layer.use_native()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(torch.export.export(torch.nn.Sequential(layer), (x,)).module()(x), expected)
        traced = torch.jit.trace(layer, x, check_trace=False)
        total = x.abs() @ plain.dequantize().abs().T + plain.bias.abs()
        assert is_within(traced(x), plain(x), 79 * eps(torch.float32) * total)
        monkeypatch.setenv(native_calls.ATTENTION, "float32")  # a graph that was recorded before stays what it is
        torch.compiler.reset()
        recorded = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert is_within(recorded, plain(x), 79 * eps(torch.float32) * total)


def test_programs_exported_earlier_say_nothing_of_bfloat16():
    """Their operators have three sizes of a layer, all of them of integers."""
    parts, sizes = list(packed(backend="native").parts()), [75, 21, 8]
    integers = PackedLinear.from_float(torch.nn.Linear(75, 21), LinearConfig(), "fc")
    integers.load_state_dict(packed().state_dict())
    integers.use_native()
    x = torch.randn(40, 75)
    assert torch.equal(operators.native_linear(x, parts, sizes), integers(x))
    halves = operators.native_linear(x, parts, [*sizes, 1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([halves, integers(x), packed()(x)], 2))
    torch.library.opcheck(operators.native_linear, (x, parts, [*sizes, 1]))
