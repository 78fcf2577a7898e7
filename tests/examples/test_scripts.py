"""The scripts as a person runs them: what they print, their exit codes, and one line for a mistake."""

import csv
import functools
import json
import subprocess
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification, ViTImageProcessor

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.calibration.synthetic import synthetic_images

FOLDER = Path(__file__).parents[2] / "examples" / "vision_transformer"


@pytest.mark.parametrize(
    "name",
    [
        "test_ibert",
        "test_vit_quantization",
        "test_with_image",
        "evaluate",
        "train_cifar10",
        "benchmark_loading",
        "accuracy_picture",
    ],
)
def test_help(script, name):
    code, out, _ = script(name, "--help")
    assert code == 0
    assert "usage:" in out


def test_installation_check(script, monkeypatch):
    code, out, _ = script("test_ibert")
    assert code == 0
    lines = out.splitlines()
    assert sum(line.startswith("✓") for line in lines) == len(lines) - 1 == 19
    assert lines[-1].startswith("19 of 19 checks passed")


def test_installation_check_fails_on_a_broken_kernel(script):
    def break_two(module):
        module.CHECKS["i-sqrt"] = lambda: (1.0, 0.0)
        module.CHECKS["i-exp"] = lambda: 1 / 0

    code, out, _ = script("test_ibert", before=break_two)
    assert code == 1
    assert "✗ i-sqrt" in out
    assert "ZeroDivisionError" in out
    assert "17 of 19 checks passed" in out


def test_demo_on_a_given_model(script, model):
    code, out, err = script("test_with_image", "--model", model)
    assert (code, err) == (0, "")
    assert out.count("Quantized 7 linear layers in ") == 2
    for text in ("8-bit channel", "4-bit channel", "MSE: ", "MAE: ", "Top-1 Match: ✓", "ms per image", "Size in "):
        assert text in out
    assert "accuracy" not in out  # the 500 pictures are not of this model's classes
    code, out, _ = script("test_with_image", "--all", "--model", model)
    assert code == 0
    assert out.count("Quantized 7 linear layers") == 6


@pytest.mark.parametrize(("every", "least"), [(10, 60), pytest.param(1, 75, marks=pytest.mark.slow)])
def test_demo_without_network_uses_the_embedded_model_and_says_why(script, monkeypatch, every, least):
    """On every tenth picture, which is five of each class; and on all 500, with the accuracy that they have."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)

    def take(module):
        whole = module.embedded_images
        module.embedded_images = lambda: tuple(part[::every] for part in whole())

    started = time.perf_counter()
    code, out, _ = script("test_with_image", before=take)
    assert code == 0
    assert time.perf_counter() - started < 60
    assert "google/vit-base-patch16-224 cannot be loaded (the HuggingFace hub did not answer: no route to host)" in out
    assert "Using the embedded model" in out
    assert "Original prediction: cat (" in out
    rows = {" ".join(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line.endswith("%")}
    accuracy = {name.split("  ")[0][:13]: float(value.strip("%")) for name, value in rows.items()}
    assert len(accuracy) == 3
    assert all(value >= least for value in accuracy.values())


def test_embedded_model_is_what_its_card_says():
    model = ViTForImageClassification.from_pretrained(FOLDER / "cifar10-vit")
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert model.config.image_size == 32
    assert model.config.patch_size == 4
    assert sum(f.stat().st_size for f in (FOLDER / "cifar10-vit").iterdir()) <= 6_000_000
    assert (FOLDER / "assets" / "cifar10_test_500.zip").stat().st_size <= 1_000_000
    result = json.loads((FOLDER / "cifar10-vit" / "training.json").read_text())
    assert f"{result['test_accuracy']:.2%}" in (FOLDER / "cifar10-vit" / "README.md").read_text()
    assert AutoImageProcessor.from_pretrained(FOLDER / "cifar10-vit").size == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.jpg"], "error: --image missing.jpg: no such file"),
        (["--image", str(FOLDER / "common.py")], "not a readable picture"),
        (["--model", "./missing"], "error: --model ./missing: no such folder"),
        (["--model", "someone/some-vit"], "as a hub id it cannot be loaded: HF_HUB_OFFLINE is set"),
        (["--model", str(FOLDER)], "cannot load the model"),
        (["--model", "foo bar"], "cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(script, model, arguments, message):
    given = arguments if "--model" in arguments else ["--model", str(model), *arguments]
    code, _, err = script("test_with_image", *given)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_explorer(script, model, tiny_vit):
    code, out, _ = script("test_vit_quantization", "--model", model, "--layers")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["attention"][1] == "4"
    assert rows["mlp"][1] == "2"
    assert rows["all"][1:3] == ["7", f"{sum(p.numel() for p in tiny_vit.parameters()):,}"]
    assert len([line for line in out.splitlines() if line.startswith(("8-bit", "4-bit"))]) == 6


@pytest.fixture
def pictures(tmp_path, model):
    """Twelve noise pictures with the float model's own predictions as labels, save one: 11 of 12 are right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    network = ViTForImageClassification.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    rows = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        inputs = processor(images=Image.open(folder / f"{i}.png"), return_tensors="pt")
        with torch.no_grad():
            label = int(network(**inputs).logits.argmax())
        rows.append([f"{i}.png", (label + 1) % 7 if i == 0 else label])
    write_labels(tmp_path / "labels.csv", rows)
    return folder


