"""PackedLinear: its numbers against a plain formula, its memory, its state, and everything that may be done to it."""

import concurrent.futures
import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.packing import packed_length
from fairseq.modules.quantization.packed.state import MAX_IN_FEATURES
from fairseq.modules.quantization.scalar import weights
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.tokens import quantize_tokens

OUT, IN = 21, 75
GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", None), ("histogram", 40)]
EPS = torch.finfo(torch.float32).eps
RANGE = (-1.7, 3.2)
INPUTS = [("dynamic", 8), ("dynamic", 4), ("static", 8), ("static", 5), (None, 8)]


def float_linear(inputs=IN, outputs=OUT, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias, dtype=dtype).eval()


def make(bits=8, method="channel", activations="dynamic", group_size=None, symmetric=False, **more):
    resident, backend = more.pop("resident", "packed"), more.pop("backend", "auto")
    activation_bits = more.pop("activation_bits", 8)
    input_range = more.pop("input_range", RANGE if activations == "static" else None)
    config = LinearConfig(bits, method, activations, group_size, symmetric, resident, backend, activation_bits)
    return PackedLinear.from_float(float_linear(**more), config, "encoder.query", input_range)


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(layer, x):
    """(y, T) in float64: the output, and the sum of the absolute terms that it is made of."""
    x, bias = x.to(layer.scale.dtype), 0 if layer.bias is None else layer.bias.double()
    scale, zero_point, bits = 1, 0, layer.config.activation_bits
    if layer.config.activations == "dynamic" and bits == 8:
        scale = x.abs().amax(-1, keepdim=True) * (1 / 127)
        x, scale = (x / scale).round(), scale.double()
    elif layer.config.activations == "dynamic":
        x, scale = quantize_tokens(x, bits)  # test_tokens.py has its definition
        scale = scale.double()
    elif layer.config.activations == "static":
        zero_point = layer.input_zero_point
        x = ((x / layer.input_scale).round() + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scale = layer.input_scale.double()
    w = layer.dequantize().double()
    magnitudes = (x.double().abs() * scale) @ w.abs().T + abs(scale * zero_point * w.sum(-1)) + abs(bias)
    return ((x.double() - zero_point) * scale) @ w.T + bias, magnitudes


def is_close(got, layer, x, roundings=12):
    """Within a dozen roundings of float32 (more for groups and float sums), and one of the dtype of x, of T."""
    expected, terms = formula(layer, x)
    count = roundings + (x.shape[-1] if layer.config.activations is None else 0)
    error = (got.double() - expected).abs()
    return bool((error <= (count * EPS + (x.dtype != torch.float32) * 2 * torch.finfo(x.dtype).eps) * terms).all())


# Numbers.


@pytest.mark.parametrize(("activations", "activation_bits"), INPUTS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_output_and_integers_are_those_of_the_formula(
    bits, method, group_size, symmetric, activations, activation_bits, device
):
    layer = make(bits, method, activations, group_size, symmetric, activation_bits=activation_bits).to(device)
    w = float_linear().weight.detach()
    scale, zero_point = weights.observe_weight(w, bits, method, group_size, symmetric)
    integers = weights.weight_to_int(w, scale, zero_point, bits, group_size)
    assert torch.equal(layer.integers().cpu(), integers)
    assert torch.equal(layer.dequantize().cpu(), weights.weight_to_real(integers, scale, zero_point, group_size))
    x = tokens(9, IN).to(device)
    assert is_close(layer(x), layer, x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_output_is_close_to_that_of_the_float_layer(bits, activations):
    linear, x = float_linear(), tokens(200, IN)
    layer = make(bits, activations=activations, input_range=(-4, 4) if activations == "static" else None)
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < (0.1 if bits == 4 else 0.015)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 5), (7, 33), (13, 1), (1, 9), (129, 2)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_odd_widths(inputs, outputs, bits, bias):
    layer, x = make(bits, inputs=inputs, outputs=outputs, bias=bias), tokens(5, inputs)
    assert is_close(layer(x), layer, x)
    assert (layer.in_features, layer.out_features) == (inputs, outputs)


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN), (4, IN), (2, 3, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_input_of_any_dimensions(shape, activations):
    layer, x = make(4, activations=activations), tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    rows = x.reshape(-1, IN)
    assert is_close(y.reshape(-1, OUT), layer, rows)
    if activations:  # integer sums do not depend on the shape
        assert torch.equal(y.reshape(-1, OUT), layer(rows))


@pytest.mark.parametrize(
    "view",
    [lambda: tokens(IN, 6).T, lambda: tokens(6, 2 * IN)[:, ::2], lambda: tokens(1, IN).expand(6, IN),
     lambda: tokens(3, IN, 2).transpose(1, 2), lambda: tokens(12, IN)[::2]],
    ids=["transposed", "columns", "expanded", "three", "rows"],
)  # fmt: skip
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_input_that_is_not_contiguous(view, activations):
    layer, x = make(4, activations=activations), view()
    before = x.clone()
    y = layer(x)
    assert torch.equal(x, before)
    assert is_close(y, layer, x)
    if activations:
        assert torch.equal(y, layer(x.contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
def test_one_nan_or_inf_spoils_its_token_and_no_other(value, dtype, group_size):
    layer, x = make(8, group_size=group_size), tokens(6, IN, dtype=dtype)
    clean = layer(x)
    x[2, 5] = value
    y = layer(x)
    assert not bool(torch.isfinite(y[2]).any())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_fixed_range_saturates_and_a_nan_spoils_its_token_and_no_other(backend, group_size, dtype):
    layer, x = make(8, activations="static", group_size=group_size, backend=backend), tokens(6, IN, dtype=dtype)
    x[:, :2] = torch.tensor(RANGE).to(dtype) * 2
    clean = layer(x)
    beyond = x.clone()
    beyond[:, 0], beyond[:, 1] = -float("inf"), 1e30
    assert torch.equal(layer(beyond), clean)
    x[2, 5] = float("nan")
    y = layer(x)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_a_fixed_range_is_the_float_computation_on_the_fake_quantized_input(
    activation_bits, method, group_size, symmetric
):
    layer = make(8, method, "static", group_size, symmetric, activation_bits=activation_bits)
    x = tokens(50, IN)
    half = 2 ** (activation_bits - 1)
    seen = torch.fake_quantize_per_tensor_affine(
        x, float(layer.input_scale), int(layer.input_zero_point), -half, half - 1
    )
    expected = nn.functional.linear(seen.double(), layer.dequantize().double(), layer.bias.double())
    assert float((layer(x) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("activations", ["dynamic", None])
def test_a_token_of_zeros_gives_exactly_the_bias(method, group_size, activations):
    layer, x = make(4, method, activations, group_size), tokens(3, IN)
    x[1] = 0
    assert torch.equal(layer(x)[1], layer.bias)
    without = make(4, method, activations, group_size, bias=False)
    assert bool((without(x)[1] == 0).all())


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize(("method", "group_size"), GRIDS)
def test_huge_and_tiny_tokens_are_as_exact_as_others(method, group_size, size):
    layer, x = make(8, method, group_size=group_size, bias=False), tokens(5, IN)
    x[1] *= size
    assert is_close(layer(x), layer, x)
    assert float(layer(x)[1].abs().max()) > 0.1 * size


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
def test_a_token_near_the_largest_float_stays_finite(method, group_size):
    layer, x = make(8, method, group_size=group_size), torch.full((1, IN), 1e36)
    assert bool(torch.isfinite(float_linear()(x)).all())
    assert bool(torch.isfinite(layer(x)).all())
    assert is_close(layer(x), layer, x)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_token_does_not_depend_on_its_neighbours(activations, bits, group_size, dtype):
    layer, x = make(bits, activations=activations, group_size=group_size), tokens(40, IN)
    x[1::2] *= 1e4
    x = x.to(dtype)
    together = layer(x)
    for row in (0, 1, 38):
        assert torch.equal(layer(x[row]), together[row])
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


# Arguments.


@pytest.mark.parametrize("x", [torch.zeros(2, IN + 1), torch.zeros(IN, 2), torch.zeros(()), torch.zeros(0)], ids=str)
def test_another_width_is_refused(x):
    with pytest.raises(
        ValueError, match=rf"encoder.query takes .* \(\.\.\., {IN}\), got torch.float32 of shape"
    ) as error:
        make()(x)
    assert str(error.value).endswith(f"of shape {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_another_kind_of_number_is_refused(dtype):
    with pytest.raises(ValueError, match=f"encoder.query takes a floating tensor .*, got {dtype}"):
        make()(torch.zeros(2, IN).to(dtype))


def test_what_cannot_be_packed_is_refused():
    config = LinearConfig()
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear, got Conv2d"):
        PackedLinear.from_float(nn.Conv2d(1, 1, 1), config, "head")
    with pytest.raises(ValueError, match="head cannot be packed: its weight is computed"):
        PackedLinear.from_float(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), config, "head")
    with pytest.raises(ValueError, match=r"head\.weight is on the meta device"):
        PackedLinear.from_float(nn.Linear(4, 4, device="meta"), config, "head")
    with pytest.raises(ValueError, match=r"head\.weight is empty: shape \(3, 0\)"):
        PackedLinear.from_float(nn.Linear(0, 3), config, "head")
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match=r"head\.weight has 16 NaN or Inf"):
        PackedLinear.from_float(broken, config, "head")
    with pytest.raises(ValueError, match=f"head has {MAX_IN_FEATURES} inputs; integer sums are exact below"):
        PackedLinear.from_float(nn.Linear(MAX_IN_FEATURES, 1), config, "head")


def test_integers_make_the_layer_of_their_weight():
    for bits, method, group_size, resident in itertools.product(
        (3, 6, 8), ("tensor", "channel"), (None, 32), ("packed", "unpacked")
    ):
        if method == "tensor" and group_size:
            continue
        layer = make(bits, method, "static", group_size, resident=resident)
        q, scale, zero_point, bias = (t.clone() for t in (layer.integers(), layer.scale, layer.zero_point, layer.bias))
        again = PackedLinear.from_integers(q, scale, zero_point, bias, layer.config, "key", RANGE)
        x = tokens(4, IN)
        expected = layer(x)
        assert torch.equal(again(x), expected)
        for given in (q, scale, zero_point, bias):
            given.zero_()
        assert torch.equal(again(x), expected)  # nothing is shared


def test_integers_that_do_not_fit_are_refused():
    config = LinearConfig(4, "channel")
    q, scale, zero_point = torch.ones(3, 40, dtype=torch.uint8), torch.ones(3), torch.ones(3, dtype=torch.int32)
    wrong = [
        (TypeError, "integers of key must be uint8, got torch.int8", {"q": q.to(torch.int8)}),
        (TypeError, "scale of float32 or float64 .*got torch.float16", {"scale": scale.half()}),
        (TypeError, "zero point of integers, got torch.float32 and torch.float32", {"zero_point": scale}),
        (ValueError, r"integers of key must have the shape \(out, in\), not empty; got \(3, 0\)", {"q": q[:, :0]}),
        (ValueError, r"integers of key must have the shape \(out, in\), not empty; got \(40,\)", {"q": q[0]}),
        (ValueError, r"shape \(3,\) for method 'channel' and group_size None, got \(1,\)", {"scale": scale[:1]}),
        (ValueError, r"group_size None, got \(3,\) and \(3, 1\)", {"zero_point": zero_point[:, None]}),
        (ValueError, r"shape \(3, 2\) .* group_size 32", {"config": LinearConfig(4, "channel", group_size=32)}),
        (ValueError, r"shape \(1,\) for method 'tensor'", {"config": LinearConfig(4)}),
        (ValueError, "scale of key must be positive and finite", {"scale": scale * 0}),
        (ValueError, "scale of key must be positive and finite", {"scale": scale / 0}),
        (ValueError, "from 0 to 15; in key they reach 16", {"q": q * 16}),
        (ValueError, "in key they reach 1, and -1 to -1", {"zero_point": -zero_point}),
        (ValueError, "key is symmetric, .* must be 8", {"config": LinearConfig(4, "channel", symmetric=True)}),
        (ValueError, r"bias of key must have the shape \(3,\), got \(4,\)", {"bias": torch.zeros(4)}),
        (ValueError, "key takes an input_range only with", {"input_range": RANGE}),
        (ValueError, "key has activations='static' and needs", {"config": LinearConfig(4, "channel", "static")}),
    ]
    right = {"q": q, "scale": scale, "zero_point": zero_point, "bias": None, "config": config, "name": "key"}
    assert torch.equal(PackedLinear.from_integers(**right).integers(), q)
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            PackedLinear.from_integers(**{**right, **change})


def test_a_range_that_is_missing_not_used_or_none_is_refused():
    with pytest.raises(ValueError, match=r"^encoder\.query has activations='static' and needs an input_range"):
        make(activations="static", input_range=None)
    with pytest.raises(ValueError, match=r"^encoder\.query takes an input_range only with activations='static'"):
        make(input_range=RANGE)
    with pytest.raises(ValueError, match=r"^the input_range of encoder\.query must be .* got \(1, -1\)"):
        make(activations="static", input_range=(1, -1))


def test_the_widest_layer_has_exact_sums():
    """The largest sums of products, 65535 * 127 * 255 and for a fixed range 65535 * 128 * 255, just fit int32."""
    width = MAX_IN_FEATURES - 1
    linear = nn.Linear(width, 2, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1)
        linear.weight[1] = -1
    for backend, activations in itertools.product(("cpu", "reference"), ("dynamic", "static")):
        config = LinearConfig(8, "channel", activations, backend=backend)
        layer = PackedLinear.from_float(linear, config, input_range=(-1, 0) if activations == "static" else None)
        x = -torch.ones(2, width)  # -128 if static
        assert torch.allclose(layer(x), linear(x), rtol=1e-5)
        assert is_close(layer(x), layer, x)


# Memory.


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("resident", ["packed", "unpacked"])
@pytest.mark.parametrize(
    ("method", "group_size", "scales"), [("tensor", None, 1), ("channel", None, OUT), ("channel", 32, 3 * OUT)]
)
@pytest.mark.parametrize(("bits", "row"), [(2, 19), (3, 19 + 10), (4, 38), (8, 75)])
def test_memory_is_that_of_the_integers(bits, row, method, group_size, scales, resident, activations):
    layer = make(bits, method, activations, group_size, resident=resident)
    row = row if resident == "packed" else IN
    assert list(layer.parameters()) == []
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers()}
    static = {"input_scale": 4, "input_zero_point": 4, "input_correction": 4 * OUT} if activations == "static" else {}
    assert sizes == {
        "weight_codes": OUT * row, "scale": 4 * scales, "zero_point": scales, "settings": 16, "bias": 4 * OUT, **static
    }  # fmt: skip
    held = {name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    assert held == set()  # nothing beside the buffers
    assert sum(b.untyped_storage().nbytes() for b in layer.buffers()) == sum(sizes.values())


def test_the_float_layer_is_neither_changed_nor_shared():
    linear = float_linear()
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    layer = PackedLinear.from_float(linear, LinearConfig(4))
    x = tokens(3, IN)
    expected = layer(x)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_taken_over_and_changes_nothing(training):
    layer = PackedLinear.from_float(float_linear().train(training), LinearConfig())
    assert layer.training is training
    x = tokens(3, IN)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_repr_says_what_it_is():
    shown = repr(make(4, group_size=32, symmetric=True))
    for part in ("in_features=75, out_features=21, bias=True", "bits=4", "group_size=32", "symmetric"):
        assert part in shown
    assert "backend" not in shown
    assert "activation_bits" not in shown
    assert "activations=static, activation_bits=6" in repr(make(4, activations="static", activation_bits=6))
    assert "backend=reference" in repr(make(4, backend="reference"))


# State.


@pytest.mark.parametrize("residents", [(a, b) for a in ("packed", "unpacked") for b in ("packed", "unpacked")], ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_state_dict_round_trip(bits, group_size, residents):
    saved = make(bits, group_size=group_size, resident=residents[0])
    fresh = make(bits, group_size=group_size, resident=residents[1], seed=5)
    x = tokens(4, IN)
    assert not torch.equal(fresh(x), saved(x))
    state = saved.state_dict()
    assert list(state) == ["weight_codes", "scale", "zero_point", "settings", "bias"]
    assert state["weight_codes"].dtype == torch.uint8
    assert state["weight_codes"].shape == (OUT, packed_length(IN, bits))  # what is saved does not depend on resident
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), saved(x))
    assert torch.equal(fresh.integers(), saved.integers())
    assert [b.dtype for b in fresh.buffers()] == [b.dtype for b in make(bits, resident=residents[1]).buffers()]


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("resident", ["packed", "unpacked"])
@pytest.mark.parametrize("bits", [3, 8])
def test_state_that_is_assigned(bits, resident, activations):
    saved, x = make(bits, activations=activations), tokens(4, IN)
    fresh = make(bits, activations=activations, resident=resident, seed=5)
    fresh.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(fresh(x), saved(x))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 8])
def test_state_dict_round_trip_of_a_fixed_range(bits, group_size):
    saved = make(bits, activations="static", group_size=group_size)
    fresh = make(bits, activations="static", group_size=group_size, seed=5, input_range=(-9, 1))
    state = saved.state_dict()
    assert list(state) == ["weight_codes", "scale", "zero_point", "settings", "bias", "input_scale", "input_zero_point"]
    assert [(state[key].dtype, state[key].shape) for key in ("input_scale", "input_zero_point")] == [
        (torch.float32, (1,)), (torch.int32, (1,))
    ]  # fmt: skip
    x = tokens(4, IN)
    assert not torch.equal(fresh(x), saved(x))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), saved(x))


