"""``fairseq-vit report``, against the library's own figures."""

import json
import re

import other_heads
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from fairseq.cli.loading import load
from fairseq.cli.pictures import batches, pictures_in
from fairseq.models.vit_quantization import compare_models
from fairseq.quantization.evaluation.alone import errors_alone


@pytest.fixture
def three_bits(cli, models, tmp_path):
    words = ["quantize", models / "vit", "-o", tmp_path / "three", "--bits", 2, "--quiet"]
    assert cli(*words, "--exclude", "*classifier").code == 0
    return tmp_path / "three"


def test_a_page_of_a_classifier(cli, models, pictures, three_bits, tmp_path):
    words = ["report", models / "vit", three_bits, "--images", pictures, "--limit", 20, "--batch-size", 20]
    words += ["--also", models / "packed", "--rounds", 1, "-o", tmp_path / "page.html"]
    found = json.loads(cli(*words, "--json").out)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    original, quantized = load(str(models / "vit")), load(str(three_bits))
    pixels = next(batches(pictures_in(pictures), original.processor, 20))
    match = compare_models(original.model, quantized.model, pixels).top_k_match
    assert found["pictures"] == 20
    assert found["changed"] == round(20 * (1 - match)) > 0
    assert f"It keeps {match:.1%} of the classes of 20 pictures" in page
    assert f"{found['changed']} of 20" in page
    assert page.count('<div class="change">') == found["changed"]
    assert found["alone"] == pytest.approx(errors_alone(original.model, quantized.model, pixels[:16]))
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    layers = re.findall(r'<td data-key="([^"]+)">\1</td>', page)
    assert "classifier" in layers
    assert "1: left in float when it was quantized" in page
    assert {"vit", "three", "packed"} <= set(re.findall(r"<tr><td>(\w+)</td><td class=\"n\">[\d.]+ MB", page))
    assert page.count("<figure>") == 4
    assert f"fairseq-vit report {models / 'vit'}" in page
    assert "2 encoder" not in page


def test_a_page_of_a_model_without_classes(cli, pictures, tmp_path):
    other_heads.build("segformer").save_pretrained(tmp_path / "float")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "float")
    assert cli("quantize", tmp_path / "float", "-o", tmp_path / "packed", "--bits", 4, "--quiet").code == 0
    words = ["report", tmp_path / "float", tmp_path / "packed", "--images", pictures, "--limit", 4, "--rounds", 1]
    result = cli(*words, "-o", tmp_path / "page.html")
    assert result.code == 0
    assert "logits (mean IoU)" in result.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Pictures whose class changed" not in page
    assert "mean IoU" in page


def test_pictures_of_several_sizes(cli, models, pictures, three_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ViTImageProcessor, "__call__",
        lambda self, images, **_: {"pixel_values": torch.zeros(len(images), 3, 16, 16 + images[0].width % 3)},
    )  # fmt: skip
    for i, side in enumerate((30, 31)):
        Image.new("RGB", (side, side), (i, 9, 9)).save(tmp_path / f"{i}.png")
    words = ["report", models / "vit", three_bits, "--images", tmp_path, "--batch-size", 1]
    result = cli(*words, "-o", tmp_path / "page.html")
    assert result.code == 2
    assert "makes pictures of several sizes (16x16, 16x17" in result.err
    assert "Traceback" not in result.err


def test_mistakes(cli, models, pictures, tmp_path):
    start = ["report", models / "vit"]
    end = ["--images", pictures, "-o", tmp_path / "page.html"]
    for words, expected in (
        ([*start, models / "packed", "--images", pictures, "-o", tmp_path / "page.pdf"], "must end in .html"),
        ([*start, models / "packed", "--images", pictures, "-o", tmp_path / "no" / "p.html"], "does not exist"),
        ([*start, models / "vit", *end], "named twice"),
        ([*start, models / "packed", "--images", tmp_path / "none", *end[2:]], "no such folder"),
        ([models and "report", models / "packed", models / "vit", *end], "is packed; pass a folder"),
    ):
        result = cli(*words)
        assert result.code == 2
        assert expected in result.err
        assert "Traceback" not in result.err
    assert not (tmp_path / "page.html").exists()
