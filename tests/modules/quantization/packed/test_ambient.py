"""Whatever the process is set to when packed layers are made or first run: the same kernels, integers and outputs."""

import contextlib
import copy
import sys
import warnings

import pytest
import torch
from ambient import default_device
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import LinearConfig, PackedLinear, kernels
from fairseq.modules.quantization.packed.kernels import cpu, native
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding
from fairseq.modules.quantization.packed.table import PackedEmbedding, PackedTable, pack_parameter, unpack_parameters

CPU = torch.device("cpu")
choosing = sys.modules[kernels.choose.__module__]
pytestmark = pytest.mark.usefixtures("exact_int_mm")
RANGE = (-1.5, 3.0)


@contextlib.contextmanager
def setting(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float16 by default": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16 by default": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "another device by default": lambda: default_device("meta"),
    "a device context": lambda: torch.device("meta"),
    "medium precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
}
each_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)
SETTINGS = {
    "dynamic": {"method": "channel"},
    "static": {"method": "channel", "activations": "static"},
    "4-bit activations": {"bits": 4, "method": "tensor", "activation_bits": 4},
    "groups": {"bits": 4, "method": "histogram", "group_size": 32},
    "static, groups": {"bits": 3, "method": "channel", "group_size": 32, "activations": "static"},
    "reference": {"bits": 4, "backend": "reference"},
    "weight-only": {"bits": 4, "activations": None},
}
BEFORE = ("dynamic", "static, groups", "weight-only", "native")
NATIVE = {"native": {"backend": "native"}, "native, static": {"bits": 4, "backend": "native", "activations": "static"}}
LAYERS = {**SETTINGS, **(NATIVE if native.levels() else {})}
each_layer = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
needs_native = pytest.mark.skipif(not native.levels(), reason="no native kernels: there was no C++ compiler")


def first_use(monkeypatch):
    """As in a fresh process: nothing checked, no memory; and a warning is an error."""
    monkeypatch.setattr(choosing, "_checked", {})
    monkeypatch.setattr(cpu, "scratch", cpu.Scratch())
    cpu.floats_are_faster.cache_clear()
    native.levels.cache_clear()
    native._checked_level.cache_clear()
    warnings.simplefilter("error", UserWarning)


@pytest.fixture
def fresh(monkeypatch):
    with warnings.catch_warnings():
        yield lambda: first_use(monkeypatch)
    native.levels.cache_clear()


def float_linear(inputs=75, outputs=21):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def packed(linear, **settings):
    config = LinearConfig(**settings)
    return PackedLinear.from_float(linear, config, "fc", RANGE if config.activations == "static" else None)


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same(one, other):
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def same_buffers(one, other):
    pairs = zip(one.named_buffers(), other.named_buffers(), strict=True)
    return all(name == twin and same(tensor, its) for (name, tensor), (twin, its) in pairs)


def is_usable(module, x):
    """Outside of inference mode tensors made in it may neither be written to nor be recorded."""
    assert not any(tensor.is_inference() for tensor in (*module.buffers(), *module.parameters()))
    module.load_state_dict(module.state_dict())
    return module(x.clone().requires_grad_() if x.is_floating_point() else x).isfinite().all()


@each_state
def test_first_use_keeps_the_kernels(state, fresh):
    levels = native.levels()
    fresh()
    with state():
        assert kernels.choose(CPU).name in ("cpu", "floats")
        assert native.levels() == levels
        assert kernels.choose(CPU, "cpu").name == "cpu"
        assert kernels.choose(CPU, "floats").name == "floats"


@each_state
@each_layer
def test_a_layer_that_is_made_and_run_first_in_a_state_is_the_same(settings, state, fresh):
    linear, x = float_linear(), inputs(9, 75)
    expected = packed(linear, **settings)
    y, real, backend = expected(x), expected.dequantize(), expected.backend
    fresh()
    with state():
        layer = packed(linear, **settings)
        got = layer(x)
        assert layer.backend == backend
        assert same(layer.dequantize(), real)
        assert same(layer.integers(), expected.integers())
    assert same_buffers(layer, expected)
    assert got.dtype == y.dtype
    if settings.get("activations", 1) or state in (torch.inference_mode, torch.no_grad):
        assert same(got, y)  # what is multiplied in float follows the state, as with nn.Linear
    assert same(layer(x), y)
    assert is_usable(layer, x)


@each_state
@pytest.mark.parametrize("settings", [LAYERS[name] for name in LAYERS if name in BEFORE])
def test_a_layer_that_was_made_before_runs_the_same(settings, state, fresh):
    layer, x = packed(float_linear(), **settings), inputs(9, 75)
    y = layer(x)
    fresh()
    with state():
        got = layer(x)
        assert got.dtype == y.dtype
        if settings.get("activations", 1):
            assert same(got, y)
    assert same(layer(x), y)


@needs_native
@each_state
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_that_are_laid_out_in_a_state_are_the_same(bits, state):
    linear, x = float_linear(), inputs(9, 75)
    expected, layer = packed(linear, bits=bits, backend="native"), packed(linear, bits=bits)
    with state():
        layer.use_native()
        layer.load_state_dict(expected.state_dict())
    assert same_buffers(layer, expected)
    assert is_usable(layer, x)
    with state():
        layer.use_native(False)
    assert same_buffers(layer, packed(linear, bits=bits))
    assert is_usable(layer, x)


