"""The front door: settings, report, log, and a quantized model that saves, loads, traces and exports."""

import copy
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.modules.quantization.scalar.ops import METHODS

SETTINGS = [(8, "tensor", 1.0), (4, "tensor", 1.0), (4, "channel", 1.0), (4, "histogram", 1.0), (4, "tensor", 0.5)]


def quantize(model, bits, method, p):
    return ViTQuantizer(bits=bits, method=method, p=p).quantize_model(model)


def fresh(model):
    """A model of the same architecture with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    return other


def test_defaults_are_documented_ones():
    config = ViTQuantizer().config
    assert (config.bits, config.method, config.p, config.seed) == (8, "tensor", 1.0, 0)
    assert config.quantize_attention
    assert config.quantize_mlp
    assert config.quantize_classifier
    assert "bits=8" in repr(ViTQuantizer())


def test_positional_arguments_and_keyword_only_ones():
    config = ViTQuantizer(4, "channel", 0.5, False, True, False, seed=3, overrides={"*": {"bits": 8}}).config
    assert (config.bits, config.method, config.p) == (4, "channel", 0.5)
    assert (config.quantize_attention, config.quantize_mlp, config.quantize_classifier) == (False, True, False)
    with pytest.raises(TypeError):
        ViTQuantizer(4, "channel", 0.5, False, True, False, 3)


def test_it_says_what_it_did(tiny_vit, caplog):
    quantizer = ViTQuantizer(bits=4)
    assert quantizer.report is None
    with caplog.at_level(logging.INFO, logger="fairseq"):
        quantizer.quantize_model(tiny_vit)
    assert "Quantized 13 linear layers: 13 4-bit tensor (8 attention, 4 mlp, 1 classifier)" in caplog.text
    assert str(quantizer.report) in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_more_bits_are_closer(tiny_vit, pixels, method):
    errors = [compare_models(tiny_vit, quantize(tiny_vit, b, method, 1.0), pixels).mse_loss for b in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 1e-3 * errors[0]


def test_finer_methods_are_closer_in_weight(tiny_vit):
    def error(method):
        other = dict(quantize(tiny_vit, 4, method, 1.0).named_parameters())
        return sum(float((p - other[n]).detach().square().sum()) for n, p in tiny_vit.named_parameters())

    assert error("histogram") < error("channel") < error("tensor")


@pytest.mark.parametrize(("bits", "method", "p"), SETTINGS)
def test_state_dict_loads_into_a_freshly_quantized_model(tiny_vit, pixels, tmp_path, bits, method, p, device):
    quantized = quantize(tiny_vit.to(device), bits, method, p)
    torch.save(quantized.state_dict(), tmp_path / "vit.pt")
    other = quantize(fresh(tiny_vit), bits, method, p)
    x = pixels.to(device)
    with torch.no_grad():
        expected = quantized(pixel_values=x).logits
        assert not torch.equal(other(pixel_values=x).logits, expected)
        result = other.load_state_dict(torch.load(tmp_path / "vit.pt"))
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(other(pixel_values=x).logits, expected)


def test_copies_pickles_and_whole_model_files(tiny_vit, pixels, tmp_path):
    quantized = quantize(tiny_vit, 4, "channel", 1.0)
    torch.save(quantized, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
        for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), whole):
            assert torch.equal(other(pixel_values=pixels).logits, expected)


def test_save_pretrained_gives_a_plain_vit_with_the_rounded_weights(tiny_vit, pixels, tmp_path):
    quantized = quantize(tiny_vit, 4, "channel", 1.0)
    quantized.save_pretrained(tmp_path)
    plain = type(tiny_vit).from_pretrained(tmp_path).eval()
    assert not any("Quantized" in type(m).__name__ for m in plain.modules())
    with torch.no_grad():
        assert torch.equal(plain(pixel_values=pixels).logits, quantized(pixel_values=pixels).logits)


def test_call_signature_is_the_same(tiny_vit, pixels):
    quantized = quantize(tiny_vit, 8, "tensor", 1.0)
    output = quantized(pixels, labels=torch.arange(5), output_hidden_states=True)
    assert type(output) is type(tiny_vit(pixels))
    assert output.loss.ndim == 0
    assert len(output.hidden_states) == 3
    assert isinstance(quantized(pixels, return_dict=False), tuple)


def test_torchscript_runs_in_a_process_without_fairseq(tiny_vit, pixels, tmp_path):
    quantized = quantize(tiny_vit, 4, "tensor", 1.0)
    traced = torch.jit.trace(quantized, pixels)
    traced.save(str(tmp_path / "vit.pt"))
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = (
        "import sys, numpy as np, torch\n"
        "model = torch.jit.load('vit.pt')\n"
        "out = model(torch.from_numpy(np.load('pixels.npy')))[0]\n"
        "np.save('logits.npy', out.detach().numpy())\n"
        "assert 'fairseq' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, atol=1e-5)


@pytest.mark.parametrize(("bits", "method"), [(4, "tensor"), (8, "histogram")])
def test_onnx_gives_the_same_logits(tiny_vit, pixels, tmp_path, bits, method):
    import onnxruntime

    quantized = quantize(tiny_vit, bits, method, 1.0)
    path = tmp_path / "vit_int4_model.onnx"
    torch.onnx.export(quantized, pixels, str(path), input_names=["pixel_values"], output_names=["logits"])
    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["pixel_values"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    (got,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-3)
    assert torch.equal(torch.from_numpy(got).argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 16}, ValueError, "bits must be from 2 to 8, got 16"),
        ({"method": "foo"}, ValueError, "one of tensor, channel, histogram, got 'foo'"),
        ({"p": 1.5}, ValueError, "from 0 to 1; got 1.5"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ViTQuantizer(**settings)


def test_a_failed_call_keeps_the_last_report(tiny_vit):
    quantizer = ViTQuantizer()
    quantizer.quantize_model(tiny_vit)
    report = quantizer.report
    with pytest.raises(ValueError, match="no Linear layer"):
        quantizer.quantize_model(nn.ReLU())
    assert quantizer.report is report


def test_neighbours_in_the_batch_do_not_matter(tiny_vit, pixels):
    quantized = quantize(tiny_vit, 8, "histogram", 1.0)
    with torch.no_grad():
        together, alone = quantized(pixel_values=pixels).logits[:1], quantized(pixel_values=pixels[:1]).logits
    assert torch.allclose(together, alone, atol=1e-5)
