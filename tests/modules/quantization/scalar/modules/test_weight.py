"""IntLinear, IntConv2d and IntEmbedding: outputs, range updates, gradients, and state that survives everything."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fairseq.modules.quantization.scalar import ops, quantize_model_
from fairseq.modules.quantization.scalar.modules import ActivationQuantizer, IntConv2d, IntEmbedding, IntLinear
from fairseq.modules.quantization.scalar.modules.quantized_weight import QuantizedWeight

FLOAT_OUTPUT = {
    IntLinear: lambda layer, x, w: F.linear(x, w, layer.bias),
    IntConv2d: lambda layer, x, w: F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="reflect"), w, layer.bias, stride=2, groups=layer.groups
    ),
    IntEmbedding: lambda layer, x, w: F.embedding(x, w),
}


def make(kind, **settings):
    torch.manual_seed(0)
    if kind is IntLinear:
        return IntLinear(6, 5, **settings), torch.randn(3, 6)
    if kind is IntConv2d:
        return IntConv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect", **settings), torch.randn(
            2, 4, 8, 8
        )
    return IntEmbedding(9, 5, padding_idx=0, **settings), torch.tensor([[1, 2, 0], [8, 1, 1]])


KINDS = [IntLinear, IntConv2d, IntEmbedding]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("bits", [3, 8])
def test_eval_output_is_the_float_layer_with_the_quantized_weight(kind, method, bits, device):
    layer, x = make(kind, bits=bits, method=method)
    layer, x = layer.to(device).eval(), x.to(device)
    expected, scale, zero_point = ops.emulate_int(layer.weight, bits, method)
    assert torch.equal(layer(x), FLOAT_OUTPUT[kind](layer, x, expected.detach()))
    assert torch.equal(layer.quantized_weight(), expected)
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer.zero_point, zero_point)
    assert layer.scale.numel() == (len(layer.weight) if method == "channel" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_quantizes_a_share_p(kind):
    layer, x = make(kind, bits=2, p=0.5)
    seen = layer.train().noisy_weight()
    quantized = layer.quantized_weight()
    is_float, is_quantized = seen == layer.weight, seen == quantized
    assert bool((is_float | is_quantized).all())
    assert 0.2 < float((is_quantized & ~is_float).float().mean()) < 0.8
    plain, _ = make(kind, bits=2, p=0)
    assert plain.train().noisy_weight() is plain.weight
    full, _ = make(kind, bits=2, p=1)
    assert torch.equal(full.train()(x), full.eval()(x))


def test_range_is_observed_every_update_step_training_forwards():
    layer = IntLinear(4, 4, p=1, update_step=3, bits=8, method="tensor").train()
    x, scales = torch.randn(2, 4), []
    for _ in range(7):
        layer(x)
        scales.append(float(layer.scale))
        with torch.no_grad():
            layer.weight.mul_(2)
    assert scales[0] == scales[1] == scales[2]
    assert scales[3] == scales[4] == scales[5] == 8 * scales[0]
    assert scales[6] == 64 * scales[0]
    layer.eval()  # the range of the weight as it is now
    assert float(layer.scale) == 128 * scales[0]
    layer.train()(x)  # and from there the count begins anew
    with torch.no_grad():
        layer.weight.mul_(2)
    layer(x)
    assert float(layer.scale) == 128 * scales[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_float_weight_inside_the_range_only(kind):
    layer, x = make(kind, bits=4, method="tensor", p=1)
    layer.train()
    layer(x)
    with torch.no_grad():
        layer.weight.view(-1)[1] = 100.0  # now outside the observed range
        layer.weight.view(-1)[7] = 100.0
    layer.update_step = 10**6
    torch.manual_seed(0)
    layer(x).square().sum().backward()
    # The same through the surrogate: the quantized value, with the slope of the clamp.
    low, high = (float(v) for v in ops.representable_range(layer.scale, layer.zero_point, 4))
    other = layer.weight.detach().clone().requires_grad_()
    clamped = other.clamp(low, high)
    surrogate = layer.quantized_weight().detach() + (clamped - clamped.detach())
    FLOAT_OUTPUT[kind](layer, x, surrogate).square().sum().backward()
    expected = other.grad.clone()
    if kind is IntEmbedding:
        expected[0] = 0  # the padding row
    assert torch.equal(layer.weight.grad, expected)
    assert float(layer.weight.grad.view(-1)[7]) == 0
    assert float(layer.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ops.METHODS)
def test_state_survives_saving_copying_and_moving(kind, method, tmp_path, device):
    layer, x = make(kind, bits=4, method=method)
    layer, x = layer.to(device).eval(), x.to(device)
    expected = layer(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh, _ = make(kind, bits=4, method=method)
    with torch.no_grad():
        fresh.weight.mul_(7)
    fresh(x.cpu())  # has its own, other range by now
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt", map_location="cpu"))
    assert torch.equal(fresh.scale, layer.scale.cpu())
    for other in (fresh.to(device), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x), expected)
        assert other.scale.device.type == other.weight.device.type


def test_a_float_state_dict_forgets_the_old_range():
    layer = IntLinear(6, 5, bits=4).eval()
    x = torch.randn(2, 6)
    layer(x)
    source = nn.Linear(6, 5)
    with torch.no_grad():
        source.weight.mul_(10)
    layer.load_state_dict(source.state_dict())
    assert layer.scale is None
    expected = ops.emulate_int(source.weight, 4, "histogram")[0].detach()
    assert torch.equal(layer(x), F.linear(x, expected, source.bias))


def test_half_precision_keeps_the_scale_in_float32():
    layer = IntLinear(6, 5, bits=8, method="tensor").eval()
    layer(torch.randn(1, 6))
    before = layer.scale.clone()
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, before)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_through_the_meta_device(kind):
    layer, x = make(kind, bits=4)
    layer.eval()(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer(x)
    assert layer.to("meta").scale.is_meta
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("settings", [{"bits": 4, "method": "tensor"}, {"bits": 8, "method": "channel"}])
def test_state_of_other_settings_is_refused(settings):
    saved = IntLinear(6, 5, bits=8, method="tensor").eval()
    torch.nn.init.uniform_(saved.weight, -1, 1)
    saved(torch.randn(1, 6))
    other = nn.ModuleDict({"linear": IntLinear(6, 5, **settings)}).eval()
    other["linear"](torch.randn(1, 6))
    before = other["linear"].scale.clone()
    with pytest.raises(ValueError, match=r"linear\.scale and linear\.zero_point were saved by a layer with other"):
        other.load_state_dict(nn.ModuleDict({"linear": saved}).state_dict())
    assert torch.equal(other["linear"].scale, before)


@pytest.mark.parametrize(
    "settings", [{"scale_grad_by_freq": True}, {"padding_idx": 2}, {"max_norm": 0.5, "norm_type": 1.0}]
)
def test_embedding_settings_act_as_in_the_float_layer(settings):
    torch.manual_seed(0)
    layer, ids = IntEmbedding(6, 3, p=1, bits=8, method="tensor", **settings).train(), torch.tensor([1, 1, 2, 5])
    twin = nn.Embedding(6, 3, **settings)
    twin.load_state_dict({"weight": layer.weight.detach().clone()})
    for module in (layer, twin):
        module(ids).sum().backward()
    low, high = ops.representable_range(layer.scale, layer.zero_point, 8)  # the grid may end inside the range
    inside = (layer.weight >= low) & (layer.weight <= high)
    assert int(inside.sum()) >= 16
    assert torch.equal(layer.weight.grad, twin.weight.grad * inside)
    assert torch.equal(layer.weight, twin.weight)


SIGNATURES = {
    IntLinear: "in_features, out_features, bias=True, p=0, update_step=3000, bits=8, method='histogram'",
    IntConv2d: "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, "
    "padding_mode='zeros', p=0, bits=8, method='histogram', update_step=1000",
    IntEmbedding: "num_embeddings, embedding_dim, padding_idx=None, max_norm=None, norm_type=2.0, "
    "scale_grad_by_freq=False, sparse=False, _weight=None, p=0, update_step=1000, bits=8, method='histogram'",
    ActivationQuantizer: "module, p=1, update_step=1000, bits=8, method='histogram', clamp_threshold=5",
    quantize_model_: "model, p=0.2, bits=8, update_step=3000, method='histogram'",
}


@pytest.mark.parametrize("entry", SIGNATURES, ids=lambda e: e.__name__)
def test_signatures_are_those_of_fairseq(entry):
    parameters = inspect.signature(entry).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(shown) == SIGNATURES[entry]


def test_embedding_max_norm_is_applied_to_the_float_table():
    layer = IntEmbedding(4, 3, max_norm=1.0, bits=8).eval()
    with torch.no_grad():
        layer.weight.fill_(5.0)
    layer(torch.tensor([2]))
    # torch divides by the norm + 1e-7, of about 9; the norm, the quotient, the product and this norm are rounded
    assert layer.weight[2].norm().item() == pytest.approx(1.0, abs=1e-7 + 8 * torch.finfo(torch.float32).eps)
    assert layer.weight[1].norm().item() > 5


@pytest.mark.parametrize(("kind", "arguments"), [(IntLinear, (3, 4)), (IntConv2d, (3, 4, 3)), (IntEmbedding, (3, 4))])
def test_bad_settings(kind, arguments):
    for settings, message in (({"bits": 9}, "bits must"), ({"method": "foo"}, "method must"), ({"p": 2}, "p is the")):
        with pytest.raises(ValueError, match=message):
            kind(*arguments, **settings)


def test_sparse_embedding_and_foreign_modules_are_refused():
    with pytest.raises(ValueError, match="sparse=False"):
        IntEmbedding(3, 4, sparse=True)
    with pytest.raises(TypeError, match="got Conv1d"):
        IntLinear.from_float(nn.Conv1d(1, 1, 1), 0, 1, 8, "tensor")


def test_nan_weight_is_named():
    layer = IntLinear(3, 2).eval()
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"IntLinear\.weight has 1 NaN"):
        layer(torch.ones(1, 3))


def test_from_float_takes_over_everything():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2, groups=2, bias=False).eval()
    new = IntConv2d.from_float(conv, p=0.1, update_step=5, bits=4, method="channel")
    assert isinstance(new, QuantizedWeight)
    assert new.weight is conv.weight
    assert new.bias is None
    assert (new.stride, new.padding, new.dilation, new.groups, new.training) == ((2, 2), "valid", (2, 2), 2, False)
    assert (new.p, new.update_step, new.bits, new.method) == (0.1, 5, 4, "channel")
    assert "bits=4, method=channel" in repr(new)


def test_a_layer_whose_weight_is_computed_is_refused():
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with pytest.raises(ValueError, match="Linear cannot be replaced: its weight is computed"):
        IntLinear.from_float(pruned, 0, 1, 8, "tensor")
