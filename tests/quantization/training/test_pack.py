"""pack: the integers and grids of a trained student, in a packed model."""

import copy
import functools

import pytest
import torch
from bounds import EXACT, flips, rms
from conftest import make_tiny_vit
from families import pictures
from transformers import AutoModelForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.training.pack import pack
from fairseq.quantization.training.student import learn_scales

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on")

SETTINGS = [
    {"bits": 4, "method": "tensor", "activations": "static"},
    {"bits": 2, "method": "channel", "group_size": 32, "symmetric": True},
    {"bits": 3, "method": "histogram", "activation_bits": 4},
    {"bits": 8, "method": "channel", "activations": None},
]


@functools.cache
def quantized(number, dtype):
    """The tiny model in the settings of that number, before it is trained."""
    quantizer = ViTQuantizer(execution="emulated", **SETTINGS[number])
    return quantizer.quantize_model(make_tiny_vit().to(dtype), calibration=pictures(4, 5))


def trained(number, learned, x, steps=2):
    """A student, a few steps from where it was quantized; in training mode, as a loop leaves it."""
    student = copy.deepcopy(quantized(number, x.dtype))
    if learned:
        learn_scales(student)
    optimizer = torch.optim.SGD(student.train().parameters(), lr=0.02)
    for _ in range(steps):
        student(pixel_values=x, labels=torch.arange(len(x))).loss.backward()
        optimizer.step()
    return student


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda number: str(SETTINGS[number]))
def test_it_is_the_student_with_its_very_integers(pixels, number, learned):
    x = pixels.double()
    student = trained(number, learned, x)
    packed = pack(student, engine="layers")
    assert any(module.training for module in student.modules())
    student.eval()
    names = [name for name, module in student.named_modules() if isinstance(module, EmulatedLinear)]
    assert len(names) == 13
    for name in names:
        one, other = student.get_submodule(name), packed.get_submodule(name)
        assert type(other) is PackedLinear
        assert torch.equal(one.integers(), other.integers()), name
        assert torch.equal(one.grid()[0], other.scale), name
        assert torch.equal(one.zero_point, other.zero_point.int()), name
        assert torch.equal(one.bias, other.bias), name
        for key in ("input_factor", "input_scale", "input_zero_point"):
            mine, its = getattr(one, key), getattr(other, key)
            assert mine is its is None or torch.equal(mine, its), (name, key)
    with torch.no_grad():
        got, expected = (model(pixel_values=x).logits for model in (packed, student))
    torch.testing.assert_close(got, expected, **EXACT)


def test_it_runs_fused_is_saved_and_loaded(tiny_vit, pixels, tmp_path):
    student = trained(0, True, pixels).eval()
    packed = pack(student)
    with torch.no_grad():
        got, expected = (model(pixel_values=pixels).logits for model in (packed, student))
    assert rms(got - expected) < flips(packed, pixels)
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).logits, got)
    floats = sum(4 * parameter.numel() for parameter in tiny_vit.parameters())
    assert packed.quantization_information == {"bytes_before": floats}


def test_layers_that_share_a_weight_still_do(tiny_vit):
    names = [n for n, m in tiny_vit.named_modules() if n.endswith((".query", ".q_proj"))]
    first, second = (tiny_vit.get_submodule(name) for name in names)
    second.weight = first.weight
    student = ViTQuantizer(bits=4, method="channel", execution="emulated").quantize_model(tiny_vit)
    learn_scales(student)
    assert student.get_submodule(names[0]).scale is student.get_submodule(names[1]).scale
    packed = pack(student, engine="layers")
    one, other = (packed.get_submodule(name) for name in names)
    assert one.weight_codes is other.weight_codes
    assert not torch.equal(one.bias, other.bias)


def test_what_is_no_student(tiny_vit):
    with pytest.raises(TypeError, match=r"the student must be a torch\.nn\.Module, got str"):
        pack("vit")
    with pytest.raises(ValueError, match="ViTForImageClassification has no emulated layer: the student is what"):
        pack(tiny_vit)
    student = ViTQuantizer(execution="emulated").quantize_model(tiny_vit)
    name, layer = next((n, m) for n, m in student.named_modules() if isinstance(m, EmulatedLinear))
    learn_scales(student)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"the weight of {name} has NaN or Inf: its training has failed"):
        pack(student)
