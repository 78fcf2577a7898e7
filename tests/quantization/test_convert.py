"""convert: which layers are swapped, what stays as it was, and the errors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.convert import convert, dequantize
from fairseq.quantization.vit_layers import component_of, linear_layers


def quantized_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, PackedLinear | EmulatedLinear)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ops.METHODS)
def test_weight_only_is_the_float_model_with_emulated_weights(tiny_vit, pixels, bits, method, device):
    tiny_vit.to(device)
    result, report = convert(tiny_vit, QuantizationConfig(bits=bits, method=method, activations=None))
    assert len(report.quantized) == len(quantized_names(result)) == 13
    manual = copy.deepcopy(tiny_vit)
    for layer in linear_layers(manual).values():
        axis = 0 if method == "histogram" else None
        layer.weight.data = ops.emulate_int(layer.weight, bits, method, axis=axis)[0].detach()
    x = pixels.to(device)
    with torch.no_grad():
        assert torch.allclose(result(pixel_values=x).logits, manual(pixel_values=x).logits, atol=1e-5)
    assert {t.device.type for t in (*result.parameters(), *result.buffers())} == {device.type}


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "method": "histogram"}, {"bits": 3, "method": "channel",
                                      "group_size": 32, "symmetric": True}], ids=str)  # fmt: skip
def test_both_executions_hold_the_same_integers_and_give_nearly_the_same_logits(tiny_vit, pixels, settings):
    packed, _ = convert(tiny_vit, QuantizationConfig(**settings))
    emulated, report = convert(tiny_vit, QuantizationConfig(**settings, execution="emulated"))
    assert quantized_names(packed) == quantized_names(emulated) == [layer.name for layer in report.quantized]
    for name in quantized_names(packed):
        one, other = packed.get_submodule(name), emulated.get_submodule(name)
        assert (type(one), type(other)) == (PackedLinear, EmulatedLinear)
        assert torch.equal(one.integers(), other.integers())
        assert torch.equal(one.dequantize(), other.quantized_weight())
    with torch.no_grad():
        got, expected, plain = (m(pixel_values=pixels).logits for m in (packed, emulated, tiny_vit))
    # A value that lies on the edge between two integers may round to either: a fraction of the quantization error.
    assert (got - expected).abs().max() < 0.05 * (expected - plain).abs().max()


def test_an_emulated_model_trains_its_weights(tiny_vit, pixels):
    emulated, _ = convert(tiny_vit, QuantizationConfig(bits=4, method="channel", execution="emulated"))
    emulated.train()(pixel_values=pixels, labels=torch.arange(5)).loss.backward()
    for name in quantized_names(emulated):
        assert emulated.get_submodule(name).weight.grad.abs().sum() > 0, name


def test_gradients_asked_of_a_packed_model_name_the_way_out(tiny_vit, pixels):
    packed, _ = convert(tiny_vit, QuantizationConfig())
    output = packed(pixel_values=pixels, labels=torch.arange(5))  # runs with gradients enabled, as any model
    with pytest.raises(RuntimeError, match=r"classifier holds packed integers.*execution='emulated'"):
        output.loss.backward()


def test_no_float_weight_is_copied(tiny_vit, monkeypatch):
    copied = []
    original = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self) or original(self, memo)
    )
    convert(tiny_vit, QuantizationConfig(p=0.5))
    _, report = convert(tiny_vit, QuantizationConfig())
    assert len(report.quantized) == 13
    weights = {id(layer.weight) for layer in linear_layers(tiny_vit).values()}
    first, second = copied[: len(copied) // 2], copied[len(copied) // 2 :]
    assert sum(id(parameter) in weights for parameter in copied) == 7  # those of the first call that stay in float
    assert first
    assert second


def test_a_weight_that_another_module_uses_is_copied(tiny_vit):
    tiny_vit.extra = nn.Embedding(24, 24)
    attention = next(layer for name, layer in linear_layers(tiny_vit).items() if name.endswith(("q_proj", "query")))
    tiny_vit.extra.weight = attention.weight
    result, _ = convert(tiny_vit, QuantizationConfig())
    assert torch.equal(result.extra.weight, attention.weight)
    assert result.extra.weight is not attention.weight


@pytest.mark.parametrize("execution", ["packed", "emulated"])
def test_dequantized_model_is_plain_and_saves(tiny_vit, pixels, tmp_path, execution):
    settings = {"bits": 4, "method": "channel", "activations": None, "execution": execution}
    quantized, _ = convert(tiny_vit, QuantizationConfig(**settings))
    plain = dequantize(quantized)
    assert {type(layer) for layer in linear_layers(plain).values()} == {nn.Linear}
    assert quantized_names(quantized)  # which stays as it was
    plain.save_pretrained(tmp_path)
    loaded = type(tiny_vit).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
        assert torch.allclose(loaded(pixel_values=pixels).logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        dequantize(tiny_vit)
    with pytest.raises(TypeError, match="got str"):
        dequantize("model")


def test_save_pretrained_of_packed_integers_is_refused_with_two_ways_out(tiny_vit, tmp_path):
    quantized, _ = convert(tiny_vit, QuantizationConfig())
    for model in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        with pytest.raises(RuntimeError, match=r"state_dict.*dequantize_model"):
            model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    tiny_vit.save_pretrained(tmp_path / "float")  # the original can


@pytest.mark.parametrize("component", ["attention", "mlp", "classifier"])
def test_flags_choose_components(tiny_vit, component):
    flags = {f"quantize_{c}": c == component for c in ("attention", "mlp", "classifier")}
    result, report = convert(tiny_vit, QuantizationConfig(**flags))
    assert {component_of(n) for n in quantized_names(result)} == {component}
    assert len(report.quantized) == {"attention": 8, "mlp": 4, "classifier": 1}[component]
    assert all("=False" in layer.skipped for layer in report.skipped)


def test_share_p_is_seeded(tiny_vit):
    names = [quantized_names(convert(tiny_vit, QuantizationConfig(p=0.5, seed=s))[0]) for s in (0, 0, 1)]
    assert len(names[0]) == len(names[2]) == 6
    assert names[0] == names[1] != names[2]
    nothing, report = convert(tiny_vit, QuantizationConfig(p=0))
    assert quantized_names(nothing) == []
    assert "Quantized 0 linear layers" in str(report)


def test_overrides(tiny_vit):
    config = QuantizationConfig(
        bits=4, overrides={"classifier": {"skip": True}, "*layer*.0.*": {"bits": 8, "method": "channel"}}
    )
    result, report = convert(tiny_vit, config)
    assert type(result.classifier) is nn.Linear
    settings = {layer.name: (layer.bits, layer.method) for layer in report.quantized}
    first = {v for n, v in settings.items() if ".0." in n}
    assert first == {(8, "channel")}
    assert {v for n, v in settings.items() if ".1." in n} == {(4, "tensor")}
    assert [layer.skipped for layer in report.skipped] == ["skipped by an override"]


@pytest.mark.parametrize("kind", [ViTForImageClassification, ViTModel, ViTForMaskedImageModeling])
def test_every_kind_of_model(tiny_vit, pixels, kind):
    torch.manual_seed(0)
    model = kind(tiny_vit.config).eval()
    result, report = convert(model, QuantizationConfig(bits=8))
    assert type(result) is kind
    assert len(report.quantized) == {ViTForImageClassification: 13, ViTModel: 13, ViTForMaskedImageModeling: 12}[kind]
    with torch.no_grad():
        a, b = model(pixel_values=pixels), result(pixel_values=pixels)
    assert a.keys() == b.keys()
    assert 0 < (a[0] - b[0]).abs().max().item() < 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(tiny_vit, dtype):
    result, _ = convert(tiny_vit.to(dtype), QuantizationConfig(bits=4, method="histogram"))
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert result.classifier.bias.dtype == dtype
    assert {b.dtype for n, b in result.named_buffers() if n.endswith(".scale")} == {torch.float32}


def test_the_original_stays_as_it_was(tiny_vit, pixels):
    calls = []
    tiny_vit.classifier.register_forward_hook(lambda *args: calls.append("hook"))
    tiny_vit.train()
    tiny_vit.vit.eval()
    flags = [m.training for m in tiny_vit.modules()]
    state = copy.deepcopy(tiny_vit.state_dict())
    result, _ = convert(tiny_vit, QuantizationConfig(bits=2))
    assert [m.training for m in tiny_vit.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in tiny_vit.state_dict().items())
    assert not tiny_vit._forward_hooks
    assert quantized_names(tiny_vit) == []
    assert all(p.requires_grad for p in tiny_vit.parameters())
    shared = {p.data_ptr() for p in tiny_vit.parameters()} & {p.data_ptr() for p in result.parameters()}
    assert not shared
    # The copy has the flags and the hooks of the original, on the replaced layer too.
    assert [result.training, result.vit.training, result.classifier.training] == [True, False, True]
    result(pixel_values=pixels)
    assert calls == ["hook"]


def test_a_shared_layer_stays_shared(tiny_vit):
    layers = linear_layers(tiny_vit)
    first, second = (n for n in layers if n.endswith(("fc1", "intermediate.dense")))
    tiny_vit.set_submodule(second, layers[first])
    result, report = convert(tiny_vit, QuantizationConfig())
    assert result.get_submodule(first) is result.get_submodule(second)
    assert len(report.quantized) == 12


def test_a_shared_weight_stays_shared_and_is_counted_once(tiny_vit):
    layers = linear_layers(tiny_vit)
    first, second = (n for n in layers if n.endswith(("fc1", "intermediate.dense")))
    layers[second].weight = layers[first].weight
    result, report = convert(tiny_vit, QuantizationConfig(bits=4))
    one, other = result.get_submodule(first), result.get_submodule(second)
    assert one.weight_codes is other.weight_codes
    assert not torch.equal(one.bias, other.bias)
    assert report.bytes_before == sum(p.numel() * 4 for p in tiny_vit.parameters())
    weights = [m.weight for n, m in layers.items() if n != second]
    saved = sum(w.numel() * 4 - len(w) * -(-w.shape[1] // 2) - 5 for w in weights)
    assert report.bytes_after == report.bytes_before - saved + 13 * 16  # each layer records its settings


def test_report_counts_bytes(tiny_vit):
    result, report = convert(tiny_vit, QuantizationConfig(bits=4, method="channel"))
    weights = [m.weight for m in linear_layers(tiny_vit).values()]
    total = sum(p.numel() * 4 for p in tiny_vit.parameters())
    assert report.bytes_before == total
    packed = sum(len(w) * -(-w.shape[1] // 2) + len(w) * 5 + 16 for w in weights)
    assert report.bytes_after == total - sum(w.numel() * 4 for w in weights) + packed
    assert report.bytes_after == sum(t.nbytes for t in (*result.parameters(), *result.buffers()))
    emulated = convert(tiny_vit, QuantizationConfig(bits=4, method="channel", execution="emulated"))[1]
    assert emulated.bytes_after > total
    assert "emulated, with float weights" in str(emulated)


class NotPlain(nn.Linear):
    pass


def test_what_is_left_out_is_said(tiny_vit):
    tiny_vit.extra = nn.Linear(3, 3)
    tiny_vit.classifier.__class__ = NotPlain
    _, report = convert(tiny_vit, QuantizationConfig())
    reasons = {layer.name: layer.skipped for layer in report.skipped}
    assert reasons == {
        "classifier": "a NotPlain, not a plain nn.Linear",
        "extra": "not an attention, MLP or classifier layer",
    }
    assert "Left 1 in float, a NotPlain, not a plain nn.Linear: classifier" in str(report)


def test_errors_leave_the_model_alone(tiny_vit):
    state = copy.deepcopy(tiny_vit.state_dict())

    def fails(model, error, message, **settings):
        with pytest.raises(error, match=message):
            convert(model, QuantizationConfig(**settings))

    fails("google/vit", TypeError, "must be a torch.nn.Module.*got str")
    fails(convert(tiny_vit, QuantizationConfig(p=0.1))[0], ValueError, "quantized already: 1 layers, '.*' the first")
    with torch.device("meta"):
        fails(ViTModel(tiny_vit.config), ValueError, "meta device")
    fails(nn.Sequential(nn.Linear(2, 2)), ValueError, "its Linear layers are 0")
    fails(
        nn.Sequential(*[nn.Linear(2, 2)] * 1, *[nn.Linear(2, 2) for _ in range(20)]),
        ValueError,
        r"7, \.\.\. \(21 in all\)",
    )
    fails(nn.Conv2d(1, 1, 1), ValueError, "it has no Linear layer")
    only = {f"quantize_{c}": False for c in ("attention", "mlp")}
    masked = ViTForMaskedImageModeling(tiny_vit.config)
    fails(masked, ValueError, "no layer is left to quantize: quantize_attention=False; quantize_mlp=False", **only)
    half = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(2, 2)})})])})
    fails(half, ValueError, "found no attention layer of a HuggingFace ViT.*layers.0.mlp.fc1")
    fails(
        tiny_vit,
        ValueError,
        "override '\\*fc9' matches no selected layer; there are vit",
        overrides={"*fc9": {"bits": 8}},
    )
    assert all(torch.equal(v, state[k]) for k, v in tiny_vit.state_dict().items())
    name = list(linear_layers(tiny_vit))[4]
    tiny_vit.get_submodule(name).weight.data[0, 0] = float("nan")
    fails(tiny_vit, ValueError, f"{name}.weight has 1 NaN or Inf")
    tiny_vit.get_submodule(name).weight.data[0, 0] = 0
    tiny_vit.vit.layernorm.bias.data[1] = float("inf")
    fails(tiny_vit, ValueError, "vit.layernorm.bias has 1 NaN or Inf")
    assert quantized_names(tiny_vit) == []