def write_labels(path, rows, header=("file", "class_index")):
    with path.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])


def test_evaluate(script, model, pictures, tmp_path):
    arguments = ["--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", "--batch-size", 5]
    code, out, _ = script("evaluate", *arguments, "--configs", "8:channel", "2:tensor", "--device", "cpu")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [c for r in rows if r[:1] == ["float"] for c in r[:1] + r[1:2] + r[3:6]] == [
        "float",
        "91.7%",
        "100.0%",
        "100.0%",
        "0.00e+00",
    ]
    eight, two = (next(r for r in rows if r[:1] == [name]) for name in ("8-bit", "2-bit"))
    assert float(eight[6]) < float(two[6])
    code, out, _ = script("evaluate", *arguments, "--configs", "8:tensor", "--limit", 4)
    assert "4 pictures" in out
    assert "75.0%" in out


def test_evaluate_scores_without_a_progress_bar(script, model, pictures, tmp_path):
    """TQDM_DISABLE=1 stops the bar's counter, too; the labels must not depend on it."""
    arguments = ["--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", "--batch-size", 5]

    def disable(module):
        module.tqdm = functools.partial(module.tqdm, disable=True)

    code, out, _ = script("evaluate", *arguments, "--configs", "8:channel", "--device", "cpu", before=disable)
    assert code == 0
    assert next(line.split() for line in out.splitlines() if line.startswith("float"))[1] == "91.7%"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([["0.png", 1]], ("name", "label"), "needs the columns file and class_index"),
        ([["0.png", 7]], ("file", "class_index"), "line 2: class_index must be from 0 to 6, got '7'"),
        ([["0.png", 1], ["1.png", "x"]], ("file", "class_index"), "line 3: class_index"),
        ([["99.png", 1]], ("file", "class_index"), "99.png is not a file"),
        ([], ("file", "class_index"), "at least one row"),
    ],
)
def test_evaluate_mistakes(script, model, pictures, tmp_path, rows, header, message):
    write_labels(tmp_path / "bad.csv", rows, header)
    code, _, err = script("evaluate", "--model", model, "--images", pictures, "--labels", tmp_path / "bad.csv")
    assert code == 2
    assert message in err
    code, _, err = script(
        "evaluate", "--model", model, "--images", tmp_path / "no", "--labels", tmp_path / "labels.csv"
    )
    assert (code, "no: no such folder" in err) == (2, True)


@pytest.mark.filterwarnings("ignore:calibrating on")
def test_evaluate_calibrates_on_pictures_it_leaves_out(script, model, pictures, tmp_path):
    arguments = ["--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", "--configs"]
    code, out, _ = script("evaluate", *arguments, "8:channel", "4.5:channel", "--calibration", 5)
    assert code == 0
    assert "7 pictures" in out
    assert "calibrated on 5 others" in out
    assert "4.5-bit channel" in out
    (tmp_path / "names.txt").write_text("3.png\n1.png\n")
    code, out, _ = script("evaluate", *arguments, "8:channel", "--calibration", tmp_path / "names.txt")
    assert code == 0
    assert "10 pictures" in out

    def draw_few(module):  # 128 of 224 by 224 pixels take ten seconds
        module.synthetic_images = lambda seed: 16 * synthetic_images(8, 16)

    code, out, _ = script("evaluate", *arguments, "8:channel", "--calibration", "synthetic", before=draw_few)
    assert code == 0
    assert "12 pictures" in out
    assert "calibrated on 128 synthetic ones" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", 12], "of 12 pictures, 1 to 11 can serve"),
        (["--calibration", 0], "of 12 pictures, 1 to 11 can serve"),
        (["--calibration", "gone.txt"], "gone.txt"),
        (["--configs", "4.5:channel"], "4.5:channel: choosing widths by layer needs pictures; pass --calibration"),
        (["--reconstruct", 2], "reconstruct= learns from images"),
        (["--reconstruct", 2, "--calibration", 5], "needs at least 16; got 5"),
    ],
)
def test_evaluate_calibration_mistakes(script, model, pictures, tmp_path, arguments, message):
    code, _, err = script(
        "evaluate", "--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", *arguments
    )
    assert code == 2
    assert message in err
    (tmp_path / "names.txt").write_text("99.png\n")
    code, _, err = script(
        "evaluate", "--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv",
        "--calibration", tmp_path / "names.txt",
    )  # fmt: skip
    assert code == 2
    assert "99.png is not one of the pictures" in err


