"""Every family: the whole list of its layers, and that a quantized model of it works in every way."""

import copy
import io
import pickle
import re
import warnings
from collections import Counter

import families
import pytest
import torch
from bounds import EXACT, rounding_noise, sum_error
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer, compare_models, zero_shot_agreement
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding
from fairseq.modules.quantization.packed.table import PackedEmbedding, PackedParameters
from fairseq.quantization.architectures.blocks import block_plan, class_of
from fairseq.quantization.architectures.families import component_of, kept_reason, tower_of
from fairseq.quantization.architectures.forward import output_of, picture_inputs
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.architectures.observe import folds
from fairseq.quantization.architectures.plan import resolve
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.calibration.block_inputs import BlockInputs
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.rounding.equalization import equalize

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on:UserWarning", "ignore::FutureWarning")
PIXELS = families.pictures()
BLOCKS = {"attention": 8, "mlp": 4}
STAGES = {"attention": 16, "mlp": 9, "classifier": 1}  # 4 blocks, and the reduction between two stages
# Layers of the vision tower by component; two blocks each, but for Swin.
EXPECTED = {
    "vit": {**BLOCKS, "classifier": 1},
    "vit-bare": {**BLOCKS, "classifier": 1},
    "vit-masked": BLOCKS,
    "deit": {**BLOCKS, "classifier": 1},
    "deit-teacher": {**BLOCKS, "classifier": 2},
    "beit": {**BLOCKS, "classifier": 1},
    "beit-shared-bias": {**BLOCKS, "classifier": 1},
    "swin": STAGES,
    "swinv2": {**STAGES, "kept": 8},
    "dinov2": {**BLOCKS, "classifier": 1},
    "dinov2-giant": {"attention": 8, "mlp": {4, 6}},  # one layer for gate and value up to transformers 5.8
    "dinov2-registers": {**BLOCKS, "classifier": 1},
    "dinov3": BLOCKS,
    "dinov3-gated": {"attention": 8, "mlp": 6},
    "vit-mae": {"attention": 16, "mlp": 8, "classifier": 1, "kept": 1},
    "vit-mae-encoder": BLOCKS,
    "vit-msn": {**BLOCKS, "classifier": 1},
    "clip": {**BLOCKS, "classifier": 1},
    "clip-vision": BLOCKS,
    "clip-vision-projection": {**BLOCKS, "classifier": 1},
    "clip-classifier": {**BLOCKS, "classifier": 1},
    "siglip": {**BLOCKS, "classifier": 2, "kept": 1},
    "siglip-vision": {**BLOCKS, "classifier": 2, "kept": 1},
    "siglip-classifier": {**BLOCKS, "classifier": 3, "kept": 1},
    "siglip2": {**BLOCKS, "classifier": 2, "kept": 2},
    "siglip2-vision": {**BLOCKS, "classifier": 2, "kept": 2},
    "encoder-decoder": {**BLOCKS, "classifier": 1},
    "timm-vit": {"attention": 4, "mlp": 4, "classifier": 1},
    "timm-deit": {"attention": 4, "mlp": 4, "classifier": 2},
    "timm-beit": {"attention": 4, "mlp": 4, "classifier": 1},
    "timm-eva": {"attention": 4, "mlp": 4, "classifier": 1},
}
TEXT = {
    "clip": {**BLOCKS, "classifier": 1},
    "siglip": {**BLOCKS, "classifier": 1},
    "siglip2": {**BLOCKS, "classifier": 1},
    "encoder-decoder": {"attention": 16, "mlp": 4, "classifier": 2},
}
ENDS = {
    "attention": ("query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "attn.proj",
                  "attention.output.dense"),
    "mlp": ("fc1", "fc2", "intermediate.dense", "output.dense", "reduction", "weights_in", "weights_out", "gate_proj",
            "up_proj", "down_proj"),
    "classifier": ("classifier", "pooler.dense", "projection", "head", "head_dist", "decoder_pred", "head.mlp.fc1",
                   "head.mlp.fc2"),
    "kept": ("continuous_position_bias_mlp.0", "continuous_position_bias_mlp.2", "head.attention.out_proj",
             "embeddings.patch_embedding", "decoder_embed"),
}  # fmt: skip
EQUALIZED = [n for n in families.NAMES if n not in ("swinv2", "dinov2-giant", "dinov3", "dinov3-gated", "timm-beit",
                                                    "timm-eva")]  # fmt: skip

