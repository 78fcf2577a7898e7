"""quantize: what it writes, what it refuses, and that nothing is left when it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from beside import Beside, new_folder
from families import build
from PIL import Image
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor, pipeline

from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.saving import contents


def files(folder):
    """What lies in it, and in what lies in it; an empty folder, too."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def test_the_folder_is_the_model_that_the_settings_make(cli, models, tmp_path, pixels):
    out = tmp_path / "out"
    options = ["--bits", 4, "--method", "channel", "--symmetric", "--no-mlp", "--override", "*classifier=bits:6"]
    result = cli("quantize", models / "vit", "-o", out, *options)
    assert result.code == 0
    assert "9 linear layers: 8 4-bit channel, 1 6-bit channel" in result.out
    model = ViTForImageClassification.from_pretrained(models / "vit").eval()
    quantizer = ViTQuantizer(4, "channel", symmetric=True, quantize_mlp=False, overrides={"*classifier": {"bits": 6}})
    expected = quantizer.quantize_model(model)
    with torch.no_grad():
        assert torch.equal(load(out)(pixels).logits, expected(pixels).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_each_setting_arrives(cli, models, pictures, tmp_path, monkeypatch):
    seen = {}
    init, quantize = ViTQuantizer.__init__, ViTQuantizer.quantize_model

    def spy(self, **settings):
        seen.update(settings)
        init(self, **settings)

    def spy_again(self, model, **keywords):
        seen.update(keywords)
        return quantize(self, model, **keywords)

    monkeypatch.setattr(ViTQuantizer, "__init__", spy)
    monkeypatch.setattr(ViTQuantizer, "quantize_model", spy_again)
    options = (
        "--bits 5 --method channel --p 0.5 --activations static --activation-bits 7 --symmetric --rounding gptq "
        "--no-equalize --bias-correction add --no-attention --no-classifier --embeddings --towers all --seed 3 "
        "--images 33 --augment 2 --reconstruct --epochs 1 --engine layers --exclude *embeddings* --exclude *.1.*"
    )
    result = cli(
        "quantize",
        models / "vit",
        "-o",
        tmp_path / "x",
        *options.split(),
        "--calibration",
        pictures,
        "--resume",
        tmp_path / "run",
    )
    assert result.code == 0, result.err
    seen.pop("processor")
    assert seen == {
        "bits": 5, "method": "channel", "p": 0.5, "activations": "static", "activation_bits": 7, "group_size": None,
        "symmetric": True, "rounding": "gptq", "equalize": False, "bias_correction": "add", "overrides": {},
        "quantize_attention": False, "quantize_mlp": True, "quantize_classifier": False, "quantize_embeddings": True,
        "towers": "all", "seed": 3, "images": 33, "engine": "layers", "calibration": pictures,
        "exclude": ["*embeddings*", "*.1.*"], "arithmetic": "float", "functions": "default", "augment": 2,
        "resume": tmp_path / "run", "rotate": False, "reconstruct": Reconstruction(epochs=1),
    }  # fmt: skip
    options = ["--activations", "none", "--method", "channel", "--group-size", "32", "--no-mlp"]
    seen.clear()
    cli("quantize", models / "vit", "-o", tmp_path / "y", *options)
    assert (seen["activations"], seen["group_size"], seen["quantize_mlp"], seen["bits"]) == (None, 32, False, 8)


def test_json_and_pipeline(cli, models, pictures, tmp_path):
    out = tmp_path / "out"
    options = ["--bits", 4, "--method", "channel", "--calibration", pictures, "--images", 34]
    result = cli("quantize", models / "short", "-o", out, *options, "--json")
    found = json.loads(result.out)
    assert found["path"] == str(out)
    assert found["calibration_images"] == 34
    assert (found["quantized"], found["skipped"], len(found["layers"])) == (7, 0, 7)
    assert found["sizes"]["quantized"] < found["sizes"]["float"]
    assert found["sizes"]["on_disk"] == (out / "model.safetensors").stat().st_size
    assert found["layers"][0]["rounding"] == "coordinate"
    guess = pipeline("image-classification", model=str(out))(str(pictures / "0.png"))
    assert guess[0]["label"].startswith("LABEL_")


def test_average_bits(cli, models, pictures, tmp_path):
    options = ["--average-bits", 4.5, "--calibration", pictures, "--method", "channel", "--json"]
    overrides = ["--override", "*classifier=skip", "--override", "*.0.attention*=symmetric:true"]
    result = cli("quantize", models / "short", "-o", tmp_path / "out", *options, *overrides)
    assert result.code == 0, result.err
    layers = json.loads(result.out)["layers"]
    assert [layer["name"] for layer in layers if layer["skipped"]] == ["classifier"]
    widths = [(layer["bits"], layer["shape"][0] * layer["shape"][1]) for layer in layers if layer["bits"]]
    assert len({bits for bits, _ in widths}) > 1
    assert sum(bits * size for bits, size in widths) <= 4.5 * sum(size for _, size in widths)
    parts = {name: m for name, m in load(tmp_path / "out").named_modules() if isinstance(m, PackedLinear)}
    assert [".0.attention" in name for name in parts] == [m.config.symmetric for m in parts.values()]
    assert sum(m.config.symmetric for m in parts.values()) == 4


@pytest.mark.parametrize(
    ("limit", "value", "code", "said"),
    [
        ("--max-bytes", 1, 2, "with the narrowest choices the model takes"),
        ("--max-bytes", 10**9, 0, ""),
        ("--max-milliseconds", 10**4, 0, ""),
        ("--max-accuracy-drop", 100, 0, ""),
    ],
)
def test_other_budgets(cli, models, pictures, tmp_path, limit, value, code, said):
    options = [limit, value, "--calibration", pictures, "--images", 4, "--method", "channel", "--json"]
    result = cli("quantize", models / "short", "-o", tmp_path / "out", "--no-attention", *options)
    assert (result.code, said in result.err) == (code, True), result.err
    if code == 0:
        widths = {layer["bits"] for layer in json.loads(result.out)["layers"] if not layer["skipped"]}
        assert min(widths) == 2 and 8 not in widths if limit == "--max-accuracy-drop" else widths == {8}


def test_excluded_layers(cli, models, tmp_path):
    options = ["--exclude", "*classifier", "--exclude", "*.0.*", "--json"]
    result = cli("quantize", models / "vit", "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    skipped = {layer["name"]: layer["skipped"] for layer in json.loads(result.out)["layers"] if layer["skipped"]}
    assert skipped.pop("classifier") == "excluded by '*classifier'"
    assert set(skipped.values()) == {"excluded by '*.0.*'"}
    assert type(load(tmp_path / "out").classifier).__name__ == "Linear"
    result = cli("quantize", models / "vit", "-o", tmp_path / "no", "--exclude", "*none")
    assert (result.code, "exclude '*none' matches no selected layer" in result.err) == (2, True)


def test_stderr_has_progress_and_quiet_has_none(cli, models, tmp_path):
    assert "Saving" in cli("quantize", models / "short", "-o", tmp_path / "a").err
    assert cli("quantize", models / "short", "-o", tmp_path / "b", "--quiet").err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "nope"], "tensor, channel, histogram, got 'nope'"),
        (["--bits", 9], "bits"),
        (["--bits", 4, "--average-bits", 4], "exclude"),
        (["--average-bits", 4], "needs --calibration"),
        (["--average-bits", 4, "--max-bytes", 9], "--average-bits and --max-bytes exclude each other"),
        (["--max-milliseconds", 4], "--max-milliseconds needs --calibration"),
        (["--max-milliseconds", 4, "--engine", "layers"], "it would be of another model"),
        (["--activations", "static"], "needs images"),
        (["--calibration", "nowhere"], "nowhere: no such folder"),
        (["--override", "*classifier"], "GLOB=key:value"),
        (["--override", "*classifier=bits:x"], "bits"),
        (["--override", "nothing=bits:4"], "matches no selected layer"),
        (["--override", "*=no_such:4"], "no_such"),
        (["--towers", "text"], "towers"),
        (["--engine", "fast"], "engine"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--bias-correction", "maybe"], "no, yes, add"),
        (["--augment", 2], "--augment needs --calibration"),
        (["--reconstruct"], "reconstruct= learns from images"),
        (["--epochs", 3], "--epochs and --minutes are for --reconstruct"),
        (["--reconstruct", "--epochs", 3, "--minutes", 1], "exclude each other"),
        (["--reconstruct", "--minutes", 0], "minutes of a Reconstruction must be more than 0"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(cli, models, tmp_path, options, said):
    result = cli("quantize", models / "vit", "-o", tmp_path / "out", *options, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err
    assert not list(tmp_path.iterdir())


def test_nothing_quantized_is_1(cli, models, tmp_path):
    result = cli("quantize", models / "vit", "-o", tmp_path / "out", "--p", 0, "--quiet")
    assert (result.code, result.err) == (1, "error: no layer was quantized, so there is nothing to save: see --p\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "said"),
    [("./nowhere", "no such folder"), ("no/such", "HF_HUB_OFFLINE"), ("empty", "config.json"), ("file", "is a file")],
)
def test_models_that_are_none(cli, tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = cli("quantize", source, "-o", tmp_path / "out", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_quantized_already(cli, models, tmp_path):
    result = cli("quantize", models / "packed", "-o", tmp_path / "out", "--quiet")
    assert result.code == 2
    assert "quantized already" in result.err


def test_damaged_weights(cli, models, tmp_path):
    shutil.copytree(models / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = cli("quantize", tmp_path / "vit", "-o", tmp_path / "out", "--quiet")
    assert result.code == 2
    assert result.err.startswith(f"error: cannot load {tmp_path / 'vit'}: ")


def test_what_is_written_over(cli, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = cli("quantize", models / "short", "-o", out, "--quiet")
    assert result.code == 2
    assert "--force" in result.err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert cli("quantize", models / "short", "-o", out, "--quiet", "--force").code == 0
    (out / "model-00001-of-00002.safetensors").touch()
    assert cli("quantize", models / "short", "-o", out, "--quiet", "--bits", 3).code == 0  # a packed model is replaced
    names = {path.name for path in out.iterdir()}
    assert names == {"notes.txt", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert load(out).classifier.config.bits == 3
    shutil.copytree(models / "short", tmp_path / "float")
    assert cli("quantize", models / "short", "-o", tmp_path / "float", "--quiet").code == 2
    for force in ([], ["--force"]):
        result = cli("quantize", tmp_path / "float", "-o", tmp_path / "float", "--quiet", *force)
        assert "would be lost" in result.err
    assert "does not exist" in cli("quantize", models / "short", "-o", tmp_path / "a" / "b", "--quiet").err
    assert "is a file" in cli("quantize", models / "short", "-o", out / "notes.txt", "--quiet").err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
    ids=["full disk", "ctrl-c"],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_an_error_while_it_saves_leaves_what_was_there(cli, models, tmp_path, monkeypatch, error, code, said, there):
    out, write = tmp_path / "out", contents.write

    def full(*arguments):
        write(*arguments)
        raise error

    if there:
        shutil.copytree(models / "packed", out)
    before = files(tmp_path)
    monkeypatch.setattr(contents, "write", full)
    assert cli("quantize", models / "short", "-o", out, "--quiet") == (code, "", said)
    assert files(tmp_path) == before


SLOW = """
import json, sys, time
from fairseq.cli.main import main
from fairseq.quantization.saving import contents
write = contents.write
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
contents.write = slow
for words in json.loads(sys.argv[1]):
    code = main(words)
    print(code, flush=True)
sys.exit(code)
"""


def interrupt(folder, out):
    """Ctrl-C as a process saves a new folder, replaces one, and quantizes: one for all, which imports for seconds."""
    before = files(out)
    calls = {"written": out / "new", "written again": out / "replaced", "Choosing": out / "quantizing"}
    words = [["quantize", str(folder / "vit"), "-o", str(path)] for path in calls.values()]
    words[-1] += ["--average-bits", "4.5", "--calibration", str(folder / "pictures")]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, json.dumps(words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        for line, path in calls.items():
            for text in child.stderr:
                if text.startswith(line.removesuffix(" again")):
                    break
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "130\n"
            assert child.stderr.readline() == "stopped\n"
            assert files(out) == before
            assert path.exists() == (path.name == "replaced")
        assert child.communicate(timeout=60) == ("", "")
    assert child.returncode == 130


@Beside
def interrupted():
    folder, out, model = new_folder("interrupted"), new_folder("left"), build("vit")
    model.save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    ViTQuantizer(bits=4, method="channel").quantize_model(model).save_pretrained(out / "replaced")
    (folder / "pictures").mkdir()
    for i in range(36):
        Image.effect_noise((16, 16), 60 + i).convert("RGB").save(folder / "pictures" / f"{i}.png")
    return lambda: interrupt(folder, out)


@pytest.mark.slow
@interrupted
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send there")
def test_ctrl_c_leaves_what_was_there():
    interrupted.result()
