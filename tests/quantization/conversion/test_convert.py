"""convert: which layers are swapped, what stays as it was, and the errors."""

import copy
from dataclasses import replace

import pytest
import torch
from bounds import EXACT, flips, rms, rounding_noise, sum_error
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens
from fairseq.quantization.architectures.families import component_of
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert, finish
from fairseq.quantization.conversion.dequantize import dequantize
from fairseq.quantization.rounding.round_weight import round_weight


def quantized_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, PackedLinear | EmulatedLinear)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ops.METHODS)
def test_weight_only_is_the_float_model_with_emulated_weights(tiny_vit, pixels, bits, method, device):
    tiny_vit.to(device, torch.float64)
    result, report = convert(tiny_vit, QuantizationConfig(bits=bits, method=method, activations=None, equalize=False))
    assert len(report.quantized) == len(quantized_names(result)) == 13
    manual = copy.deepcopy(tiny_vit)
    for layer in linear_layers(manual).values():
        axis = 0 if method == "histogram" else None
        searched = "histogram" if method == "tensor" else method
        layer.weight.data = ops.emulate_int(layer.weight, bits, searched, axis=axis)[0].detach()
    x = pixels.to(device, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(result(pixel_values=x).logits, manual(pixel_values=x).logits, **EXACT)
    assert {t.device.type for t in (*result.parameters(), *result.buffers())} == {device.type}


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "method": "histogram"}, {"bits": 3, "method": "channel",
                                      "group_size": 32, "symmetric": True}], ids=str)  # fmt: skip
def test_both_executions_hold_the_same_integers_and_give_nearly_the_same_logits(tiny_vit, pixels, settings):
    packed, _ = convert(tiny_vit, QuantizationConfig(**settings), engine="layers")
    emulated, report = convert(tiny_vit, QuantizationConfig(**settings, execution="emulated"))
    assert quantized_names(packed) == quantized_names(emulated) == [layer.name for layer in report.quantized]
    for name in quantized_names(packed):
        one, other = packed.get_submodule(name), emulated.get_submodule(name)
        assert (type(one), type(other)) == (PackedLinear, EmulatedLinear)
        assert torch.equal(one.integers(), other.integers())
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.weight_matrix.dequantize(), other.quantized_weight())
    with torch.no_grad():
        got, expected = (m(pixel_values=pixels).logits for m in (packed, emulated))
    assert rms(got - expected) < flips(packed, pixels)


def test_an_emulated_model_trains_its_weights(tiny_vit, pixels):
    emulated, _ = convert(tiny_vit, QuantizationConfig(bits=4, method="channel", execution="emulated"))
    emulated.train()(pixel_values=pixels, labels=torch.arange(5)).loss.backward()
    for name in quantized_names(emulated):
        assert emulated.get_submodule(name).weight.grad.abs().sum() > 0, name


def test_a_packed_model_passes_gradients_to_what_is_still_float(tiny_vit, pixels):
    packed, _ = convert(tiny_vit, QuantizationConfig())
    packed(pixel_values=pixels, labels=torch.arange(5)).loss.backward()
    for name, parameter in packed.named_parameters():
        assert parameter.grad is not None, name


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
    tiny_vit, pixels = tiny_vit.double(), pixels.double()
    quantized, _ = convert(tiny_vit, QuantizationConfig(**settings))
    plain = dequantize(quantized)
    assert {type(layer) for layer in linear_layers(plain).values()} == {nn.Linear}
    assert quantized_names(quantized)  # which stays as it was
    plain.save_pretrained(tmp_path)
    loaded = type(tiny_vit).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, expected, **EXACT)
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        dequantize(tiny_vit)
    with pytest.raises(TypeError, match="got str"):
        dequantize("model")


def test_the_hook_of_the_root_is_there_once_and_goes(tiny_vit):
    calls = []
    tiny_vit.register_forward_hook(lambda *arguments: calls.append(arguments))
    model = tiny_vit
    for _ in range(3):
        packed, _ = convert(model, QuantizationConfig())
        assert len(packed._forward_hooks) == 2
        finish(packed, "auto")  # as loading does once more
        assert len(packed._forward_hooks) == 2
        model = dequantize(packed)
        assert len(model._forward_hooks) == 1  # the user's


