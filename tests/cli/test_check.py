"""compare, evaluate and benchmark, against the library's own figures."""

import csv
import io
import json
import os
from contextlib import redirect_stdout

import other_heads
import pytest
import torch
import torch.distributed as dist
from bounds import sum_error
from PIL import Image
from processes import together
from transformers import AutoModelForImageClassification, ViTImageProcessor

from fairseq.cli import measure
from fairseq.cli.loading import load
from fairseq.cli.main import main
from fairseq.cli.pictures import noise
from fairseq.models.vit_quantization import compare_embeddings, compare_models, compare_outputs


def models_of(folder):
    return [AutoModelForImageClassification.from_pretrained(folder / name).eval() for name in ("vit", "packed")]


def pixels_of(pictures, names, side=16):
    processor = ViTImageProcessor(size={"height": side, "width": side})
    return processor(images=[Image.open(pictures / name) for name in names], return_tensors="pt")["pixel_values"]


def test_compare_is_compare_models(cli, models, pictures):
    words = ["compare", models / "vit", models / "packed", "--images", pictures, "--top-k", 2, "--batch-size", 7]
    found = json.loads(cli(*words, "--json").out)
    batches = pixels_of(pictures, sorted(path.name for path in pictures.iterdir())).split(7)
    original, quantized = models_of(models)
    # The same batches: in others, sums may have another order and activations round to the other side.
    each = [torch.tensor(compare_models(original, quantized, x, top_k=2)) * len(x) for x in batches]
    got = (found["mse_loss"], found["mae_loss"], found["match"])
    assert got == pytest.approx((sum(each) / 36).tolist(), rel=sum_error(36 * 7, 1.0))
    assert found["mse_loss"] > 0
    assert (found["count"], found["kind"], found["top_k"], found["passed"]) == (36, "classes", 2, True)


def test_compare_on_noise(cli, models):
    words = ["compare", models / "vit", models / "packed", "--limit", 20]
    result = cli(*words)
    assert result.out.startswith("20 pictures of noise\n")
    assert result.out == cli(*words, "--noise").out
    original, quantized = models_of(models)
    expected = compare_models(original, quantized, noise(original, 20))
    assert json.loads(cli(*words, "--json").out)["match"] == pytest.approx(expected.top_k_match)


def test_compare_embeddings(cli, models, tmp_path):
    assert cli("quantize", models / "clip", "-o", tmp_path / "clip", "--bits", 3, "--quiet").code == 0
    found = json.loads(cli("compare", models / "clip", tmp_path / "clip", "--limit", 12, "--json").out)
    original, quantized = load(str(models / "clip")).model, load(str(tmp_path / "clip")).model
    expected = compare_embeddings(original, quantized, noise(original, 12))
    assert found["kind"] == "embeddings"
    assert {key: found[key] for key in expected._fields} == pytest.approx(expected._asdict())
    assert found["cosine"] < 0.9999
    assert "cosine" in cli("compare", models / "clip", tmp_path / "clip", "--limit", 12).out


@pytest.mark.parametrize("name", ["segformer", pytest.param("depth-anything", marks=pytest.mark.matrix)])
def test_compare_outputs(cli, pictures, tmp_path, name):
    original, folder = other_heads.build(name), tmp_path / "packed"
    original.save_pretrained(tmp_path / "float")
    assert cli("quantize", tmp_path / "float", "-o", folder, "--bits", 3, "--quiet").code == 0
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "float")
    words = ["compare", tmp_path / "float", folder, "--limit", 5, "--batch-size", 2, "--images", pictures]
    found = json.loads(cli(*words, "--json").out)
    quantized = load(str(folder)).model
    pixels = pixels_of(pictures, sorted(path.name for path in pictures.iterdir())[:5], 32)
    (expected,) = compare_outputs(original, quantized, pixels, 2)
    assert (found["kind"], found["count"]) == ("outputs", 5)
    assert found["outputs"] == [pytest.approx(expected._asdict())]
    assert found["kept"] == pytest.approx(expected.kept) != 1
    below = cli(*words, "--at-least", 0.9999)
    assert (below.code, expected.measure in below.out) == (1, True)
    refused = cli(*words, "--top-k", 2)
    assert refused.code == 2
    assert "--top-k is for classifiers" in refused.err


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_a_check_that_fails_is_1(cli, models, pictures, command):
    words = {
        "compare": ["compare", models / "vit", models / "vit", "--images", pictures],
        "evaluate": ["evaluate", models / "packed", "--images", pictures, "--labels", pictures.parent / "labels.csv"],
    }[command]
    assert cli(*words, "--at-least", 0).code == 0
    if command == "compare":
        assert cli(*words, "--at-least", 1).code == 0
        words[2] = models / "clip"  # noise, for a difference that is sure
        words = ["compare", models / "vit", models / "packed", "--limit", 256]
    result = cli(*words, "--at-least", 1)
    assert result.code == 1
    assert "below 1" in result.out
    assert json.loads(cli(*words, "--at-least", 1, "--json").out)["passed"] is False


