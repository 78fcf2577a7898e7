"""The integers are the same whatever is on around the call: autocast, modes, default dtype and device, precision."""

import contextlib

import pytest
import torch
from families import build, pictures, shortened

from fairseq.models.vit_quantization import ViTQuantizer

SETTINGS = {  # and whether with pictures
    "data-free": ({"bits": 4}, False),
    "calibrated": ({"bits": 4, "method": "channel", "quantize_embeddings": True}, True),
    "static": ({"bits": 8, "method": "channel", "activations": "static"}, True),
    "emulated": ({"bits": 3, "method": "histogram", "execution": "emulated"}, True),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def precision(name):
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "medium": lambda: precision("medium"),
}


def state_of(model):
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "integers"):
            found[name] = [layer.integers(), layer.scale, layer.zero_point, getattr(layer, "bias", None)]
    return found


def quantize(settings, calibrated):
    """Of two blocks if the second is rounded by what the first one gives, else of one."""
    images = pictures(4, seed=5) if calibrated else None
    model = build("vit") if settings.get("quantize_embeddings") else shortened(build("vit"))
    return lambda: ViTQuantizer(**settings).quantize_model(model, calibration=images)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_integers_in_every_state(settings, pixels):
    run = quantize(*SETTINGS[settings])
    model = run()
    right = state_of(model)
    with torch.no_grad():
        logits = model(pixels).logits
    for name, state in STATES.items():
        with state():
            other = run()
        got = state_of(other)
        assert got.keys() == right.keys()
        for layer, tensors in got.items():
            for mine, its in zip(tensors, right[layer], strict=True):
                same = mine is its if its is None else torch.equal(mine, its) and mine.dtype == its.dtype
                assert same, (name, layer)
                assert its is None or not mine.is_inference(), (name, layer)
        with torch.no_grad():
            assert torch.equal(other(pixels).logits, logits), name


def test_a_model_and_pictures_that_were_made_in_inference_mode(pixels):
    plain = quantize(*SETTINGS["calibrated"])()
    with torch.inference_mode():
        run = quantize(*SETTINGS["calibrated"])
        quantized = run()
    for name, tensors in state_of(quantized).items():
        assert torch.equal(tensors[0], state_of(plain)[name][0])
    quantized.half().float()  # inference tensors would refuse that
    with torch.no_grad():
        torch.testing.assert_close(quantized(pixels).logits, plain(pixels).logits, atol=0.05, rtol=0)


def test_bits_are_assigned_the_same():
    images, model = pictures(4, seed=5), shortened(build("vit"))
    right = ViTQuantizer(method="channel").assign_bits(model, images, average_bits=4.5)
    for name in ("autocast", "inference_mode", "bfloat16", "medium"):
        with STATES[name]():
            got = ViTQuantizer(method="channel").assign_bits(model, images, average_bits=4.5)
        assert got.bits == right.bits, name
        assert got.errors == right.errors, name
