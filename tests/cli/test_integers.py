"""Integer-only models on the command line: made, run, looked into."""

import io
import json
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from transformers import ViTForImageClassification
from transformers.utils import logging

from fairseq.cli.main import main
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.integer_only import layers
from fairseq.quantization.integer_only.model import IntegerViT

SETTINGS = ["--arithmetic", "integer", "--method", "channel", "--rounding", "nearest"]


@pytest.fixture(scope="module")
def folder(models, pictures, tmp_path_factory):
    """A folder that quantize wrote; not to be written to."""
    out = tmp_path_factory.mktemp("integers") / "out"
    words = ["quantize", models / "short", *SETTINGS, "--calibration", pictures, "-o", out]
    verbosity = logging.get_verbosity()
    with redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in words]) == 0
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    assert "7 linear layers: 7 8-bit channel" in printed.getvalue()
    return out


def test_it_is_a_model_like_others(cli, models, pictures, folder, tmp_path):
    loaded = ViTForImageClassification.from_pretrained(folder)
    assert isinstance(loaded, IntegerViT)
    result = cli("compare", models / "short", folder, "--images", pictures, "--at-least", "0.7", "--json")
    assert result.code == 0, result.err
    assert 0 < json.loads(result.out)["mse_loss"] < 0.01
    result = cli("evaluate", folder, "--images", pictures, "--labels", pictures.parent / "labels.csv")
    assert result.code == 0, result.err
    result = cli("benchmark", folder, "--reference", models / "short", "--batch", "1", "--rounds", "1")
    assert result.code == 0, result.err
    again = shutil.copytree(folder, tmp_path / "again")
    assert cli("quantize", models / "short", *SETTINGS, "--calibration", pictures, "-o", again).code == 0


def test_inspect_says_what_it_is(cli, folder):
    found = json.loads(cli("inspect", folder, "--verify", "--json").out)
    assert (found["arithmetic"], found["format_version"], len(found["layers"])) == ("integer", 2, 8)
    assert found["layers"]["integer.head.readouts.logits.linear"]["weights"] == 7 * 24
    assert "integers alone" in cli("inspect", folder).out


def test_inspect_runs_it_and_no_float_is_seen(cli, folder):
    for path in (folder, folder / "model.safetensors"):
        result = cli("inspect", path, "--integer")
        assert result.code == 0, result.err
        assert "on 2 pictures of noise, none with a floating number" in result.out
        assert "integer, dynamic" in result.out
    found = json.loads(cli("inspect", folder, "--integer", "--json").out)
    assert found["operations"] > 250
    assert found["layers"] == 8
    assert found["widths"]["LayerNorm, input"][0] == 22
    assert all(2 <= used <= bits for bits, used in found["widths"].values())
    model = ViTForImageClassification.from_pretrained(folder)
    assert found["weights"] == sum(m.weight.numel() for m in model.modules() if isinstance(m, layers.IntegerLinear))


def test_inspect_fails_on_a_float_and_on_an_integer_past_its_width(cli, folder, monkeypatch):
    exact = layers.normalize
    with monkeypatch.context() as patch:
        patch.setattr(layers, "normalize", lambda h, eps: (exact(h, eps) * 1.0).to(torch.int64))
        result = cli("inspect", folder, "--integer", "--quiet")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "works with 1.0, where only integers may be" in result.err
    with monkeypatch.context() as patch:
        patch.setattr(layers, "normalize", lambda h, eps: exact(h << 9, eps))
        result = cli("inspect", folder, "--integer", "--quiet")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "LayerNorm, input" in result.err


def test_inspect_of_another_model_is_1(cli, models, tmp_path, tiny_vit):
    ViTQuantizer.save(ViTQuantizer().quantize_model(tiny_vit), tmp_path / "packed.safetensors")
    others = ("vit", "packed", "vit/model.safetensors", tmp_path / "packed.safetensors")
    for path in others:
        result = cli("inspect", models / path, "--integer", "--quiet")
        assert (result.code, result.out) == (1, "")
        assert "is no integer-only model; quantize makes one with --arithmetic integer" in result.err


def test_exports(cli, folder, tmp_path, verified_here):
    result = cli("export", folder, tmp_path / "vit.onnx", "--pixels", "float32", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["max_difference"] == 0
    result = cli("export", folder, tmp_path / "vit.bin")
    assert result.code == 0, result.err
    assert (tmp_path / "vit.h").is_file()
    assert "not run; two pictures and their logits are in it" in result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arithmetic", "integer"], "needs calibration=pictures"),
        (["--arithmetic", "both"], "arithmetic must be one of 'float', 'integer'"),
        (["--arithmetic", "integer", "--embeddings"], "needs quantize_embeddings=False"),
    ],
)
def test_what_quantize_refuses(cli, models, tmp_path, options, said):
    result = cli("quantize", models / "vit", *options, "-o", tmp_path / "x", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert not list(tmp_path.iterdir())


def test_widths_layer_by_layer_are_those_of_the_float_carried_model(cli, models, pictures, tmp_path):
    options = [*SETTINGS, "--average-bits", "6", "--calibration", pictures]
    result = cli("quantize", models / "short", *options, "-o", tmp_path / "x", "--json")
    assert result.code == 0, result.err
    assert len({layer["bits"] for layer in json.loads(result.out)["layers"]}) > 1
