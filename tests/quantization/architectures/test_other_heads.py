"""Models that are no classifiers: which layers are quantized, and that what comes out is close and comes back."""

import re
import warnings

import other_heads
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fairseq.models.vit_quantization import ViTQuantizer, compare_models, compare_outputs
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import library
from fairseq.quantization.architectures.families import tower_of
from fairseq.quantization.architectures.plan import UNCALLED
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.architectures.separate import SeparateAttention

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
NEEDS = {"mask2former": "scipy", "open-clip": "open_clip"}
BY_RULE = ("detr", "rt-detr", "torchvision-swin")
NO_EMBEDDINGS = (*BY_RULE, "segformer", "qwen2-vl", "qwen2.5-vl")
"""That are known: overlapping patches, other convolutions, positions of another kind."""
NAMES = other_heads.NAMES
BITS = 4
QUICK = (
    "dpt", "segformer", "beit-segmentation", "yolos", "owl-vit", "torchvision-vit", "torchvision-swin", "open-clip",
    "llava", "smolvlm", "qwen2-vl", "backbone-vitdet",
)  # fmt: skip
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in NAMES]
"""A half of them each time, all with ``pytest -m matrix``."""
NATIVE = library.load() is not None


def build(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return other_heads.build(name)


def quantized(model, **settings):
    quantizer = ViTQuantizer(bits=BITS, method="channel", **settings.pop("config", {}))
    return quantizer.quantize_model(model, **settings), quantizer.report


def errors(model, other, pixels):
    """Of each output that a text does not change."""
    rows = compare_outputs(model, other, pixels)
    found = {row.output: row.relative_error for row in rows if "text" not in row.output}
    backbone = {key: error for key, error in found.items() if key in ("pixel_decoder_last_hidden_state",)}
    return backbone or found  # Mask2Former's decoder looks only where its masks are above a half


@pytest.mark.parametrize("name", NAMES)
def test_the_vision_tower_is_quantized_and_nothing_else(name):
    model = build(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, report = quantized(model)
    assert any("of no known family" in str(w.message) for w in caught) == (name in BY_RULE)
    packed = {key for key, module in result.named_modules() if isinstance(module, PackedLinear)}
    assert packed
    assert [key for key in packed if not re.search(other_heads.KINDS[name].vision, key)] == []
    left = [key for key, module in result.named_modules() if isinstance(module, nn.Linear)]
    assert name in BY_RULE or not [key for key in left if re.search(other_heads.KINDS[name].vision, key)]
    assert report.fused_blocks == (other_heads.KINDS[name].fused if NATIVE else 0)


@pytest.mark.parametrize("name", EACH)
def test_it_is_close_and_calibration_brings_it_closer(name):
    model, pixels = build(name), other_heads.pictures(name, 8)
    plain, _ = quantized(model)
    count = 64 if name in ("internvl", "smolvlm") else 12  # with 12, some pictures bring these hardly closer
    calibrated, _ = quantized(model, calibration=other_heads.pictures(name, count, seed=2))
    before, after = errors(model, plain, pixels), errors(model, calibrated, pixels)
    assert before.keys() == after.keys()
    assert 1e-3 < max(before.values()) < 0.8
    assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize("name", EACH)
def test_it_comes_back_equal(name, tmp_path):
    model, pixels = build(name), other_heads.pictures(name)
    result, _ = quantized(model)
    ViTQuantizer.save(result, tmp_path / "file.safetensors")
    loaded = ViTQuantizer.load(tmp_path / "file.safetensors", build(name))
    assert compare_models(result, loaded, pixels)[0] == 0
    if hasattr(result, "save_pretrained"):
        result.save_pretrained(tmp_path / "folder")
        loaded = type(model).from_pretrained(tmp_path / "folder")
        assert compare_models(result, loaded, pixels)[0] == 0
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in result.state_dict().items())


@pytest.mark.parametrize("name", EACH)
def test_embeddings(name, tmp_path):
    model, pixels, settings = build(name), other_heads.pictures(name), {"bits": 8, "method": "channel"}
    quantizer = ViTQuantizer(**settings, quantize_embeddings=True)
    if name in NO_EMBEDDINGS:
        with pytest.raises(ValueError, match="no patch embedding and no position embeddings that are known"):
            quantizer.quantize_model(model)
        return
    result = quantizer.quantize_model(model, engine="layers")
    listed = [layer for layer in quantizer.report.layers if layer.component == "embeddings"]
    packed = [layer for layer in listed if layer.skipped is None]
    assert packed
    assert all(layer.bytes_after < layer.bytes_before / 2 for layer in packed)
    assert [layer.skipped for layer in listed if layer.skipped] == ["it pads pictures, by (2, 2)"] * (name == "vitpose")
    without = ViTQuantizer(**settings).quantize_model(model, engine="layers")
    assert 0 < max(errors(without, result, pixels).values()) < 0.05
    ViTQuantizer.save(result, tmp_path / "file.safetensors")
    loaded = ViTQuantizer.load(tmp_path / "file.safetensors", build(name), engine="layers")
    assert compare_models(result, loaded, pixels)[0] == 0


@pytest.mark.parametrize("name", [name for name, kind in other_heads.KINDS.items() if kind.fused])
def test_fused_blocks_give_what_their_layers_do(name):
    model, pixels = build(name), other_heads.pictures(name)
    fused, report = quantized(model)
    layers, _ = quantized(model, engine="layers")
    assert report.fused_blocks or not NATIVE
    # an input in the middle between two of its integers may go either way
    assert max(errors(layers, fused, pixels).values()) < 0.05


@pytest.mark.parametrize("name", other_heads.SPEAKING)
def test_a_language_model_goes_on_speaking(name):
    model = build(name)
    given = {**other_heads.prompts(name), **_pictures_of(model, name)}
    quantizer = ViTQuantizer(bits=8, method="channel")
    result = quantizer.quantize_model(model, calibration=other_heads.pictures(name, 8, seed=2))
    family = family_of(model)
    for key, parameter in result.named_parameters():
        if tower_of(key, family) == "text":
            assert torch.equal(parameter, model.get_parameter(key))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected, got = (each.generate(**given, **settings) for each in (model, result))
    assert expected.shape == got.shape
    assert (expected == got).float().mean() > 0.8
    assert 0 < compare_models(model, result, given)[0] < 0.01


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_the_language_model_is_quantized_when_asked_for(name):
    model = build(name)
    result, _ = quantized(model, config={"towers": "text"})
    packed = {key for key, module in result.named_modules() if isinstance(module, PackedLinear)}
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert packed == {key for key in linear if "language_model" in key or key == "lm_head"}


def test_a_layer_that_is_never_called_stays_in_float():
    model = build("torchvision-swin")
    _, report = quantized(model)
    reasons = {layer.name: layer.skipped for layer in report.layers if layer.bits is None}
    assert reasons
    assert set(reasons.values()) == {UNCALLED}
    assert all(key.endswith(("attn.qkv", "attn.proj")) for key in reasons)


def _pictures_of(model, name):
    from fairseq.quantization.architectures.forward import picture_inputs

    return picture_inputs(model, other_heads.pictures(name))


@pytest.mark.parametrize("towers", ["vision", "text", "all"])
def test_open_clip_has_two_towers(towers):
    model = build("open-clip")
    result, _ = quantized(model, config={"towers": towers})
    packed = [key for key, module in result.named_modules() if isinstance(module, PackedLinear)]
    assert {key.startswith("visual.") for key in packed} == {"vision": {True}, "text": {False}, "all": {True, False}}[
        towers
    ]
    words = torch.randint(1, 100, (2, 16))
    with torch.no_grad():
        image, text, _ = result(other_heads.pictures("open-clip", 2), words)
        expected = model(other_heads.pictures("open-clip", 2), words)
    assert torch.equal(image, expected[0]) == (towers == "text")
    assert torch.equal(text, expected[1]) == (towers == "vision")


def test_a_tower_of_open_clip_by_itself():
    visual = build("open-clip").visual
    result, report = quantized(visual, calibration=other_heads.pictures("open-clip", 8))
    assert len(report.quantized) == 12
    assert 0 < compare_models(visual, result, other_heads.pictures("open-clip"))[0] < 0.1


def test_open_clip_with_a_trunk_of_timm():
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 16, "vocab_size": 120, "width": 24, "heads": 3, "layers": 2}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token",
              "timm_proj": "linear", "image_size": 224}  # fmt: skip
    model = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    result, _ = quantized(model)
    packed = [key for key, module in result.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) >= 48
    assert all(key.startswith("visual.") for key in packed)