CALIBRATED = ("vit", "swinv2", "siglip2-vision", "timm-eva")
"""Of these, embeddings are calibrated each time."""
WHOLE_RUNS = {"swin", "swinv2", "vit-mae", "beit-shared-bias"}


def build(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    return families.build(name)


@pytest.fixture(scope="module")
def made():
    """name -> the float model and its 8-bit quantization, each built once; tests do not change them."""
    cache = {}

    def get(name):
        if name not in cache:
            model = build(name)
            quantizer = ViTQuantizer(bits=8, method="channel")
            cache[name] = model, quantizer.quantize_model(model, engine="layers"), quantizer.report
        return cache[name]

    return get


def output(model, pixels=PIXELS):
    with torch.no_grad():
        return output_of(model, pixels)[1]


def error(model, other, pixels=PIXELS):
    """The squared error of the output as a share of its square."""
    expected, got = output(model, pixels), output(other, pixels)
    return float((got - expected).square().sum() / expected.square().sum())


def rounded_error(quantized):
    """What the rounding of activations makes of the output: the squared error as a share of its square.

    Two models of the same integers, each as far from the float one, are at most twice as far, four times squared.
    """
    return 4 * error(quantized, ViTQuantizer.dequantize_model(quantized))


@pytest.mark.parametrize("name", families.NAMES)
def test_every_layer_is_of_its_component(name, made):
    model, *_ = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family = family_of(model)
    found = {"vision": Counter(), "text": Counter()}
    for layer in linear_layers(model):
        component = component_of(layer, family) or "kept"
        assert (component == "kept") == (kept_reason(layer, family) is not None), layer
        tower = tower_of(layer, family)
        found[tower][component] += 1
        if tower == "vision":
            assert layer.endswith(ENDS[component]), (layer, component)
    expected = dict(EXPECTED[name])
    if isinstance(expected["mlp"], set):
        assert found["vision"]["mlp"] in expected["mlp"]
        expected["mlp"] = found["vision"]["mlp"]
    assert found["vision"] == expected
    assert found["text"] == TEXT.get(name, {})


@pytest.mark.parametrize("name", families.NAMES)
def test_quantized_output_is_close_and_not_equal(name, made):
    model, quantized, report = made(name)
    assert 0 < error(model, quantized) < rounding_noise(2 * len(report.quantized))
    for layer in report.layers:
        packed = isinstance(quantized.get_submodule(layer.name), PackedLinear)
        assert packed == (layer.skipped is None)
        if not packed:  # as it was, weight and all
            before, after = (m.get_submodule(layer.name) for m in (model, quantized))
            assert type(before) is type(after)
            assert torch.equal(before.weight, after.weight)


@pytest.mark.parametrize("name", families.each())
def test_flags_and_share_choose_layers(name, made):
    model, *_ = made(name)
    family = family_of(model)
    quantizer = ViTQuantizer(method="channel", quantize_attention=False, quantize_classifier=False)
    quantizer.quantize_model(model, engine="layers")
    report = quantizer.report
    assert {layer.component for layer in report.quantized} == {"mlp"}
    names = {n for n in linear_layers(model) if component_of(n, family) == "mlp" and tower_of(n, family) == "vision"}
    assert {layer.name for layer in report.quantized} == names
    half = ViTQuantizer(method="channel", quantize_attention=False, quantize_classifier=False, p=0.5)
    half.quantize_model(model, engine="layers")
    assert len(half.report.quantized) == round(len(names) / 2)


@pytest.mark.parametrize("name", families.each())
def test_emulated_is_packed(name, made):
    model, quantized, _ = made(name)
    emulated = ViTQuantizer(bits=8, method="channel", execution="emulated").quantize_model(model)
    assert error(quantized, emulated) < rounded_error(quantized)


@pytest.mark.parametrize("name", families.each())
def test_copies_and_state_dicts_are_bit_equal(name, made):
    model, quantized, _ = made(name)
    expected = output(quantized)
    saved = io.BytesIO()
    torch.save(quantized.state_dict(), saved)
    saved.seek(0)
    assert torch.equal(output(copy.deepcopy(quantized)), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(quantized))), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    loaded = ViTQuantizer(bits=8, method="channel").quantize_model(other, engine="layers")
    assert not torch.equal(output(loaded), expected)
    loaded.load_state_dict(torch.load(saved))
    assert torch.equal(output(loaded), expected)