def test_a_model_in_training_is_dequantized_with_the_ranges_of_its_weights(tiny_vit, pixels):
    emulated, _ = convert(tiny_vit, QuantizationConfig(bits=4, method="channel", execution="emulated"))
    emulated.train()(pixel_values=pixels)
    for name in quantized_names(emulated):
        emulated.get_submodule(name).weight.data *= 3
    got = dequantize(emulated).state_dict()
    expected = dequantize(emulated.eval()).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


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
    assert 0 < rms(a[0] - b[0]) ** 2 < rounding_noise(2 * 13) * rms(a[0]) ** 2


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
    calls.clear()  # equalization saw what runs
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
    result, report = convert(tiny_vit, QuantizationConfig(bits=4, equalize=False), engine="layers")
    one, other = result.get_submodule(first), result.get_submodule(second)
    assert one.weight_codes is other.weight_codes
    assert not torch.equal(one.bias, other.bias)
    assert report.bytes_before == sum(p.numel() * 4 for p in tiny_vit.parameters())
    weights = [m.weight for n, m in layers.items() if n != second]
    saved = sum(w.numel() * 4 - len(w) * -(-w.shape[1] // 2) - 5 for w in weights)
    assert report.bytes_after == report.bytes_before - saved + 13 * 16  # each layer records its settings


def test_report_counts_bytes(tiny_vit):
    result, report = convert(tiny_vit, QuantizationConfig(bits=4, method="channel"), engine="layers")
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


# With calibration images.


@pytest.fixture
def images():
    """A few are enough, but for means."""
    return alike(12)


def alike(count):
    """Pictures with something in common, at most 20."""
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(6, 3, 16, 16, generator=generator)
    return torch.einsum("ni,ichw->nchw", torch.randn(20, 6, generator=generator)[:count], base)


def output_error(model, quantized, x):
    with torch.no_grad():
        return (model(pixel_values=x).logits - quantized(pixel_values=x).logits).square().mean().item()


@pytest.mark.parametrize(
    ("settings", "execution"),
    [
        ({"method": "tensor"}, "packed"), ({"method": "channel"}, "emulated"), ({"method": "histogram"}, "emulated"),
        ({"method": "channel", "group_size": 32}, "packed"),
    ],
    ids=str,
)  # fmt: skip
def test_calibrated_models_are_closer(tiny_vit, images, settings, execution):
    config = QuantizationConfig(bits=3, activations=None, execution=execution, **settings)
    errors = [output_error(tiny_vit, convert(tiny_vit, config, data)[0], images) for data in (None, images[:8])]
    assert errors[1] < 0.8 * errors[0]


def test_both_executions_hold_the_same_calibrated_integers(tiny_vit, images):
    """In float64, for what each layer reads is the same in both then but for rounding."""
    tiny_vit, images = tiny_vit.double(), images.double()
    for method in ("tensor", "channel"):
        config = QuantizationConfig(bits=4, method=method, activations=None, rounding="gptq")
        packed, _ = convert(tiny_vit, config, images)
        emulated, _ = convert(tiny_vit, replace(config, execution="emulated"), images)
        for name in quantized_names(packed):
            assert torch.equal(packed.get_submodule(name).integers(), emulated.get_submodule(name).integers()), name
        first = quantized_names(packed)[0]
        one, other = packed.get_submodule(first), emulated.get_submodule(first)
        for training in (False, True, False):  # the chosen grid is kept until the weight is trained
            emulated.train(training)(pixel_values=images[:1])
            assert torch.equal(one.integers(), other.integers())
            assert torch.equal(one.scale, other.scale)
        with torch.no_grad():
            got, expected = (m(pixel_values=images).logits for m in (packed, emulated))
        torch.testing.assert_close(got, expected, **EXACT)


def test_static_activations_have_a_calibrated_range(tiny_vit, images):
    config = QuantizationConfig(bits=8, method="channel", activations="static")
    result, report = convert(tiny_vit, config, images)
    by_kind = {layer.name: layer.activations for layer in report.quantized}
    assert "static" in by_kind.values()
    for name, kind in by_kind.items():
        assert (result.get_submodule(name).input_scale is not None) == (kind == "static")
    assert output_error(tiny_vit, result, images) < 0.01 * tiny_vit(pixel_values=images).logits.var()


def test_layers_that_cannot_bear_one_range_stay_dynamic_and_say_so(tiny_vit, images):
    layer = next(m for n, m in tiny_vit.named_modules() if n.endswith(("layernorm_after",)))
    with torch.no_grad():
        layer.weight[0] = 3000  # one channel of a LayerNorm's output dwarfs all others
    config = QuantizationConfig(bits=8, method="channel", activations="static", activation_bits=4)
    result, report = convert(tiny_vit, config, images)
    noted = [layer for layer in report.quantized if layer.note]
    assert noted
    assert all(record.activations == "dynamic" for record in noted)
    assert all(result.get_submodule(record.name).config.activations == "dynamic" for record in noted)
    assert "dynamic instead of static" in str(report)


@pytest.mark.parametrize(
    "settings", [{"activations": "static"}, {"rounding": "gptq"}, {"bias_correction": True}], ids=str
)
def test_what_needs_images_says_so_without_them(tiny_vit, settings):
    with pytest.raises(ValueError, match=r"needs images; call quantize_model\(model, calibration=images\)"):
        convert(tiny_vit, QuantizationConfig(**settings))


def test_bias_correction_removes_the_mean_error(tiny_vit, monkeypatch):
    images = alike(20)
    monkeypatch.setattr(
        "fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0
    )  # every token counts the same
    name = next(n for n in linear_layers(tiny_vit) if n.endswith(("fc1", "intermediate.dense")))
    config = QuantizationConfig(
        bits=2, method="channel", activations=None, rounding="nearest", overrides={name: {}, "*": {"skip": True}}
    )
    seen = []
    for settings in (False, True):
        changed = replace(config, overrides={name: {"bias_correction": settings}, "*": {"skip": True}})
        result, _ = convert(tiny_vit, changed, images)
        outputs = []
        for model in (tiny_vit, result):
            hook = model.get_submodule(name).register_forward_hook(
                lambda m, a, y, seen=outputs: seen.append(y.detach())
            )
            with torch.no_grad():
                model(pixel_values=images)
            hook.remove()
        seen.append((outputs[1] - outputs[0]).mean((0, 1)).square().mean())
    # What is left is the float32 of two means: over the tokens, and over the inputs that are multiplied.
    left = sum_error(images.shape[0] * 17 + 24, float(outputs[0].abs().max())) ** 2
    assert seen[1] < left < 0.01 * seen[0]


def test_a_bias_is_added_only_if_asked(tiny_vit, images):
    name = next(n for n in linear_layers(tiny_vit) if n.endswith(("fc1", "intermediate.dense")))
    tiny_vit.get_submodule(name).bias = None
    for asked, present in ((True, False), ("add", True)):
        result, _ = convert(tiny_vit, QuantizationConfig(bits=4, bias_correction=asked), images)
        assert (result.get_submodule(name).bias is not None) == present


def test_an_interrupted_calibration_leaves_the_model_alone(tiny_vit, images, monkeypatch):
    before = copy.deepcopy(tiny_vit.state_dict())
    calls = []

    def interrupted(*args, **keywords):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return round_weight(*args, **keywords)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_vit, QuantizationConfig(bits=4), images)
    assert all(torch.equal(before[key], value) for key, value in tiny_vit.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_vit.modules())


def test_calibration_is_repeatable(tiny_vit, images):
    one, other = (convert(tiny_vit, QuantizationConfig(bits=4), images)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_report_knows_the_errors(tiny_vit, images):
    report = convert(tiny_vit, QuantizationConfig(bits=4), images)[1]
    for layer in report.quantized:
        assert layer.rounding == "gptaq"
        assert 5 < layer.weight_sqnr < 40
        assert layer.output_sqnr > layer.weight_sqnr - 6


def assert_moment(got, one, other):
    """E[one other^T] to the rounding of float32: of each of the two, and of their products' sum."""
    expected, magnitude = one.T @ other / len(one), one.abs().T @ other.abs() / len(one)
    assert ((got - expected).abs() <= sum_error(len(one) + 2, magnitude)).all()


def test_narrow_activations_count_as_rounded(tiny_vit, images, monkeypatch):
    monkeypatch.setattr("fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0)
    tiny_vit, images = tiny_vit.double(), images.double()  # no token then rounds to the other side here
    moments = {}

    def recording(weight, statistics, config, rounding, name):
        moments.setdefault(config.activation_bits, (name, statistics))
        return round_weight(weight, statistics, config, rounding, name)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", recording)
    for bits in (8, 2):
        convert(tiny_vit, QuantizationConfig(method="channel", activation_bits=bits, equalize=False), images)
    seen = []
    hook = tiny_vit.get_submodule(moments[8][0].removesuffix(".weight")).register_forward_pre_hook(
        lambda m, a: seen.append(a[0].flatten(0, -2))
    )
    with torch.no_grad():
        tiny_vit(pixel_values=images)
    hook.remove()
    for bits, x in ((8, seen[0]), (2, fake_quantize_tokens(seen[0], 2))):
        statistics = moments[bits][1]
        assert_moment(statistics.second_moment, x, x)
        assert_moment(statistics.drift, seen[0] - x, x)


def test_the_drift_is_known_only_where_it_is_made_up_for(tiny_vit, images, monkeypatch):
    known = {}

    def recording(weight, statistics, config, rounding, name):
        known[name] = (rounding, statistics.drift is not None)
        return round_weight(weight, statistics, config, rounding, name)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", recording)
    convert(tiny_vit, QuantizationConfig(overrides={"*classifier": {"rounding": "gptaq"}}, rounding="gptq"), images)
    assert set(known.values()) == {("gptq", False), ("gptaq", True)}


def test_bias_correction_knows_the_drift(tiny_vit, images, monkeypatch):
    """The classifier alone is corrected: the mean of its output is then the float model's, drift included."""
    monkeypatch.setattr("fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0)
    config = QuantizationConfig(
        bits=2, overrides={"*classifier": {"bits": 4, "bias_correction": True}}, activations=None
    )
    means = []
    for changed in (config, replace(config, overrides={"*classifier": {"bits": 4}})):
        result, _ = convert(tiny_vit, changed, images, engine="layers")  # a native block rounds to bfloat16
        with torch.no_grad():
            difference = result(pixel_values=images).logits - tiny_vit(pixel_values=images).logits
        means.append(difference.mean(0).abs().max().item())
    largest = tiny_vit(pixel_values=images).logits.abs().max().item()
    left = sum_error(len(images) + 24, largest)  # the float32 of two means: over the pictures, and over the inputs
    assert means[0] < left < 0.01 * means[1]


@pytest.mark.parametrize(  # each pair of two settings
    ("method", "activations", "bits"),
    [("tensor", "static", 8), ("tensor", None, 2), ("channel", "static", 2), ("channel", None, 8)],
)
def test_the_drift_is_that_of_the_layers_before(tiny_vit, images, monkeypatch, method, activations, bits):
    drifts = {}

    def recording(weight, statistics, config, rounding, name):
        if statistics.missing is None:
            drifts[name] = (statistics.drift.norm() / statistics.second_moment.norm()).item()
        else:
            whole = weight.to(statistics.missing.dtype) @ statistics.second_moment
            drifts[name] = (statistics.missing.norm() / whole.norm()).item()
        return round_weight(weight, statistics, config, rounding, name)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", recording)
    convert(tiny_vit.double(), QuantizationConfig(bits=bits, method=method, activations=activations), images.double())
    first = [n for n in drifts if ".0." in n and any(role in n for role in ("query", "key", "q_proj", "k_proj"))]
    eps = torch.finfo(torch.float32).eps  # equalized, but nothing before them is rounded, only to float32 at the end
    assert all(drifts.pop(name) < eps for name in first)
    drifts.pop(next(n for n in drifts if ".0." in n and ("value" in n or "v_proj" in n)))
    assert all(value < 0.05 if bits == 8 else value > 0.01 for value in drifts.values())


def test_each_layer_gets_the_statistics_of_what_it_multiplies(tiny_vit, images, monkeypatch):
    # every layer has its own input factor
    monkeypatch.setattr("fairseq.quantization.architectures.blocks.BLOCK_CLASSES", {})
    monkeypatch.setattr("fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0)
    tiny_vit, images = tiny_vit.double(), images.double()
    moments = {}

    def recording(weight, statistics, config, rounding, name):
        moments[name.removesuffix(".weight")] = statistics.second_moment
        return round_weight(weight, statistics, config, rounding, name)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", recording)
    result, _ = convert(tiny_vit, QuantizationConfig(bits=4, activations=None), images)
    names = [n for n in moments if n.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj"))][:3]
    seen = []
    hook = result.get_submodule(names[0]).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        result(pixel_values=images)
    hook.remove()
    factors = [result.get_submodule(name).input_factor for name in names]
    assert not torch.equal(factors[0], factors[1])
    for name, factor in zip(names, factors, strict=True):
        x = seen[0] * factor
        assert_moment(moments[name], x, x)


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
@pytest.mark.parametrize(("name", "said"), [("ATTENTION", "must be one of"), ("LEVEL", "does not run here")])
def test_a_wrong_environment_variable_is_said_before_the_work(monkeypatch, tiny_vit, pixels, name, said):
    monkeypatch.setenv(f"FAIRSEQ_QUANTIZATION_{name}", "none")
    monkeypatch.setattr(native, "levels", native.levels.__wrapped__)
    monkeypatch.setattr("fairseq.quantization.conversion.convert.resolve", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        convert(tiny_vit, QuantizationConfig())
    monkeypatch.setattr("fairseq.quantization.integer_only.convert.within_bytes", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        ViTQuantizer(arithmetic="integer").quantize_model(tiny_vit, calibration=pixels)


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
@pytest.mark.parametrize("execution", ["packed", "emulated"])
def test_a_level_that_does_not_run_is_said_before_any_work(monkeypatch, execution):
    monkeypatch.setenv(native.ENVIRONMENT, "sse9")
    with pytest.raises(ValueError, match="level 'sse9' does not run here"):
        convert("no model, which nobody has looked at", QuantizationConfig(execution=execution))
