"""An integer-only model as a whole: close to the float one, free of floats, in range, the same bits however it runs."""

import copy
import io
import pickle

import families
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.no_float import FloatingOperation, NoFloat
from fairseq.quantization.architectures.blocks import layer_paths
from fairseq.quantization.integer_only import layers
from fairseq.quantization.integer_only.native import reason_not_native
from fairseq.quantization.integer_only.reading import block_names

PICTURES = families.pictures(12)
KINDS = ["dynamic", "static"]


def quantize(name="vit", activations="dynamic", **settings):
    settings = {"bits": 8, "method": "channel", "rounding": "nearest", **settings}
    quantizer = ViTQuantizer(arithmetic="integer", activations=activations, **settings)
    return quantizer.quantize_model(families.build(name), calibration=PICTURES)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return quantize(activations=request.param)


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("vit", "static"), ("deit", "dynamic"), ("timm-vit", "static"),
        *(pytest.param(name, kind, marks=pytest.mark.matrix) for name, kind in (
            ("vit", "dynamic"), ("deit", "static"), ("timm-vit", "dynamic"), ("vit-msn", "dynamic"),
            ("vit-msn", "static"),
        )),
    ],
)  # fmt: skip
def test_it_is_as_close_to_the_float_model_as_the_float_carried_one(name, activations):
    original, integers = families.build(name), quantize(name, activations)
    carried = ViTQuantizer(bits=8, method="channel", rounding="nearest", activations=activations)
    expected = logits(original(PICTURES))
    errors = [
        (logits(other(PICTURES)) - expected).square().mean()
        for other in (carried.quantize_model(original, calibration=PICTURES), integers)
    ]
    assert errors[1] < 4 * errors[0] < 0.01 * expected.var()  # attention, too, is of bytes: twice the error
    output = integers(PICTURES)
    if name != "timm-vit":
        assert type(output) is type(original(PICTURES))
        assert torch.equal(output.logits, output.integer_logits / 2.0 ** integers.logit_exponent.item())
        assert all(map(torch.equal, integers(PICTURES, return_dict=False), output.to_tuple()))


@pytest.mark.parametrize("activations", KINDS)
def test_channels_and_layers_that_are_always_0(activations):
    original = families.build("vit")
    first, second = (original.get_submodule(name) for name in block_names(original))
    norm = next(module for module in first.modules() if isinstance(module, torch.nn.LayerNorm))
    dead = [norm.weight[3:4], norm.bias[3:4]]
    for block, rows in ((first, slice(5, 6)), (second, slice(None))):  # a channel, and a whole tensor
        paths = layer_paths(block)
        dead += [t[rows] for role in ("value", "fc1") for t in block.get_submodule(paths[role]).parameters()]
    with torch.no_grad():
        for values in dead:
            values.zero_()
    quantizer = ViTQuantizer(8, "channel", rounding="nearest", activations=activations, arithmetic="integer")
    integers = quantizer.quantize_model(original, calibration=PICTURES)
    expected = logits(original(PICTURES))
    assert (logits(integers(PICTURES)) - expected).square().mean() < 1e-3 * expected.var()