@pytest.mark.parametrize("name", families.each())
def test_calibration_lowers_the_error(name, made):
    model, images = made(name)[0], families.pictures(4, seed=5)
    nearest = ViTQuantizer(bits=3, method="channel", activations=None).quantize_model(model)
    quantizer = ViTQuantizer(bits=3, method="channel", activations=None)
    calibrated = quantizer.quantize_model(model, calibration=images)
    assert {layer.rounding for layer in quantizer.report.quantized} == {"coordinate"}
    assert error(model, calibrated, images) < error(model, nearest, images)


@pytest.mark.parametrize("name", families.each())
def test_traces(name, made):
    _, quantized, _ = made(name)
    if name == "encoder-decoder":  # the decoder returns a cache, which no trace can
        quantized = copy.deepcopy(quantized.encoder)
        quantized.config.return_dict = False
    pixels = picture_inputs(quantized, PIXELS)
    if name in ("clip", "siglip", "siglip2"):
        pixels = {**pixels, "input_ids": families.prompts()}
    keywords = {key: value for key, value in pixels.items() if key != "noise"}
    timm = name.startswith("timm")
    example = {"example_inputs": PIXELS} if timm else {"example_kwarg_inputs": keywords, "strict": False}
    torch.manual_seed(3)
    traced = torch.jit.trace(quantized, **example, check_trace=False)

    def outputs(model):
        torch.manual_seed(3)
        with torch.no_grad():
            found = model(PIXELS) if timm else model(**keywords)
        found = found.to_tuple() if hasattr(found, "to_tuple") else found
        return [
            x for x in (y if isinstance(y, tuple) else (y,) for y in found) for x in x if isinstance(x, torch.Tensor)
        ]

    for got, expected in zip(outputs(traced), outputs(quantized), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", families.each(EQUALIZED))
def test_equalization_changes_nothing(name):
    model = build(name).double()
    plan, changed = resolve(model, QuantizationConfig(method="tensor", towers="all")), copy.deepcopy(model)
    for name in plan.blocks(None):
        block = changed.get_submodule(name)
        known = block_plan(block, class_of(type(block)))
        if known is None:
            assert name.startswith("decoder") or re.search(r"encoder.layers.\d$", name), name  # a decoder, a Swin stage
            continue
        assert folds(block, known, plan.observed.calls.get(name))
        factors = equalize(block, known, {role: LayerConfig(bits=4, method="tensor") for role in known.layers})
        assert set(factors) >= set(known.layers) - {"fc2", "output"}
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters()))
    pixels = PIXELS.double()
    torch.testing.assert_close(output(changed, pixels), output(model, pixels), **EXACT)


@pytest.mark.parametrize("name", families.each(sorted(set(families.NAMES) - WHOLE_RUNS)))
def test_blocks_are_calibrated_one_after_the_other(name, made):
    """The others fall back to whole runs: stages hold blocks, a decoder follows, or a bias is computed anew."""
    model, *_ = made(name)
    blocks = resolve(model, QuantizationConfig(method="channel")).blocks()
    assert len(blocks) == 2
    assert len(BlockInputs(model, copy.deepcopy(model), PIXELS, blocks).stored) == 2  # batches


