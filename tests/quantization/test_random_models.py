"""Whatever a family may be configured as: its layers are exact, blocks agree with them, files bring the same bits back.

RANDOM_MODELS=5000 draws that many; where there are more than 200, others each time. A failure prints the model, made
smaller.
"""

import copy
import os
import warnings
from contextlib import contextmanager

import torch
import transformers
from bounds import agrees, rounding_noise
from hypothesis import HealthCheck, assume, given, settings
from random_models import RandomModel, random_models

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.forward import output_of
from fairseq.quantization.export.openvino_ir import multiplies_exactly

EXAMPLES = int(os.environ.get("RANDOM_MODELS", 50))
ENOUGH = 64
"""Numbers in an output, to compare an error with their size; a single logit may be near 0 by chance."""


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 200,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(random_models())
def test_it_is_quantized_saved_loaded_and_exported(tmp_path_factory, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(case, tmp_path_factory.mktemp("model"))


def check(case: RandomModel, folder) -> None:
    original, pixels = case.build(), case.pictures(case.batch)
    before = copy.deepcopy(original.state_dict())
    expected = output(original, pixels)
    assume(bool(expected.isfinite().all()))  # Swin V2 may overflow float16
    quantizer = ViTQuantizer(**case.quantizer)
    calibration = case.pictures(case.calibration, seed=1) if case.calibration else None
    layers = quantizer.quantize_model(original, calibration, engine="layers")
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())

    got, wrong = output_and_wrong_layers(layers, pixels)
    assert not wrong
    assert got.shape == expected.shape
    assert bool(got.isfinite().all())

    fused = ViTQuantizer.optimize(layers, "auto")
    own = output(fused, pixels)
    assert quantizer.report.quantized
    if case.quantizer["activation_bits"] == 8:  # coarser ones flip too much to tell anything
        more = case.pictures(case.batch * -(-ENOUGH // got.numel()))
        one, other, unrounded = (output(m, more) for m in (layers, fused, ViTQuantizer.dequantize_model(layers)))
        noise = rounding_noise(2 * len(quantizer.report.quantized))
        assert energy(one - other) <= noise * energy(one) + 4 * energy(one - unrounded)

    if case.saved == "file":
        ViTQuantizer.save(fused, folder / "model.safetensors")
        loaded = ViTQuantizer.load(folder / "model.safetensors", case.build())
    else:
        fused.save_pretrained(folder / "saved")
        loaded = getattr(transformers, case.model).from_pretrained(
            folder / "saved", attn_implementation=case.attention, dtype=pixels.dtype
        )
    assert torch.equal(output(loaded, pixels), own)
    if case.export is not None:
        suffix = {"onnx": "onnx", "openvino": "xml", "torchscript": "pt", "torch_export": "pt2"}[case.export]
        with known_refusals():
            ViTQuantizer.export(fused, folder / f"exported.{suffix}", case.export, pixels)  # verified, or it raises


@contextmanager
def known_refusals():
    """torch 2.9 does not trace a Swin of one window and one head for any number of pictures; OpenVINO needs VNNI."""
    try:
        yield
    except RuntimeError as error:
        old_torch = torch.__version__.startswith("2.9.") and "Constraints violated (batch)" in str(error)
        if not old_torch and not ("saturate on this processor" in str(error) and not multiplies_exactly()):
            raise


def output(model, pixels):
    with torch.no_grad():
        return output_of(model, pixels)[1]


def output_and_wrong_layers(model, pixels):
    """The output, and the names of packed layers whose own output is not the exact one for what they were given."""
    wrong = []

    def compare(name):
        def hook(layer, given, found):
            x, y = given[0].reshape(-1, layer.in_features), found.reshape(-1, layer.out_features)
            if not agrees(y, layer, x):
                wrong.append(name)

        return hook

    hooks = [m.register_forward_hook(compare(name)) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    try:
        return output(model, pixels), wrong
    finally:
        for hook in hooks:
            hook.remove()


def energy(x):
    return float(x.double().square().sum())
