"""Families beside ViT: close to the float model, the same bits however they run, and no float on the way."""

import copy
import functools
import pickle

import families
import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.no_float import FloatingOperation, NoFloat
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.quantization.integer_only import head as heads
from fairseq.quantization.integer_only.head import pool
from fairseq.quantization.integer_only.native import native_outputs, reason_not_native

PICTURES = families.pictures(40)
OUTPUTS = {
    "deit-teacher": ("logits", "cls_logits", "distillation_logits"),
    "timm-deit": ("logits",),
    "dinov2": ("logits",),
    "dinov2-registers": ("logits",),
    "dinov2 tower": ("last_hidden_state", "pooler_output"),
    "vit tower": ("last_hidden_state",),  # without a pooler
    "beit": ("logits",),  # its relative positions are all 0
    "clip-vision": ("last_hidden_state", "pooler_output"),
    "clip-vision-projection": ("image_embeds", "last_hidden_state"),
    "clip-classifier": ("logits",),
    "siglip-classifier": ("logits",),
    "siglip-vision": ("last_hidden_state", "pooler_output"),
}
CASES = [
    pytest.param(name, kind, marks=[] if place % 2 == turn else pytest.mark.matrix)
    for place, name in enumerate(OUTPUTS)
    for turn, kind in enumerate(("dynamic", "static"))
]
"""A kind of activations for each, in turns; both with ``pytest -m matrix``."""


def build(name):
    model = families.build(name.removesuffix(" tower"))
    return model.get_submodule(model.base_model_prefix) if name.endswith(" tower") else model


@functools.cache
def quantized(name, activations):
    """It is not to be changed."""
    quantizer = ViTQuantizer(
        bits=8, method="channel", rounding="nearest", arithmetic="integer", activations=activations
    )
    return quantizer.quantize_model(build(name), calibration=PICTURES)


def named(model, output):
    return {"logits": output} if isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_outputs_are_those_of_the_float_model_and_exactly_their_integers(name, activations):
    original, model = build(name), quantized(name, activations)
    with torch.no_grad():
        expected = original(PICTURES)
    output = model(PICTURES)
    assert type(output) is type(expected)
    integers, exponents = model.integer_outputs(model.round_pixels(PICTURES)), model.head.exponents()
    assert tuple(integers) == OUTPUTS[name]
    for key, wanted in named(model, expected).items():
        got = named(model, output)[key]
        assert ((got - wanted).square().mean() / wanted.var()).sqrt() < 0.04
        assert torch.equal(got.double(), integers[key].double() / 2.0 ** exponents[key].item())
        if isinstance(output, dict):
            assert torch.equal(output[f"integer_{key}"], integers[key])
    assert model.main == ("pooler_output" if "pooler_output" in OUTPUTS[name] else OUTPUTS[name][0])


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_kernels_give_the_integers_of_the_reference_which_has_no_float(name, activations):
    model = quantized(name, activations)
    ends = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    ends[1] = 255
    noise = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = torch.cat((ends, noise, model.round_pixels(PICTURES[:3])))
    with checked(), NoFloat():
        expected = model.integer_outputs(pixels)
    alone = [model.integer_outputs(picture[None]) for picture in pixels]
    assert all(torch.equal(torch.cat([one[key] for one in alone]), value) for key, value in expected.items())
    twin = pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, twin.integer_outputs(pixels).values(), expected.values()))
    if native.levels():
        assert reason_not_native(model) is None


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
@pytest.mark.parametrize("level", native.levels())
def test_every_level_has_the_same_norms(level, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, level)
    for name in ("dinov2", "clip-vision", "siglip-vision"):
        model = quantized(name, "dynamic")
        pixels = model.round_pixels(PICTURES[:5])
        with checked():
            expected = model.integer_outputs(pixels)
        got = native_outputs(model, pixels)
        assert list(got) == list(expected)
        assert all(map(torch.equal, got.values(), expected.values()))


def test_a_head_that_reads_columns_as_several_bytes():
    torch.manual_seed(0)
    config = DeiTConfig(**{**families.VIT, "hidden_size": 128, "num_attention_heads": 4})
    original = DeiTForImageClassificationWithTeacher(config).eval()
    with torch.no_grad():
        original.deit.layernorm.weight[3] = 6
    quantizer = ViTQuantizer(
        8, "channel", rounding="nearest", arithmetic="integer", activations="static", equalize=False
    )
    model = quantizer.quantize_model(original, calibration=PICTURES)
    assert isinstance(model.head.readouts["cls_logits"].norm.output, torch.nn.Sequential)
    pixels = model.round_pixels(PICTURES)
    with checked():
        expected = model.integer_outputs(pixels)
    if native.levels():
        assert reason_not_native(model) is None
    assert all(map(torch.equal, model.integer_outputs(pixels).values(), expected.values()))


def test_a_norm_of_another_width_does_not_reach_the_kernels():
    model = copy.deepcopy(quantized("dinov2", "dynamic"))
    output = model.head.readouts["logits"].norm.output
    output.multiplier, output.shift, output.offset = output.multiplier[:1], output.shift[:1], output.offset[:1]
    if native.levels():
        assert reason_not_native(model) == "its blocks have different numbers of heads or sizes of layers"
    assert model.integer_logits(model.round_pixels(PICTURES[:2])).shape == (2, 7)


def test_the_mean_of_two_heads_is_exact():
    output = quantized("deit-teacher", "dynamic")(PICTURES)
    assert torch.equal(output.integer_logits, output.integer_cls_logits + output.integer_distillation_logits)
    assert torch.equal(output.logits.double(), (output.cls_logits.double() + output.distillation_logits) / 2)


def test_means_are_rounded_half_up():
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**23), 2**23, (2, 7, 40), generator=draw)
    x[0, :, 0], x[0, :, 1] = 2**23 - 1, -(2**23)
    x[0, 5:, 2], x[0, 5:, 3] = torch.tensor([1, 2]), torch.tensor([-1, -2])
    got = pool(x, ((0, 1), (2, 7), (5, 7)))
    assert torch.equal(got[:, :40], x[:, 0])
    halves = [[(2 * sum(column) + 5) // 10 for column in picture] for picture in x[:, 2:].transpose(1, 2).tolist()]
    assert torch.equal(got[:, 40:80], torch.tensor(halves))
    assert got[0, 82:84].tolist() == [2, -1]  # 1.5 and -1.5


def test_a_float_in_a_head_is_seen(monkeypatch):
    model = quantized("dinov2", "dynamic")
    exact = heads.mean
    monkeypatch.setattr(heads, "mean", lambda x, start, stop: exact(x.double(), start, stop).long())
    pixels = model.round_pixels(PICTURES[:1])
    with NoFloat(), pytest.raises(FloatingOperation, match="float64"):
        model.integer_outputs(pixels)


@pytest.mark.parametrize("name", ["siglip-vision", "siglip-classifier", "clip-vision-projection", "dinov2 tower"])
def test_folders_give_the_class_that_they_are_of(name, tmp_path):
    model, original = quantized(name, "static"), build(name)
    model.save_pretrained(tmp_path)
    loaded, info = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, type(original))
    expected = model(PICTURES)
    assert all(torch.equal(value, expected[key]) for key, value in loaded(PICTURES).items())


def test_relative_positions_are_refused():
    model = families.build("beit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()
    with pytest.raises(ValueError, match=r"in beit\S*\.0 attention is of windows, or has relative"):
        ViTQuantizer(arithmetic="integer").quantize_model(model, calibration=PICTURES)