@pytest.mark.parametrize("name", ["vit-mae-encoder", "vit-msn", "vit-mae"])
def test_fused_blocks_agree_with_layers(name, made):
    if not native.levels():
        pytest.skip(library.NOT_BUILT)
    model, layers, _ = made(name)
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused = quantizer.quantize_model(model, engine="auto")
    assert quantizer.report.fused_blocks == (4 if name == "vit-mae" else 2)
    assert error(layers, fused) < rounded_error(layers)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.matrix) if name in ("beit", "swin") else name
     for name in ("beit", "swin", "clip", "timm-vit")],
)  # fmt: skip
def test_bits_are_assigned(name, made):
    model, *_ = made(name)
    assignment = ViTQuantizer(method="channel", rounding="nearest").assign_bits(model, PIXELS, average_bits=4.5)
    assert assignment.average_bits <= 4.5
    for errors in assignment.errors.values():
        assert [error > 0 for error in errors.values()] == [True] * 5 + [False]  # beside the widest
    ViTQuantizer(method="channel", overrides=assignment.overrides).quantize_model(model)


@pytest.mark.parametrize(
    ("name", "calibrated"),
    [
        *((name, False) for name in families.QUICK),
        *((name, True) for name in CALIBRATED),
        *(pytest.param(name, kind, marks=pytest.mark.matrix)
          for name in families.NAMES for kind in (False, True) if name not in (CALIBRATED if kind else families.QUICK)),
    ],
)  # fmt: skip
def test_embeddings(name, calibrated, made):
    model, without, plain = made(name)
    images = families.pictures(4, seed=4) if calibrated else None
    quantizer = ViTQuantizer(method="channel", quantize_embeddings=True)
    quantized = quantizer.quantize_model(model, calibration=images, engine="layers")
    listed = [layer for layer in quantizer.report.layers if layer.component == "embeddings"]
    assert listed
    assert all(layer.skipped is None and layer.bytes_after < layer.bytes_before for layer in listed)
    packed = [
        m for m in quantized.modules() if isinstance(m, PackedPatchEmbedding | PackedEmbedding | PackedParameters)
    ]
    assert len(packed) == len(listed)
    assert not any(layer.component == "embeddings" for layer in plain.layers)
    if calibrated:  # the same modules hold other integers
        assert 0 < error(model, quantized) < rounding_noise(2 * len(quantizer.report.quantized))
        return
    assert 0 < error(without, quantized) < rounding_noise(2 * len(listed)) + rounded_error(without)
    expected = output(quantized)
    assert torch.equal(output(pickle.loads(pickle.dumps(quantized))), expected)
    blank = copy.deepcopy(quantized)
    for layer in listed:  # a parameter's table is called packed_...
        owner, _, last = layer.name.rpartition(".")
        packed = getattr(blank.get_submodule(owner), f"packed_{last}", None) or blank.get_submodule(layer.name)
        getattr(packed, "linear", packed).scale.mul_(2)
    assert not torch.equal(output(blank), expected)
    blank.load_state_dict(quantized.state_dict())
    assert torch.equal(output(blank), expected)
    restored = ViTQuantizer.dequantize_model(quantized)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (restored, model)]
    assert shapes[0] == shapes[1]
    assert {type(m) for m in restored.modules()} == {type(m) for m in model.modules()}
    assert error(quantized, restored) < rounding_noise(len(quantizer.report.layers))  # of each one's input