class Hears(nn.Module):
    """LLaVA with layers for sounds."""

    def __init__(self):
        super().__init__()
        self.inner, self.audio_tower = build("llava"), nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.embed_audio = nn.Linear(4, 4)
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def get_image_features(self, pixel_values):
        return self.inner.get_image_features(pixel_values)


def test_what_hears_stays_in_float():
    _, report = quantized(Hears())
    assert not [layer.name for layer in report.quantized if "audio" in layer.name]
    assert len(report.quantized) == 14
    why = {layer.skipped for layer in report.skipped if "audio" in layer.name}
    assert why == {"not an attention, MLP or classifier layer"}  # not that pictures happen to reach none of them


def test_words_that_stand_in_for_any_calibrate_no_text_tower():
    _, report = quantized(build("owl-vit"), config={"towers": "all"}, calibration=other_heads.pictures("owl-vit", 8))
    ways = {("text_model" in layer.name, layer.rounding) for layer in report.quantized if ".encoder." in layer.name}
    assert ways == {(True, "nearest"), (False, "coordinate")}


class NotOnNoise(nn.Module):
    """Takes pictures of 8 x 8 pixels, which it does not say."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"attention": nn.Linear(192, 192), "mlp": nn.Linear(192, 192)})
        self.blocks = nn.ModuleList(
            [block, nn.ModuleDict({"attention": nn.Linear(192, 192), "mlp": nn.Linear(192, 192)})]
        )

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for block in self.blocks:
            x = block["mlp"](block["attention"](x))
        return x


def test_a_model_that_nobody_saw_running_is_said_to_be_one():
    model = NotOnNoise()
    with pytest.warns(UserWarning, match="did not run on a picture of noise, so that nobody saw"):
        result = ViTQuantizer(bits=8, method="channel").quantize_model(model)
    assert 0 < compare_models(model, result, torch.randn(2, 3, 8, 8))[0] < 0.1
    with pytest.raises(
        ValueError, match="NotOnNoise does not run on pictures alone, as calibration does: RuntimeError"
    ):
        ViTQuantizer().quantize_model(model, calibration=torch.randn(8, 3, 9, 9))


def test_torchvision_extracts_features_from_packed_layers():
    """As the guide says it (troubleshooting)."""
    model, pixels = build("torchvision-vit"), other_heads.pictures("torchvision-vit", 3)
    result, _ = quantized(model, engine="layers")
    leaves = [PackedLinear, SeparateAttention]
    nodes = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1.mlp", "heads"]
    extractor = create_feature_extractor(result, nodes, tracer_kwargs={"leaf_modules": leaves})
    seen = {}
    for name in nodes:
        result.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        features, logits = extractor(pixels), result(pixels)
    assert torch.equal(features["heads"], logits)
    for name in nodes:
        assert torch.equal(features[name], seen[name]), name
    optimized = ViTQuantizer.optimize(result) if NATIVE else result
    with torch.no_grad():
        features = create_feature_extractor(optimized, nodes, tracer_kwargs={"leaf_modules": leaves})(pixels)
    assert torch.equal(features["heads"], logits)  # a traced block runs layer by layer