def test_graphs_of_the_model_as_it_is_called():
    integers = quantize(equalize=False)
    del integers.blocks[1:]
    expected = integers(PICTURES[:2])
    exported = torch.export.export(integers, (PICTURES[:2],)).module()
    assert all(map(torch.equal, exported(PICTURES[:2]), expected.to_tuple()))
    compiled = torch.compile(integers, backend="eager", fullgraph=True)(PICTURES[:2])
    assert all(map(torch.equal, compiled.to_tuple(), expected.to_tuple()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert integers(mode.from_tensor(PICTURES[:2])).integer_logits.shape == (2, 7)


def test_no_operation_is_of_floats_and_everything_stays_within_its_width(model):
    generator = torch.Generator().manual_seed(0)
    extremes = [
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.full((2, 3, 16, 16), 255, dtype=torch.uint8),
        torch.randint(0, 2, (2, 3, 16, 16), generator=generator, dtype=torch.uint8) * 255,
        torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8),
        model.round_pixels(PICTURES[:4]),
    ]
    for pixels in extremes:
        with checked(), NoFloat() as seen:
            integers = model.integer_logits(pixels)
        assert integers.dtype == torch.int32
        assert seen.count > 200
    floats = {name for name, t in model.state_dict().items() if t.is_floating_point()}
    assert floats == {"pixel_start", "pixel_step"}


@pytest.mark.parametrize(("functions", "activations"), [("ibert", "dynamic"), ("ivit", "static")])
def test_published_functions(functions, activations, tmp_path):
    integers = quantize(activations=activations, functions=functions, equalize=False)
    assert f"those of '{functions}', which the reference computes" in reason_not_native(integers)
    pixels = integers.round_pixels(PICTURES[:8])
    with checked(), NoFloat():
        got = integers.integer_logits(pixels)
    usual = quantize(activations=activations, equalize=False)
    assert not torch.equal(got, usual.integer_logits(pixels))
    expected = logits(families.build("vit")(PICTURES[:8]))
    assert (logits(integers(PICTURES[:8])) - expected).square().mean() < 0.1 * expected.var()
    ViTQuantizer.save(integers, tmp_path / "model.safetensors")
    loaded = ViTQuantizer.load(tmp_path / "model.safetensors", families.build("vit"))
    assert torch.equal(loaded.integer_logits(pixels), got)
    for format, suffix in (("onnx", "onnx"), ("c", "bin")):
        with pytest.raises(ValueError, match=f"format '{format}' has no functions='{functions}'"):
            ViTQuantizer.export(integers, tmp_path / f"model.{suffix}", format=format)


def test_functions_that_cannot_be():
    with pytest.raises(ValueError, match=r"functions must be .*'fqvit'"):
        ViTQuantizer(arithmetic="integer", functions="fqvit")
    with pytest.raises(ValueError, match="functions='ivit' needs arithmetic='integer', got 'float'"):
        ViTQuantizer(functions="ivit")
    original = families.build("vit")
    for module in list(original.modules()):
        if hasattr(module, "activation_fn"):
            module.activation_fn = torch.nn.ReLU()
        elif hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = torch.nn.ReLU()
    quantizer = ViTQuantizer(8, "channel", rounding="nearest", arithmetic="integer", functions="ibert")
    with pytest.raises(ValueError, match="its activation is relu, and functions='ibert' has none but for gelu"):
        quantizer.quantize_model(original, calibration=PICTURES[:4])


def test_one_float_operation_is_seen(model, monkeypatch):
    exact = layers.normalize
    monkeypatch.setattr(layers, "normalize", lambda h, eps: (exact(h, eps).double() * 1.0).long())
    pixels = model.round_pixels(PICTURES[:1])
    model.integer_logits(pixels)
    with NoFloat(), pytest.raises(FloatingOperation):
        model.integer_logits(pixels)


def test_a_picture_alone_is_as_in_a_batch_on_any_number_of_threads(model):
    threads = torch.get_num_threads()
    together = model(PICTURES[:7]).integer_logits
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            alone = torch.cat([model(picture[None]).integer_logits for picture in PICTURES[:7]])
            assert torch.equal(alone, together)
    finally:
        torch.set_num_threads(threads)


def test_every_device_gives_the_same_bits(model, device):
    pixels = model.round_pixels(PICTURES[:4])
    moved = copy.deepcopy(model).to(device)
    with NoFloat():
        integers = moved.integer_logits(pixels.to(device))
    assert torch.equal(integers.cpu(), model.integer_logits(pixels))
    assert torch.equal(moved(PICTURES[:4].to(device)).integer_logits, integers)


def test_pixels_themselves_are_taken_too(model):
    pixels = model.round_pixels(PICTURES[:3])
    assert torch.equal(model(pixels).integer_logits, model(PICTURES[:3]).integer_logits)


def test_copies_files_and_casts_give_the_same_bits(model):
    expected = model(PICTURES[:2]).integer_logits
    other = quantize(activations="dynamic" if model.bits == 16 else "static", rounding="gptq", equalize=False)
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), other]
    for twin in (*copies, copy.deepcopy(model).half(), copy.deepcopy(model).to(torch.bfloat16)):
        assert torch.equal(twin(PICTURES[:2]).integer_logits, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(model, bad):
    pixels = PICTURES[:2].clone()
    pixels[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        model(pixels)


def test_other_inputs_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 16, 16\), got \(1, 3, 20, 20\)"):
        model(torch.randn(1, 3, 20, 20))
    with pytest.raises(TypeError, match="int64"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="not output_attentions, head_mask"):
        model(PICTURES[:1], output_attentions=True, head_mask=torch.zeros(1))
    model(PICTURES[:1], interpolate_pos_encoding=None, output_attentions=False)


@pytest.mark.parametrize("activations", KINDS)
def test_pictures_are_needed(activations):
    quantizer = ViTQuantizer(arithmetic="integer", activations=activations)
    with pytest.raises(ValueError, match="needs calibration=pictures"):
        quantizer.quantize_model(families.build("vit"))


@pytest.mark.parametrize("method", ["tensor", "channel"])
def test_four_bits_and_overrides(method):
    model = quantize(bits=4, method=method, overrides={"*classifier": {"bits": 8}})
    assert model.blocks[0].fc1.weight.unique().numel() <= 31
    assert model.head.readouts["logits"].linear.weight.unique().numel() > 31
    expected = families.build("vit")(PICTURES).logits
    assert (model(PICTURES).logits - expected).square().mean() < 0.1 * expected.var()


def test_the_original_stays_as_it_is():
    original = families.build("vit").train()
    before = copy.deepcopy(original.state_dict())
    quantizer = ViTQuantizer(method="channel", arithmetic="integer", rounding="nearest")
    quantizer.quantize_model(original, calibration=PICTURES)
    assert original.training
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert "arithmetic='integer'" in repr(quantizer)
    assert len(quantizer.report.quantized) == 13
