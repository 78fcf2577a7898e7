"""A block on a GPU, or its kernels interpreted on the CPU, beside what a block is defined to compute."""

import copy
import io
import math

import families
import pytest
import torch
from bounds import rounding_noise
from known_blocks import inputs, run

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import native_calls
from fairseq.quantization.engine import reference_block
from fairseq.quantization.engine.plan import fused_plan, unfused_class

pytest.importorskip("triton")

import triton

from fairseq.quantization.engine.cuda_block import CudaBlock

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6),
    reason=f"Triton {triton.__version__} cannot interpret with this NumPy",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def device():
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


FAMILIES = ["vit", "beit", "dinov2", "clip-vision", "siglip-vision", "timm-vit"]
"""Three projections or one, biases by position, LayerScale, and three kinds of GELU."""
NOISE = math.sqrt(rounding_noise(6))
"""What six roundings put into what a block adds, as a share of it."""


def first_call(name, device, **settings):
    """The first block of a quantized model of a family, in layers, and what it is called with."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = families.build(name)
    given = inputs(model, name, 2)
    if settings.get("activations") == "static":
        settings["calibration"] = given["pixel_values"]
    calibration = settings.pop("calibration", None)
    quantizer = ViTQuantizer(**{"bits": 8, "method": "channel", **settings})
    model = quantizer.quantize_model(model, calibration=calibration, engine="layers").to(device)
    _, block, args, kwargs, _ = run(model, **{key: value.to(device) for key, value in given.items()})[0]
    x, *others = args or (kwargs.pop("hidden_states"),)
    return block, x, tuple(others), kwargs


def error(block, x, others, kwargs):
    """What a block on a GPU is off by, as a share of what the block adds."""
    made = CudaBlock(block, fused_plan(block, type(block)))
    call = made.call(x, others, kwargs)
    with torch.no_grad():
        expected = reference_block.run(made.spec, call, x.flatten(0, 1)).view_as(x)
        got = made.run(x, call)
    assert got.dtype == x.dtype
    return float((got - expected).norm() / (expected - x).norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_what_a_block_is_defined_to_compute(name, device, monkeypatch):
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    assert error(*first_call(name, device)) < NOISE / 4  # a few numbers round to the other side


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bits": 4}, marks=pytest.mark.matrix), {"bits": 3},
        pytest.param({"activations": "static"}, marks=pytest.mark.matrix), {"activations": "static", "bits": 4},
    ],
    ids=str,
)  # fmt: skip
def test_weights_of_fewer_bits_and_fixed_ranges(settings, device, monkeypatch):
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    assert error(*first_call("vit", device, **settings)) < NOISE / 4


def test_attention_in_bfloat16(device):
    assert error(*first_call("vit", device)) < NOISE + 2 * 2.0**-8


def test_projections_of_different_bits_run_one_by_one(device, monkeypatch):
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    block, *call = first_call("vit", device)
    other, *_ = first_call("vit", device, bits=4)
    path = fused_plan(block, type(block)).roles["key"]
    block.set_submodule(path, other.get_submodule(path))
    assert error(block, *call) < NOISE / 4


def test_an_input_factor_is_not_forgotten(device, monkeypatch):
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    block, *call = first_call("vit", device)
    roles = fused_plan(block, type(block)).roles
    for role in ("output", "fc1", "fc2"):
        layer = block.get_submodule(roles[role])
        layer.input_factor = torch.linspace(0.5, 2, layer.in_features, device=device)
    assert error(block, *call) < NOISE / 4


def test_the_integers_of_projections_are_shared(device):
    block, x, *_ = first_call("vit", device)
    layers = [module for module in block.modules() if isinstance(module, PackedLinear)]
    before = [layer.integers() for layer in layers]
    made = CudaBlock(block, fused_plan(block, type(block)))
    shared = made.projections[0].weight.codes
    assert len(shared) == 3 * x.shape[-1]
    assert {layer.weight_codes.untyped_storage().data_ptr() for layer in layers[:3]} == {
        shared.untyped_storage().data_ptr()
    }
    copied = copy.deepcopy(block)
    saved = io.BytesIO()
    torch.save(block.state_dict(), saved)
    for layer, integers, name in zip(layers, before, dict(block.named_modules()), strict=False):
        assert torch.equal(layer.integers(), integers), name
    assert made.holds()
    del copied
    with torch.no_grad():
        layers[0].scale.mul_(2)  # which was copied
    assert not made.holds()


def test_what_is_not_computed_says_so(device):
    model = ViTQuantizer(bits=8, method="channel").quantize_model(families.build("swinv2"), engine="layers").to(device)
    block = next(m for m in model.modules() if not isinstance(fused_plan(m, unfused_class(type(m))), str))
    with pytest.raises(ValueError, match="its norms are post1, post2, query_norm, key_norm, not norm1 and norm2 alone"):
        CudaBlock(block, fused_plan(block, type(block)))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_on_a_gpu_runs_its_blocks_so(tiny_vit, pixels, dtype, monkeypatch):
    ran, original = [], CudaBlock.run
    monkeypatch.setattr(CudaBlock, "run", lambda self, x, call: ran.append(x.dtype) or original(self, x, call))
    quantizer = ViTQuantizer(bits=8, method="channel")
    layers = quantizer.quantize_model(tiny_vit, engine="layers").to("cuda", dtype)
    fused = ViTQuantizer.optimize(layers)
    x = pixels.to("cuda", dtype)
    with torch.no_grad():
        ran.clear()
        got, expected = fused(x).logits, layers(x).logits
    assert ran == [dtype] * 2
    assert float((got - expected).norm() / expected.norm()) < 0.1
    with torch.no_grad():
        fused(x)
        graph = torch.cuda.CUDAGraph()
        still = x.clone()
        with torch.cuda.graph(graph):
            captured = fused(still).logits
        still.copy_(x.flip(0))
        graph.replay()
        again = fused(x.flip(0)).logits  # some transformers make a mask inside a capture, with which the layers run
        assert float((captured - again).norm() / again.norm()) < 0.1
        on_cpu = fused.cpu().float()(pixels).logits
    assert float((on_cpu - expected.cpu().float()).norm() / expected.norm()) < 0.1