def test_embeddings_that_cannot_be_packed(made):
    model = copy.deepcopy(made("vit")[0])
    conv = model.vit.embeddings.patch_embeddings.projection
    conv.stride, conv.padding = (3, 3), (0, 0)
    quantizer = ViTQuantizer(quantize_embeddings=True, overrides={"*position_embeddings": {"skip": True}})
    quantized = quantizer.quantize_model(model)
    reasons = {layer.name: layer.skipped for layer in quantizer.report.layers if layer.component == "embeddings"}
    assert reasons == {
        "vit.embeddings.patch_embeddings.projection": (
            "its stride (3, 3) is not its kernel size (4, 4): patches overlap"
        ),
        "vit.embeddings.position_embeddings": "skipped by an override",
    }
    assert type(quantized.vit.embeddings.patch_embeddings.projection) is nn.Conv2d
    with pytest.raises(ValueError, match="quantize_embeddings=True is a setting of execution='packed'"):
        ViTQuantizer(quantize_embeddings=True, execution="emulated")
    refused = pytest.raises(ValueError, match="no patch embedding and no position embeddings that are known")
    with refused, pytest.warns(UserWarning, match="no known family"):
        ViTQuantizer(quantize_embeddings=True).quantize_model(Unknown())


def test_embeddings_take_the_settings_of_a_layer(made):
    overrides = {"*projection": {"bits": 3, "method": "histogram", "bias_correction": True}}
    quantizer = ViTQuantizer(method="channel", quantize_embeddings=True, overrides=overrides, activations="static")
    quantized = quantizer.quantize_model(made("vit")[0], calibration=PIXELS)
    patches, positions = quantizer.report.layers[:2]
    assert (patches.bits, patches.method, patches.rounding, patches.activations) == (3, "histogram", "gptq", "dynamic")
    assert patches.note == "dynamic instead of static: patches are rounded one by one"
    assert (positions.bits, positions.method) == (8, "channel")
    layer = quantized.vit.embeddings.patch_embeddings.projection
    assert layer.linear.config.bits == 3
    conv = made("vit")[0].vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        drift = (nn.functional.conv2d(PIXELS, layer.weight, layer.bias, 4) - conv(PIXELS)).mean((0, 2, 3))
        largest = conv(PIXELS).abs().max()
    # What the correction of the bias is for: the float32 of two means, over the patches and over the inputs, is left.
    assert drift.abs().max() < sum_error(16 * len(PIXELS) + 48, largest)