@each_state
def test_an_empty_layer_takes_a_state_dict(state):
    expected, x = packed(float_linear(), bits=4, method="channel", activations="static"), inputs(9, 75)
    with state():
        layer = PackedLinear.empty(75, 21, expected.config, "fc", device="cpu")
        layer.load_state_dict(expected.state_dict())
    assert same_buffers(layer, expected)
    assert is_usable(layer, x)
    assert same(layer(x), expected(x))


@needs_native
@pytest.mark.parametrize("settings", [{}, {"activations": "static"}], ids=str)
def test_a_change_in_place_is_seen_where_tensors_do_not_count_their_changes(settings):
    """Those that inference mode makes; and of a bias in half precision the kernels have a copy."""
    layer, x = packed(float_linear(), backend="native", **settings), inputs(9, 75)
    with torch.inference_mode():
        layer.to(torch.bfloat16)
        assert layer.bias.is_inference()
        before = layer(x)
        layer.bias.add_(64)  # what bfloat16 holds
        rounding = 64 * torch.finfo(torch.bfloat16).eps
        assert torch.allclose(layer(x), before + 64, rtol=0, atol=rounding)


def test_a_first_use_that_only_pretends_to_compute_is_checked_all_the_same(fresh, monkeypatch):
    levels = native.levels()
    fresh()
    with FakeTensorMode():
        assert kernels.choose(CPU).name == "cpu"
        assert native.levels() == levels
    assert list(choosing._checked.values()) == [None]
    fresh()
    monkeypatch.setitem(choosing.TABLE, "cpu", choosing.TABLE["cpu"]._replace(product=lambda q, codes: q @ codes.T))
    with FakeTensorMode(), pytest.warns(UserWarning, match="the cpu kernels of packed layers are not used"):
        assert kernels.choose(CPU).name == "floats"


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **kwargs or {})


@each_layer
def test_who_takes_operations_gets_all_of_them(settings):
    """Nothing reads the memory of a fake tensor, which has none, and a mode sees products, of the same numbers."""
    layer, x = packed(float_linear(), **settings), inputs(2, 5, 75)
    with torch.no_grad():
        expected = layer(x)
        with Seen() as mode:
            got = layer(x)
        assert any("mm" in name or "linear" in name for name in mode.names)
        if layer.config.activations is None:
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, expected)
            assert torch.equal(make_fx(layer)(x)(x), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(x)
            assert layer(fake).shape == expected.shape
        assert isinstance(layer(fake), FakeTensor)  # outside of the mode, too
        with FakeCopyMode(FakeTensorMode()) as copies:
            other = copy.deepcopy(layer)
        assert isinstance(other(copies.fake_mode.from_tensor(x)), FakeTensor)
    assert torch.equal(layer(x), expected)


def test_what_is_empty_is_on_the_default_device():
    config = LinearConfig(8, "channel", "static")

    def devices():
        return {
            b.device.type
            for part in (PackedLinear.empty(75, 21, config), PackedTable(4, 6, config))
            for b in part.buffers()
        }

    with torch.device("meta"):
        assert devices() == {"meta"}
    with default_device("meta"):
        assert devices() == {"meta"}
    assert devices() == {"cpu"}


@each_state
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_table_is_the_same(group_size, state):
    config = LinearConfig(4, "histogram", None, group_size)
    embedding, rows = nn.Embedding(7, 72), torch.tensor([[3, 6], [0, 3]])
    expected = PackedEmbedding.from_float(embedding, config, "positions")
    owner = nn.Module()
    owner.positions = nn.Parameter(embedding.weight.detach()[None].clone())
    with state():
        table = PackedEmbedding.from_float(embedding, config, "positions")
        got = table(rows)
        pack_parameter(owner, "positions", config, "positions")
        blank = PackedTable(7, 72, config, "positions", device="cpu", dtype=torch.float32)
        blank.load_state_dict(expected.state_dict())
    for other in (table, owner.packed_positions, blank):
        assert same_buffers(other, expected)
        assert is_usable(other, rows)
    assert same(got, expected(rows))
    with state():
        unpack_parameters(owner)
    assert same(owner.positions.detach(), expected.weight[None])
    assert not owner.positions.is_inference()


@each_state
def test_patches_are_the_same(state):
    torch.manual_seed(0)
    conv, linear, x = nn.Conv2d(3, 10, 4, 4), nn.Linear(48, 10), inputs(2, 3, 8, 8)
    config = LinearConfig(8, "channel")
    expected = PackedPatchEmbedding.from_conv(conv, packed(linear, bits=8, method="channel"), "patches")
    y = expected(x)
    with state():
        layer = PackedPatchEmbedding.from_conv(conv, packed(linear, bits=8, method="channel"), "patches")
        got, weight = layer(x), layer.weight
        blank = PackedPatchEmbedding(3, 10, (4, 4), config, "patches", device="cpu", dtype=torch.float32)
        blank.load_state_dict(expected.state_dict())
    assert same(got, y)
    assert same(weight, expected.weight)
    for other in (layer, blank):
        assert same_buffers(other, expected)
        assert is_usable(other, x)
        assert same(other(x), y)


@pytest.mark.parametrize("enabled", [True, False])
def test_integers_are_decided_with_onednn_which_exporting_turns_off(monkeypatch, enabled):
    onednn = torch.backends.mkldnn
    monkeypatch.setattr(onednn, "enabled", enabled)
    with plain_context():
        assert onednn.enabled
    assert onednn.enabled == enabled
