"""The native kernels give the integers of the reference: at every level, for any batch and number of threads."""

import copy
import gc
import weakref

import families
import pytest
import torch
from conftest import vit_config
from transformers import ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.packed.kernels import library, native, native_calls
from fairseq.quantization.integer_only.layers import Spread
from fairseq.quantization.integer_only.native import native_outputs, reason_not_native
from fairseq.quantization.integer_only.native_model import NativeViT, NotNative, _alone

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)

PICTURES = families.pictures(8)
SHAPES = {  # width, heads, hidden, pixels, patch: heads of 8, 20 and 64 channels; 17 to 65 tokens
    "small": (32, 4, 40, 16, 4, "gelu"),  # heads end where a panel ends, and begin within a vector
    "odd": (40, 2, 100, 20, 5, "quick_gelu"),
    "long": (64, 1, 70, 32, 4, "gelu_pytorch_tanh"),
}


def build(shape, activations="dynamic", bits=8, layers=2):
    width, heads, hidden, pixels, patch, act = SHAPES[shape]
    config = vit_config(
        hidden_size=width, num_attention_heads=heads, intermediate_size=hidden, image_size=pixels, patch_size=patch,
        num_hidden_layers=layers, hidden_act=act,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(8, 3, pixels, pixels, generator=generator)
    quantizer = ViTQuantizer(
        bits=bits, method="channel", arithmetic="integer", activations=activations, rounding="nearest"
    )
    return quantizer.quantize_model(model, calibration=pictures)


def extremes(model):
    """Pictures of noise, of zeros, of 255, and of one dot."""
    size = (1, 3, *model.size)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 256, (4, *size[1:]), generator=generator, dtype=torch.uint8)
    dot = torch.zeros(size, dtype=torch.uint8)
    dot[..., 3, 3] = 255
    return torch.cat([noise, torch.zeros(size, dtype=torch.uint8), torch.full(size, 255, dtype=torch.uint8), dot])


def native_logits(model, pixels):
    """From the kernels alone; None where they do not run."""
    found = native_outputs(model, pixels)
    return None if found is None else found[model.main]


def readout(model):
    return model.head.readouts["logits"]


def reference(model, pixels):
    with checked():  # every intermediate is held to its width, too
        return model.integer_logits(pixels)


@pytest.fixture(scope="module", params=[(s, a) for s in SHAPES for a in ("dynamic", "static")], ids="-".join)
def case(request):
    model = build(*request.param)
    pixels = extremes(model)
    return model, pixels, reference(model, pixels)