def test_sizes_of_calibration_pictures(made):
    """Of the vision tower's config; families that resize their position embeddings take any."""
    large = torch.randn(4, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    for name in ("clip", "clip-classifier", "encoder-decoder", "vit"):
        with pytest.raises(ValueError, match=r"must be \(3, 16, 16\), \(C, H, W\), as the model's config says"):
            ViTQuantizer().quantize_model(made(name)[0], calibration=large)
    for name in ("dinov2", "dinov3", "siglip2-vision"):
        quantizer = ViTQuantizer(method="channel", rounding="nearest")
        quantizer.quantize_model(made(name)[0], calibration=large)
        assert quantizer.report.quantized[0].output_sqnr > 20


@pytest.mark.parametrize("name", TEXT)
def test_towers(name, made):
    model, _, _ = made(name)
    family = family_of(model)
    for towers in ("vision", "text", "all"):
        quantizer = ViTQuantizer(method="channel", towers=towers)
        quantizer.quantize_model(model)
        found = {tower_of(layer.name, family) for layer in quantizer.report.quantized}
        assert found == ({"vision", "text"} if towers == "all" else {towers})
    expected = TEXT[name]
    quantizer = ViTQuantizer(method="channel", towers="text")
    quantized = quantizer.quantize_model(model, calibration=PIXELS)
    assert Counter(layer.component for layer in quantizer.report.quantized) == expected
    assert {layer.rounding for layer in quantizer.report.quantized} == {"nearest"}
    assert {layer.note for layer in quantizer.report.quantized} == {"not calibrated: pictures do not reach it"}
    assert torch.equal(output(quantized), output(model))  # of pictures alone
    ids = families.prompts()
    inputs = {**picture_inputs(model, PIXELS[: len(ids)]), "input_ids": ids}
    if name == "encoder-decoder":
        inputs = {"pixel_values": PIXELS[: len(ids)], "decoder_input_ids": ids}
    assert 0 < compare_models(model, quantized, inputs).mse_loss < 0.1


def test_towers_that_are_not_there(made):
    with pytest.raises(ValueError, match=r"towers='text', but this model \(ViT\) has only a vision tower"):
        ViTQuantizer(towers="text").quantize_model(made("vit")[0])
    with pytest.raises(ValueError, match="towers must be one of 'vision', 'text', 'all'; got 'both'"):
        ViTQuantizer(towers="both")
    with pytest.raises(ValueError, match="k_proj: activations='static' needs images; pictures do not reach"):
        ViTQuantizer(towers="all", activations="static").quantize_model(made("clip")[0], calibration=PIXELS)
    with pytest.raises(ValueError, match="text tower, and pictures do not reach them"):
        ViTQuantizer(towers="all").assign_bits(made("clip")[0], PIXELS, average_bits=4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot(name, made):
    model, quantized, _ = made(name)
    ids, pixels = families.prompts(), families.pictures(40, seed=6)
    assert zero_shot_agreement(model, model, pixels, ids) == 1
    with torch.no_grad():
        best = [m(pixel_values=pixels, input_ids=ids).logits_per_image.argmax(-1) for m in (model, quantized)]
    share = (best[0] == best[1]).float().mean().item()
    assert zero_shot_agreement(model, quantized, pixels, {"input_ids": ids}, batch_size=7) == pytest.approx(share)
    assert compare_models(model, quantized, {"pixel_values": pixels, "input_ids": ids})[2] == pytest.approx(share)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.to_out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.up, self.down = Attention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down(self.up(x).relu())


class Unknown(nn.Module):
    """An architecture that no table knows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 16, 8)
        self.stack = nn.ModuleList([Block(), Block()])
        self.score = nn.Linear(8, 5)

    def forward(self, pixel_values):
        x = self.embed(pixel_values.flatten(2).transpose(1, 2).reshape(len(pixel_values), 16, 48))
        for block in self.stack:
            x = block(x)
        return {"logits": self.score(x.mean(1))}


def test_an_unknown_architecture_is_quantized_by_the_generic_rule():
    torch.manual_seed(0)
    model, quantizer = Unknown(), ViTQuantizer(method="channel")
    with pytest.warns(UserWarning, match=r"Unknown is of no known family.* 4 attention \(stack.0.attn.to_qkv, .*4 mlp"):
        quantized = quantizer.quantize_model(model, calibration=families.pictures(40))
    found = {layer.name: layer.component for layer in quantizer.report.quantized}
    blocks = {"attn.to_qkv": "attention", "attn.to_out": "attention", "up": "mlp", "down": "mlp"}
    expected = {f"stack.{i}.{name}": component for i in range(2) for name, component in blocks.items()}
    assert found == {**expected, "score": "classifier"}
    assert [layer.name for layer in quantizer.report.skipped] == ["embed"]
    assert 0 < error(model, quantized) < rounding_noise(2 * len(found))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.backbone, self.embed = inner, nn.Linear(3, 3)

    def forward(self, pixel_values):
        return self.backbone(pixel_values=self.embed(pixel_values.transpose(1, 3)).transpose(1, 3))


@pytest.mark.parametrize("name", ["dinov2", "clip-vision", "swinv2"])
def test_a_known_model_within_another_is_found_without_a_warning(name):
    inner = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family = family_of(outer := Wrapper(inner))
    own = family_of(inner)
    for layer in linear_layers(inner):
        assert component_of(f"backbone.{layer}", family) == component_of(layer, own)
    quantizer = ViTQuantizer(method="channel")
    quantized = quantizer.quantize_model(outer)
    assert 0 < error(outer, quantized) < rounding_noise(2 * len(quantizer.report.quantized))