def test_the_same_pictures_are_held_out_whatever_calibrates(script, model, pictures, tmp_path):
    """And what each call measured is added to one file, which a picture shows."""
    rows = tmp_path / "rows.json"
    arguments = ["--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", "--held-out", 4,
                 "--json", rows, "--configs", "8:channel", "2:channel"]  # fmt: skip
    seen = []

    def watch(module):
        whole = module.score_all
        module.score_all = lambda models, images, *rest: seen.append(images) or whole(models, images, *rest)

    ways = [[], ["--calibration", 3], ["--calibration", 8, "--override", "*classifier=bits:8"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrating on")
        outs = [script("evaluate", *arguments, *way, before=watch) for way in ways]
    assert [code for code, _, _ in outs] == [0, 0, 0]
    names = [[image.args[0].name for image in images] for images in seen]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 4
    found = json.loads(rows.read_text())
    assert [(row["bits"], row["calibration"]) for row in found] == [
        (8, None), (2, None), (8, 3), (2, 3), (8, 8), (2, 8)
    ]  # fmt: skip
    assert [row["overrides"] for row in found[3:5]] == [[], ["*classifier=bits:8"]]
    table = next(line.split() for line in outs[1][1].splitlines() if line.startswith("2-bit"))
    assert table[-2] == f"{found[3]['divergence']:.4f}"
    assert found[0]["divergence"] < found[1]["divergence"]
    script("evaluate", *arguments[:-5], "--configs", "8:channel", "--seed", 1, before=watch)
    assert {image.args[0].name for image in seen[3]} != {*names[0]}
    code, out, _ = script("accuracy_picture", rows, rows, "--output", tmp_path / "accuracy.png")
    assert (code, out) == (0, f"{tmp_path / 'accuracy.png'}: 6 of 12 rows, 3 ways\n")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.size == (1650, 780)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", 12], "--held-out 12: of 12 pictures, 1 to 11 can be held out"),
        (["--held-out", 8, "--calibration", 5], "--calibration 5: of 12 pictures, 1 to 4 can serve"),
        (["--held-out", 12 - 1, "--calibration", "all.txt"], "of its pictures are held out"),
        (["--distill", 1], "--distill needs pictures; pass --calibration"),
        (["--distill", 1, "--calibration", 7], "--distill needs at least 8 pictures"),
        (["--learning-rate", 0.1], "--learning-rate 0.1: goes with --distill"),
        (["--distill", 1, "--calibration", 8, "--learning-rate", -1], "--learning-rate -1.0: "),
        (["--json", "labels.csv"], "labels.csv: "),
        (["--json", "gone/rows.json"], "--json gone/rows.json: must be a file in a folder that there is"),
    ],
)
def test_evaluate_mistakes_in_what_is_held_out(script, model, pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.txt").write_text("".join(f"{i}.png\n" for i in range(12)))
    code, _, err = script(
        "evaluate", "--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", *arguments
    )
    assert code == 2
    assert message in err


ROW = {
    "model": "a", "evaluated": 4, "evaluated_on": "c", "bits": 4, "method": "channel", "calibration": None,
    "agreement": 1, "divergence": 0.1,
}  # fmt: skip


def test_a_picture_has_a_line_for_each_setting(script, tmp_path):
    changes = [
        {}, {"method": "tensor"}, {"calibration": 8}, {"group_size": 32}, {"rotated": True}, {"rounding": "nearest"},
        {"reconstruct": 2}, {"reconstruct": 3}, {"distill": 2, "learning_rate": 1e-4}, {"overrides": ["*=bits:8"]},
        {"distill": 2, "learning_rate": 1e-3}, {"arithmetic": "integer"}, {"functions": "ivit"},
        {"activations": "none"}, {"activations": "static"}, {"activations": "dynamic", "activation_bits": 4},
        {"seed": 1},
    ]  # fmt: skip
    rows = [{**ROW, **change, "bits": bits} for change in changes for bits in (4, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, out, _ = script("accuracy_picture", tmp_path / "rows.json", "--output", tmp_path / "a.png")
    assert (code, out.split(": ")[-1]) == (0, f"{len(rows)} of {len(rows)} rows, {len(changes)} ways\n")


def test_accuracy_picture_mistakes(script, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([ROW, {**ROW, "model": "b"}, {**ROW, "evaluated_on": "d"}]))
    (tmp_path / "null.json").write_text(json.dumps([{**ROW, "agreement": None}]))
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "other.json").write_text("[1]")
    for words, message in [
        (["rows.json", "--output", "a.pdf"], "--output a.pdf: its name must end in .png"),
        (
            [tmp_path / "rows.json", "--output", "a.png"],
            "a on 4 pictures (c), a on 4 pictures (d), b on 4 pictures (c)",
        ),
        ([tmp_path / "null.json", "--output", "a.png"], "not rows that evaluate.py --json has written"),
        ([tmp_path / "rows.json", "--output", "gone/a.png"], "--output gone/a.png: must be a file in a folder"),
        ([tmp_path / "none.json", "--output", "a.png"], "there are no rows"),
        ([tmp_path / "other.json", "--output", "a.png"], "not rows that evaluate.py --json has written"),
        ([tmp_path / "gone.json", "--output", "a.png"], "gone.json"),
    ]:
        code, _, err = script("accuracy_picture", *words)
        assert (code, message in err) == (2, True)


def test_evaluate_distils(script, model, tmp_path):
    """What --distill makes is packed, and row and table say so; 24 pictures train, as reconstruction needs 16."""
    folder, rows = tmp_path / "many", []
    folder.mkdir()
    for i in range(32):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        rows.append([f"{i}.png", i % 7])
    write_labels(tmp_path / "many.csv", rows)
    made, used = [], {}

    def watch(module):
        whole, quantize, distill = module.make, module.quantize, module.distill
        module.make = lambda *arguments: made.append(whole(*arguments)) or made[-1]

        def quantize_(*arguments, **more):
            used["calibrated"] = more["calibration"]
            return quantize(*arguments, **more)

        def distill_(*arguments, **more):
            used.update(trained=arguments[2], held_back=more["held_back"])
            return distill(*arguments, **more)

        module.quantize, module.distill = quantize_, distill_

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training did not help")
        warnings.filterwarnings("ignore", "calibrating on")
        code, out, _ = script(
            "evaluate", "--model", model, "--images", folder, "--labels", tmp_path / "many.csv",
            "--configs", "2:channel", "--calibration", 24, "--reconstruct", 1, "--distill", 1,
            "--json", tmp_path / "rows.json", before=watch,
        )  # fmt: skip
    assert code == 0
    assert "distilled (1 epochs, 3 pictures held back), calibrated on 21 others" in out
    assert any(isinstance(module, PackedLinear) for module in made[0].modules())
    assert not any(isinstance(module, EmulatedLinear) for module in made[0].modules())
    pictures = {kind: {image.tobytes() for image in images} for kind, images in used.items()}
    assert {kind: len(images) for kind, images in pictures.items()} == {"calibrated": 21, "trained": 21, "held_back": 3}
    assert pictures["calibrated"] == pictures["trained"]
    assert not pictures["trained"] & pictures["held_back"]
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    assert (row["reconstruct"], row["distill"], row["calibration"], row["evaluated"]) == (1, 1, 21, 8)


def test_evaluate_without_a_model_takes_the_embedded_one(script):
    code, out, _ = script("evaluate", "--configs", "8:channel", "--limit", 50)
    assert code == 0
    assert "the embedded CIFAR-10 ViT, 50 pictures" in out
    code, _, err = script("evaluate", "--images", ".")
    assert code == 2
    assert "--model, --images and --labels go together" in err


@pytest.mark.parametrize(
    "text", ["9:tensor", "4:foo", "tensor", "x:channel", "1.5:channel", "4.5:foo", "4.:tensor", "8.5:channel"]
)
def test_evaluate_refuses_a_configuration(script, text):
    code, _, err = script("evaluate", "--model", "m", "--images", "i", "--labels", "l", "--configs", text)
    assert code == 2
    assert "is not BITS:METHOD" in err


def test_evaluate_without_cuda(script, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--model", "m", "--images", "i", "--labels", "l", "--device", "cuda"]
    code, _, err = script("evaluate", *arguments)
    assert (code, "no CUDA device" in err) == (2, True)


def test_evaluate_reads_a_spreadsheet_file(script, model, pictures, tmp_path):
    text = (tmp_path / "labels.csv").read_text().replace(",", ", ")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
    arguments = ["--model", model, "--images", pictures, "--labels", tmp_path / "labels.csv", "--configs", "8:tensor"]
    code, out, _ = script("evaluate", *arguments)
    assert code == 0
    assert "91.7%" in out


def test_pictures_of_every_kind(script, tmp_path):
    script("evaluate", "--help")  # puts the folder on the path
    from common import UserError, read_image

    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.fromarray(upright).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", "").size == (4, 6)
    Image.fromarray(np.full((2, 2), 96 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", "").getpixel((0, 0)) == (96, 96, 96)
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (3, 3)).save(tmp_path / "m.tiff")
        assert read_image(tmp_path / "m.tiff", "").mode == "RGB"
    data = (tmp_path / "turned.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:60])
    with pytest.raises(UserError, match="not a readable picture"):
        read_image(tmp_path / "cut.png", "cut.png")


def test_a_checkpoint_without_a_classifier_is_refused(script, tiny_vit, tmp_path):
    tiny_vit.vit.save_pretrained(tmp_path / "bare")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "bare")
    code, _, err = script("test_with_image", "--model", tmp_path / "bare")
    assert code == 2
    assert "not a whole image classifier: it has no weights for classifier" in err


@pytest.fixture
def clip(tmp_path):
    """A folder with a tiny CLIP, its image processor, and a tokenizer of eight words."""
    import families
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    folder = tmp_path / "clip"
    families.build("clip").save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "photo", "of", "cat", "dog", "bird"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a photo of a cat\na dog\n\na photo of a bird\n")
    return folder


def test_evaluate_embeddings(script, clip, pictures, tmp_path):
    arguments = ["--model", clip, "--images", pictures, "--configs", "8:channel", "2:tensor", "--batch-size", 5]
    code, out, err = script("evaluate", *arguments, "--prompts", tmp_path / "prompts.txt", "--neighbours", 3)
    assert code == 0, err
    assert "12 pictures, Linear layers of the vision tower quantized" in out
    assert "overlap@3" in out
    rows = {line.split()[0]: line.split()[2:] for line in out.splitlines() if "-bit" in line}
    assert float(rows["2-bit"][0]) < float(rows["8-bit"][0]) <= 1
    assert all(float(row[1]) <= float(row[0]) for row in rows.values())
    assert all(row[2].endswith("%") and row[3].endswith("%") for row in rows.values())
    code, out, _ = script("evaluate", *arguments, "--calibration", 4)
    assert code == 0
    assert "zero-shot" not in out


def test_evaluate_embeddings_mistakes(script, clip, model, pictures, tmp_path):
    (tmp_path / "one.txt").write_text("a cat\n")
    cases = [
        (["--model", clip, "--images", tmp_path / "no"], "no such folder"),
        (["--model", clip, "--images", pictures, "--neighbours", 12], "12 pictures; 12 neighbours need more"),
        (["--model", clip, "--images", pictures, "--prompts", tmp_path / "one.txt"], "at least two classes"),
        (["--model", model, "--images", pictures, "--prompts", tmp_path / "one.txt"], "has no text tower"),
        (["--prompts", tmp_path / "one.txt"], "without --labels"),
    ]
    for arguments, message in cases:
        code, _, err = script("evaluate", *arguments)
        assert code == 2
        assert message in err


@pytest.mark.parametrize("elsewhere", [None, pytest.param("packed", marks=pytest.mark.slow)])
def test_loading_in_four_ways(script, model, elsewhere):
    """Here, which spares imports of it all; the last way also in a process of its own, as a user's are."""
    started = []

    def measure_here(module):
        def run(command, **keywords):
            way, *folders = command[command.index("--measure") + 1 :]
            started.append(way)
            if way == elsewhere:
                return subprocess.run(command, **keywords)
            return SimpleNamespace(stdout=json.dumps(module.measure(way, *folders, 4)))

        module.subprocess = SimpleNamespace(run=run, PIPE=subprocess.PIPE)

    code, out, _ = script("benchmark_loading", "--model", model, "--bits", "4", before=measure_here)
    assert code == 0
    assert started == ["float", "afterwards", "while loading", "packed"]
    rows = [line for line in out.splitlines() if line.startswith(("from_", "the same"))]
    sizes = [float(row.split(" MB")[1].split()[-1]) for row in rows]
    assert len(rows) == 4
    assert sizes[1] == sizes[2] == sizes[3] <= sizes[0]


def test_loading_without_a_folder(script):
    code, _, err = script("benchmark_loading", "--model", "/nowhere")
    assert code == 2
    assert err.startswith("error: --model /nowhere")