@pytest.mark.parametrize("level", native.levels())
def test_every_level_gives_the_integers_of_the_reference(case, level, monkeypatch):
    model, pixels, expected = case
    monkeypatch.setenv(native.ENVIRONMENT, level)
    assert reason_not_native(model) is None
    got = native_logits(model, pixels)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_threads_change_nothing(case, threads):
    model, pixels, expected = case
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 7):
            assert torch.equal(torch.cat([native_logits(model, p) for p in pixels.split(batch)]), expected)
        assert torch.equal(native_logits(model, pixels.repeat(9, 1, 1, 1)), expected.repeat(9, 1))
        assert native_logits(model, pixels[:0]).shape == (0, expected.shape[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", native.levels())
def test_weights_of_4_bits_and_a_model_of_timm(level, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, level)
    for model, small in ((build("odd", bits=4), 1), (build("odd", bits=5), 0), (quantize_timm(), 0)):
        pixels = extremes(model)
        assert torch.equal(native_logits(model, pixels), reference(model, pixels))
        block = NativeViT(model).model.blocks[0].contents
        assert [layer.small for layer in (block.query, block.output, block.fc1, block.fc2)] == [small] * 4


def quantize_timm():
    quantizer = ViTQuantizer(bits=8, method="channel", arithmetic="integer", rounding="nearest")
    return quantizer.quantize_model(families.build("timm-vit"), calibration=PICTURES)


@pytest.mark.parametrize("level", native.levels())
def test_pixels_are_rounded_as_the_reference_rounds(level, monkeypatch):
    model = build("small")
    monkeypatch.setenv(native.ENVIRONMENT, level)
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(3, 3, 16, 16, generator=generator)
    start, step = (t[:, None, None] for t in (model.pixel_start, model.pixel_step))
    x[0] = (start + step * (torch.arange(256).reshape(16, 16) + 0.5)).float()  # near the middle between two
    x[1, :, 0, :4] = torch.tensor([-3e38, 3e38, -0.0, 1e-40])
    expected = ((x.double() - start) / step).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(
        native_calls.round_pixels(x, model.pixel_start, model.pixel_step, native.level_number()), expected
    )
    assert torch.equal(model.round_pixels(x), expected)
    assert torch.equal(model.round_pixels(x.transpose(2, 3)), expected.transpose(2, 3))
    x[2, 2, 15, 15] = float("nan")
    assert native_calls.round_pixels(x, model.pixel_start, model.pixel_step, native.level_number()) is None


def test_ties_of_pixels_go_to_the_even_one():
    x = torch.tensor([0.5, 1.5, 2.5, 254.5, 255.5, -0.5]).reshape(1, 1, 1, 6)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    for level in range(len(native.levels())):
        number = native.level_number(native.levels()[level])
        assert native_calls.round_pixels(x, zero, one, number).flatten().tolist() == [0, 2, 2, 254, 255, 0]


def test_a_changed_model_is_read_again():
    model = build("small")
    pixels = extremes(model)
    before = native_logits(model, pixels)
    readout(model).linear.weight.neg_()
    after = native_logits(model, pixels)
    assert torch.equal(after, reference(model, pixels))
    assert not torch.equal(after, before)
    model.blocks[0].fc1 = copy.deepcopy(model.blocks[1].fc1)
    assert torch.equal(native_logits(model, pixels), reference(model, pixels))
    model.blocks = model.blocks[:1]
    assert torch.equal(native_logits(model, pixels), reference(model, pixels))


def test_the_environment_chooses_the_reference(monkeypatch):
    model = build("small")
    pixels = extremes(model)[:1]
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BACKEND", "reference")
    assert native_logits(model, pixels) is None
    assert "FAIRSEQ_QUANTIZATION_BACKEND" in reason_not_native(model)
    expected = model.integer_logits(pixels)
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BACKEND", "native")
    assert torch.equal(native_logits(model, pixels), expected)


def test_what_changes_without_a_buffer_is_seen():
    model = build("small")
    pixels = extremes(model)
    native_logits(model, pixels)
    model.blocks[0].fc2.output.bits = 12
    assert torch.equal(native_logits(model, pixels), reference(model, pixels))
    model.blocks[0].fc2.weight.neg_()
    assert reason_not_native(model) == "the sums of block 0, fc2 are not those of its weight"

    class Own(type(model)):
        def embed(self, pixels):
            return super().embed(pixels) + 1

    own = build("small")
    own.__class__ = Own
    assert torch.equal(own.integer_logits(pixels), reference(own, pixels))


def test_columns_that_are_constant_stay_native():
    model = build("small")
    pixels = extremes(model)
    for layer in (model.blocks[0].query, model.blocks[1].fc1, readout(model).linear):
        layer.weight[3] = 0
        layer.output.shift[3], layer.output.offset[3] = 61, 2**59
    model.blocks[1].norm2.output.multiplier[5] = 0
    assert reason_not_native(model) is None
    assert torch.equal(native_logits(model, pixels), reference(model, pixels))


@pytest.mark.parametrize("level", native.levels())
def test_activations_beyond_their_table_and_in_64_bits(level, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_LEVEL", level)
    model = build("odd")
    pixels = extremes(model)
    first, second = (block.activation for block in model.blocks)
    model.blocks[0].fc1.output.shift -= 9
    first.output.offset.zero_()  # so that some of what has no sign is below 0
    inputs = []
    handle = model.blocks[0].fc1.register_forward_hook(lambda module, args, output: inputs.append(output))
    reference(model, pixels)
    handle.remove()
    assert inputs[0].max() >= 2**15  # beyond the table, on both sides
    assert inputs[0].min() < -(2**15)
    second.entries[0, 0] = 1  # which must be 0, and is taken for what lies before the table
    kernels = NativeViT(model)
    assert [bool(kernels.model.blocks[i].contents.activation32.multiplier) for i in range(2)] == [True, False]
    assert torch.equal(kernels(pixels)["logits"], reference(model, pixels))
    first.entries[1, 255] = 2**14  # the last line leaves 16 bits
    kernels = NativeViT(model)
    assert not kernels.model.blocks[0].contents.activation32.multiplier
    assert torch.equal(kernels(pixels)["logits"], reference(model, pixels))


@pytest.mark.parametrize("level", native.levels())
def test_columns_that_become_several_bytes(level, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_LEVEL", level)
    config = vit_config(
        hidden_size=256, num_attention_heads=4, intermediate_size=96, image_size=16, num_hidden_layers=1
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.weight.data[70] = 12.0
    quantizer = ViTQuantizer(
        8, "channel", arithmetic="integer", activations="static", rounding="nearest", equalize=False
    )
    integers = quantizer.quantize_model(model, calibration=PICTURES)
    spread = integers.blocks[0].norm1.output[1]
    copies = spread.columns.unique_consecutive(return_counts=True)[1]
    assert copies[70] > 1
    numbers = list(zip(spread.columns.tolist(), (copies[spread.columns.long()] == 1).tolist()))
    for i, count in enumerate(_alone(spread).tolist()):
        run = [(numbers[i][0] + j, True) for j in range(count + 1)]
        assert numbers[i : i + count] == run[:count]
        assert numbers[i : i + count + 1] != run
    pixels = extremes(integers)
    assert torch.equal(native_logits(integers, pixels), reference(integers, pixels))


def test_blocks_of_different_sizes_run_on_the_reference():
    model, other = build("small"), build("odd")
    pixels = extremes(model)
    model.blocks[1].fc1.weight = model.blocks[1].fc1.weight[:20].clone()
    assert reason_not_native(model) == "its blocks have different numbers of heads or sizes of layers"
    model.blocks[1] = other.blocks[1]
    with pytest.raises(RuntimeError):
        model.integer_logits(pixels)


@pytest.mark.parametrize("context", ["meta", "functionalize", "inference", "default dtype"])
def test_contexts_give_the_same_integers(case, context):
    model, pixels, expected = case
    if context == "meta":
        with torch.device("meta"):
            assert torch.equal(model.integer_logits(pixels), expected)
            assert model.round_pixels(pixels.float()).device.type == "cpu"
    elif context == "functionalize":
        assert torch.equal(torch.func.functionalize(model.integer_logits)(pixels[:1]), expected[:1])
    elif context == "inference":
        with torch.inference_mode():
            assert torch.equal(copy.deepcopy(model).integer_logits(pixels[:2]), expected[:2])
    else:
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(copy.deepcopy(model).integer_logits(pixels), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_hooks_see_what_they_would_see():
    model, seen = build("small"), []
    pixels = extremes(model)[:1]
    model.integer_logits(pixels)
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert native_logits(model, pixels) is None
    model.integer_logits(pixels)
    handle.remove()
    assert len(seen) == 1
    model.register_forward_hook(lambda module, args, output: seen.append(output))  # of the whole: it sees its output
    assert native_logits(model, pixels) is not None


@pytest.mark.parametrize("level", native.levels())
def test_rows_at_the_ends_of_16_bits(level, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_LEVEL", level)
    model = build("odd")
    for block in model.blocks:
        for part in (block.query, block.key, block.value):
            part.output.shift -= 3  # most of them saturate, at -2**15, too
        block.norm1.output.shift -= 3
    pixels = extremes(model)
    assert torch.equal(native_logits(model, pixels), reference(model, pixels))


def test_what_the_kernels_would_read_otherwise_runs_on_the_reference():
    model = build("small")
    output = model.blocks[0].norm1.output
    model.blocks[0].norm1.output = torch.nn.Sequential(output, Spread(torch.ones(32, dtype=torch.int64), 0))
    assert reason_not_native(model) == "columns become several bytes, and activations are dynamic"
    model = build("small")
    attention = model.blocks[0].attention
    attention.multiplier = attention.multiplier.expand(-1, 17, 1).clone()
    assert "more than one scale for each" in reason_not_native(model)


def test_what_does_not_fit_runs_on_the_reference():
    model = build("small")
    pixels = extremes(model)[:2]
    model.blocks[0].fc1.output.shift -= 20  # sums a million times as large
    expected = reference(model, pixels)
    assert native_logits(model, pixels) is None
    assert torch.equal(model.integer_logits(pixels), expected)
    assert reason_not_native(model) == "the constants of block 0, fc1 leave no room in products of 64 bits"

    class Own(type(readout(model).norm)):
        pass

    model = build("small")
    readout(model).norm.__class__ = Own
    assert reason_not_native(model) == "a part is a Own"
    with pytest.raises(NotNative):
        NativeViT(model)


def test_a_model_that_is_gone_leaves_nothing():
    model = build("small", layers=1)
    native_logits(model, extremes(model)[:1])
    assert isinstance(model.prepared.native, NativeViT)
    assert copy.deepcopy(model).prepared is None
    gone = weakref.ref(model.prepared)
    del model
    gc.collect()
    assert gone() is None