@pytest.mark.parametrize("activations", ["dynamic", None])
def test_state_of_a_fixed_range_goes_into_no_other_layer_and_the_reverse(activations):
    static, other = (nn.ModuleDict({"query": make(activations=kind)}) for kind in ("static", activations))
    with pytest.raises(
        ValueError,
        match=r"^query was saved with a fixed input range, but this layer has none; .* activations='static'$",
    ):
        other.load_state_dict(static.state_dict())
    with pytest.raises(
        ValueError,
        match=r"^query was saved without a fixed input range, but this layer has one; .* other than 'static'$",
    ):
        static.load_state_dict(other.state_dict())


OTHERS = [
    ({"bits": 4}, "8 bits, 75 inputs, no groups, affine", "4 bits, 75 inputs, no groups, affine"),
    ({"bits": 5}, "8 bits, 75 inputs, no groups, affine", "5 bits, 75 inputs, no groups, affine"),
    ({"group_size": 32}, "8 bits, 75 inputs, no groups, affine", "8 bits, 75 inputs, groups of 32, affine"),
    ({"symmetric": True}, "8 bits, 75 inputs, no groups, affine", "8 bits, 75 inputs, no groups, symmetric"),
    ({"inputs": 74}, "8 bits, 75 inputs, no groups, affine", "8 bits, 74 inputs, no groups, affine"),
]