def test_evaluate(cli, models, pictures):
    labels = pictures.parent / "labels.csv"
    words = ["evaluate", models / "packed", "--images", pictures, "--labels", labels, "--batch-size", 5]
    found = json.loads(cli(*words, "--reference", models / "vit", "--json").out)
    with labels.open() as opened:
        rows = list(csv.DictReader(opened))
    truth = torch.tensor([int(row["class_index"]) for row in rows])
    batches = pixels_of(pictures, [row["file"] for row in rows]).split(5)
    with torch.no_grad():
        expected, got = (torch.cat([m(x).logits for x in batches]) for m in models_of(models))
    assert found["top1"] == pytest.approx((got.argmax(-1) == truth).float().mean().item())
    assert found["top5"] == pytest.approx((got.topk(5).indices == truth[:, None]).any(-1).float().mean().item())
    assert found["reference"]["top1"] == pytest.approx((expected.argmax(-1) == truth).float().mean().item())
    assert found["agreement"] == pytest.approx((got.argmax(-1) == expected.argmax(-1)).float().mean().item())
    assert found["mse_loss"] == pytest.approx((got - expected).square().mean().item(), rel=sum_error(36 * 7, 1.0))
    apart = (expected.softmax(-1) * (expected.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean().item()
    assert found["divergence"] == pytest.approx(apart, rel=1e-3)
    assert found["count"] == 36
    alone = json.loads(cli(*words, "--limit", 10, "--json").out)
    assert alone["count"] == 10
    assert "agreement" not in alone
    assert "agreement" in cli(*words, "--reference", models / "vit", "--limit", 10).out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "file and class_index"),
        ("a,b\n1,2\n", "it has a, b and 1 rows"),
        ("file,class_index\n0.png,7\n", "line 2: class_index must be from 0 to 6, got '7'"),
        ("file,class_index\n0.png,1\nnone.png,1\n", "line 3"),
    ],
)
def test_wrong_labels(cli, models, pictures, tmp_path, text, said):
    labels = tmp_path / "labels.csv"
    if text is not None:
        labels.write_text(text)
    result = cli("evaluate", models / "packed", "--images", pictures, "--labels", labels, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: --labels")
    assert result.err.count("\n") == 1
    assert said in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare vit packed --images nowhere", "no such folder"),
        ("compare vit packed --images packed", "no picture in it"),
        ("compare vit packed --images packed --noise", "exclude"),
        ("compare vit packed --top-k 8", "top_k must be at most the number of classes, 7; got 8"),
        ("compare vit clip", "do not match"),
        ("compare clip clip --limit 1", "at least 2"),
        ("compare vit ./nowhere", "no such folder"),
        ("evaluate clip --images vit --labels x.csv", "labels need an image classifier"),
        ("benchmark packed --batch 0", "--batch"),
        ("benchmark packed --rounds 0", "--rounds"),
    ],
)
def test_mistakes(cli, models, monkeypatch, words, said):
    monkeypatch.chdir(models)
    result = cli(*words.split(), "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err


def test_a_float_model_in_place_of_the_quantized_one_is_told(cli, models):
    assert "nothing in" in cli("compare", models / "vit", models / "vit").err


def test_benchmark_takes_turns_and_medians(cli, models, monkeypatch):
    times = {"PackedLinear": 2.0, "Linear": 3.0}
    turns = []

    def seconds(model, pixels):
        kind = "PackedLinear" if any(type(m).__name__ == "PackedLinear" for m in model.modules()) else "Linear"
        turns.append((kind, len(pixels)))
        return times[kind] + (100 if len(turns) == 2 else 0)  # one that is disturbed

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(measure, "PAUSE", 0)
    words = ["benchmark", models / "packed", "--reference", models / "vit", "--batch", "1,4", "--rounds", 3]
    found = json.loads(cli(*words, "--json").out)
    once = [("Linear", 1), ("Linear", 1), ("PackedLinear", 1), ("PackedLinear", 1)]
    assert turns[:8] == once * 2
    assert found["batches"]["1"]["model"] == {"ms": 2000.0, "images_per_second": 0.5, "ratio": 1.5}
    assert found["batches"]["4"]["reference"] == {"ms": 3000.0, "images_per_second": 4 / 3, "ratio": 1.0}
    assert found["bytes"]["model"] < found["bytes"]["reference"]
    assert "1.50x" in cli(*words).out


def test_benchmark_alone(cli, models):
    before = torch.get_num_threads()
    result = cli("benchmark", models / "packed", "--batch", 1, "--rounds", 1, "--threads", 3)
    assert result.code == 0
    assert "threads: 3" in result.out
    assert torch.get_num_threads() == before
    assert "speed" not in result.out
    assert "images/s" in result.out


def evaluated(models, pictures):
    """What one process of a group prints, and its exit code."""
    out = io.StringIO()
    words = ["evaluate", models / "packed", "--images", pictures, "--labels", pictures.parent / "labels.csv"]
    os.environ["RANK"] = str(dist.get_rank())
    with redirect_stdout(out):
        code = main([str(word) for word in [*words, "--reference", models / "vit", "--json"]])
    return code, out.getvalue()


@pytest.mark.slow
def test_two_processes_count_what_one_counts(cli, models, pictures):
    one = cli("evaluate", models / "packed", "--images", pictures, "--labels", pictures.parent / "labels.csv",
              "--reference", models / "vit", "--json")  # fmt: skip
    (code, out), (other_code, silent) = together(evaluated, models, pictures)
    assert (code, other_code, silent) == (0, 0, "")
    expected, found = json.loads(one.out), json.loads(out)
    for sum_ in ("mse_loss", "divergence"):
        assert found.pop(sum_) == pytest.approx(expected.pop(sum_), rel=1e-6)
    assert found == expected
    assert found["count"] == 36