@pytest.mark.parametrize("resident", ["packed", "unpacked"])
@pytest.mark.parametrize(("settings", "was", "this"), OTHERS, ids=lambda v: str(v)[:20])
def test_state_of_other_settings_is_refused(settings, was, this, resident):
    saved = nn.ModuleDict({"encoder": nn.ModuleDict({"query": make()})})
    layer = make(**settings, resident=resident, seed=5)
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"query": layer})})
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=f"^encoder.query was saved with {was}, but this layer has {this}$"):
        model.load_state_dict(saved.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_groups_of_another_size_are_refused_where_their_number_is_the_same():
    saved, layer = make(group_size=40), make(group_size=64)
    assert saved.scale.shape == layer.scale.shape
    with pytest.raises(ValueError, match="saved with 8 bits, 75 inputs, groups of 40, affine"):
        layer.load_state_dict(saved.state_dict())


def test_a_refused_state_names_a_layer_that_is_loaded_by_itself():
    for state in (make(8).state_dict(), float_linear().state_dict()):
        with pytest.raises(ValueError, match=r"encoder\.query"):
            make(4).load_state_dict(state)


def test_a_float_state_dict_is_refused():
    for source in (float_linear(), EmulatedLinear.from_linear(float_linear(), 8, "channel")):
        model = nn.ModuleDict({"query": make()})
        with pytest.raises(
            ValueError, match=r"^query\.weight: .* float model.*execution='emulated'.*encoder\.query is"
        ):
            model.load_state_dict(nn.ModuleDict({"query": source}).state_dict())


@pytest.mark.parametrize(
    "missing", ["weight_codes", "scale", "zero_point", "settings", "bias", "input_scale", "input_zero_point"]
)
@pytest.mark.parametrize("resident", ["packed", "unpacked"])
def test_an_incomplete_state_dict_is_refused(missing, resident):
    activations = "static" if missing.startswith("input") else "dynamic"
    state = make(4, activations=activations).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        make(4, activations=activations, resident=resident).load_state_dict(state)


@pytest.mark.parametrize("resident", ["packed", "unpacked"])
def test_state_of_another_number_of_outputs_is_refused(resident):
    with pytest.raises(RuntimeError, match="size mismatch for weight_codes"):
        make(4, resident=resident).load_state_dict(make(4, outputs=20).state_dict())


def by_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_file(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(layer.config.bits, activations=layer.config.activations, resident=layer.config.weight_storage, seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": by_torch_save,
    "state file": by_state_file,
}


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("resident", ["packed", "unpacked"])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_copies_give_the_same_and_share_nothing(duplicate, activations, bits, resident):
    layer, x = make(bits, activations=activations, resident=resident), tokens(4, IN)
    expected = layer(x)
    other = COPIES[duplicate](layer)
    assert torch.equal(other(x), expected)
    assert other.config == layer.config
    for buffer in other.buffers():
        buffer.zero_()
    assert torch.equal(layer(x), expected)


# Dtypes.


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
@pytest.mark.parametrize("layer_dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_output_has_the_dtype_of_the_input_and_the_scale_keeps_its_own(layer_dtype, dtype, activations):
    layer = make(8, activations=activations)
    kept = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "bias"}
    scale, bias = layer.scale.clone(), layer.bias.clone()
    layer = {torch.float16: layer.half, torch.bfloat16: layer.bfloat16, torch.float64: layer.double}.get(
        layer_dtype, layer.float
    )()
    assert torch.equal(layer.scale, scale)
    assert layer.scale.dtype == torch.float32
    assert (layer.zero_point.dtype, layer.weight_codes.dtype) == (torch.uint8, torch.int8)
    for name, buffer in kept.items():
        assert torch.equal(getattr(layer, name), buffer)
        assert getattr(layer, name).dtype == buffer.dtype
    assert torch.equal(layer.bias, bias.to(layer_dtype))
    x = tokens(5, IN, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert is_close(y, layer, x, roundings=40 if activations is None else 12)


def test_to_a_dtype_keeps_the_scale():
    layer = make()
    before = layer.scale.clone()
    assert torch.equal(layer.to(torch.float16).scale, before)
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_a_float64_layer_computes_in_float64(activations):
    layer, x = make(8, activations=activations, dtype=torch.float64), tokens(5, IN).double()
    assert layer.scale.dtype == torch.float64
    expected, terms = formula(layer, x)
    assert bool(((layer(x) - expected).abs() <= 100 * torch.finfo(torch.float64).eps * terms).all())


@pytest.mark.parametrize("group_size", [None, 32])
def test_autocast_gives_every_layer_one_dtype(group_size):
    """Whatever autocast does to the output of a weight-only layer, groups are no reason for another dtype."""
    x = tokens(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(8, activations=None, group_size=group_size)(x).dtype == make(8)(x).dtype


# Gradients.


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_an_input_that_requires_grad_gives_the_same_output(activations):
    layer, x = make(4, activations=activations), tokens(3, IN)
    expected = layer(x)
    y = layer(x.clone().requires_grad_())
    assert torch.equal(y, expected)
    assert y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode):
    layer, x = make(4), tokens(3, IN).requires_grad_()
    with mode():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("activations", ["dynamic", None])
def test_modes_may_alternate(activations):
    """Scratch memory that is made in inference mode is written to in others, and the other way round."""
    layer, results = make(4, activations=activations), []
    for size in (2, 5, 9):
        x = tokens(size, IN)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                results.append(torch.equal(layer(x), layer(x.clone())))
    assert all(results)


# Threads.


def in_threads(work, items):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


@pytest.mark.parametrize("activations", ["dynamic", None])
@pytest.mark.parametrize("bits", [4, 8])
def test_eight_threads_at_once_get_what_one_gets(bits, activations):
    layer = make(bits, activations=activations)
    inputs = [tokens(1 + 7 * (n % 9), IN, seed=n) for n in range(120)]
    expected = [layer(x) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(layer, inputs), expected, strict=True))


@pytest.mark.parametrize("one_tensor", [True, False])
def test_eight_threads_at_once_with_a_shared_input(one_tensor):
    layers = [make(4, seed=seed) for seed in range(3)]
    inputs = [tokens(20, IN, seed=0 if one_tensor else n) for n in range(40)]
    if one_tensor:
        inputs = inputs[:1] * 40  # the very same one, read by every thread
    expected = [[layer(x) for layer in layers] for x in inputs]
    got = in_threads(lambda x: [layer(x) for layer in layers], inputs)
    assert all(torch.equal(a, b) for pair in zip(got, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_tensor_that_is_edited_between_two_layers_is_rounded_anew(activations, mode):
    """Through ``.data``, and in inference mode, nothing counts the edits."""
    query, key = (make(4, activations=activations, backend="cpu", seed=seed) for seed in (0, 1))
    x = tokens(5, IN)
    expected = key(x.flip(0) * -3)
    with mode():
        x = x.clone()
        query(x)
        x.data.copy_(x.flip(0) * -3)
        assert torch.equal(key(x), expected)


# Tracing, compiling, exporting: other kernels, so equal up to the roundings that is_close allows.


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize(("activations", "activation_bits"), INPUTS)
@pytest.mark.parametrize(("bits", "group_size"), [(3, None), (4, 32), (8, None)])
def test_trace_gives_the_same_for_other_batch_sizes(bits, group_size, activations, activation_bits):
    layer = make(bits, "channel", activations, group_size, activation_bits=activation_bits).eval()
    traced = torch.jit.trace(layer, tokens(2, 5, IN))
    for x in (tokens(2, 5, IN), tokens(7, 5, IN, seed=4), tokens(1, 1, IN, seed=5)):
        assert traced(x).shape == layer(x).shape
        assert is_close(traced(x), layer, x)


@pytest.fixture
def clean_compiler():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(3, None, "dynamic"), (4, 32, "dynamic"), (8, None, None), (8, None, "static"), (4, 32, "static")],
)
def test_compiled_without_a_break_gives_the_same(bits, group_size, activations):
    layer, x = make(bits, "channel", activations, group_size).eval(), tokens(4, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert is_close(compiled(x), layer, x)
    assert is_close(compiled(x), layer, x)  # with grad enabled, as scripts often leave it
    assert is_close(compiled(x.clone().requires_grad_()).detach(), layer, x)


@pytest.mark.usefixtures("clean_compiler")
def test_compiled_takes_other_batch_sizes():
    layer = make(4).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 1, 30):
        x = tokens(rows, IN, seed=rows)
        assert is_close(compiled(x), layer, x)


@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(3, None, "dynamic"), (4, 32, "dynamic"), (8, None, None), (8, None, "static"), (4, 32, "static")],
)
def test_exported_with_a_dynamic_batch_gives_the_same(bits, group_size, activations):
    layer = make(bits, "channel", activations, group_size).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(layer, (tokens(4, 5, IN),), dynamic_shapes={"input": {0: batch}}).module()
    for rows in (4, 9, 33):
        x = tokens(rows, 5, IN, seed=rows)
        assert is_close(exported(x), layer, x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("activations", "activation_bits"), INPUTS)
@pytest.mark.parametrize(("method", "group_size"), [("tensor", None), ("channel", None), ("channel", 32)])
def test_onnx_gives_the_same(tmp_path, method, group_size, activations, activation_bits):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    layer = make(4, method, activations, group_size, activation_bits=activation_bits).eval()
    rows, path = torch.export.Dim("rows", min=1, max=512), str(tmp_path / "layer.onnx")
    torch.onnx.export(
        layer, (tokens(6, IN),), path, input_names=["x"], dynamic_shapes={"input": {0: rows}}, verbose=False
    )
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("MatMulInteger") == (activations is not None and group_size is None)
    session = onnxruntime.InferenceSession(path)
    for rows in (6, 1, 17):
        x = tokens(rows, IN, seed=rows)
        (y,) = session.run(None, {"x": x.numpy()})
        assert is_close(torch.from_numpy(y), layer, x, roundings=IN if group_size else 12)
