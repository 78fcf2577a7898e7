"""export and inspect."""

import json
import shutil

import pytest
import safetensors
from families import build, shortened

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.saving import contents


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder with a packed model of one block: the others are written like it."""
    folder = tmp_path_factory.mktemp("models") / "short"
    ViTQuantizer(bits=4, method="channel").quantize_model(shortened(build("vit"))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit.onnx", ["--ops", "standard", "--external-data"]),
        pytest.param("vit.xml", [], marks=pytest.mark.matrix),
        ("vit.pt", []),
        pytest.param("vit.pt2", ["--format", "torch_export"], marks=pytest.mark.matrix),
    ],
)
def test_export(cli, short, tmp_path, verified_here, name, options):
    if name == "vit.xml":
        pytest.importorskip("openvino")
    result = cli("export", short, tmp_path / name, *options, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    formats = {"vit.onnx": "onnx", "vit.xml": "openvino", "vit.pt": "torchscript", "vit.pt2": "torch_export"}
    assert found["format"] == formats[name]
    assert found["integer_weights"] > 0
    assert found["max_difference"] <= found["tolerance"]
    names = {path.name for path in tmp_path.iterdir()}
    beside = {"vit.onnx": {"vit.onnx.data"}, "vit.xml": {"vit.bin"}}
    assert names == {name, *beside.get(name, ())}
    assert "warning" not in result.err


def test_the_name_tells_the_format(cli, short, monkeypatch):
    formats = {"x.onnx": "onnx", "x.xml": "openvino", "x.pt": "torchscript", "x.pt2": "torch_export", "x.bin": "c"}
    chosen = []

    def stop(model, path, form, **options):
        chosen.append((path.name, form, options["external_data"], options["onnx_ops"]))
        raise ValueError("not this time")

    monkeypatch.setattr(ViTQuantizer, "export", stop)
    for name in formats:
        assert cli("export", short, name).code == 2
    assert chosen == [(name, form, None, "onnxruntime") for name, form in formats.items()]
    assert cli("export", short, "x.onnx", "--format", "torch_export", "--external-data", "--ops", "standard").code == 2
    assert chosen[-1] == ("x.onnx", "torch_export", True, "standard")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("vit x.onnx", "vit is not quantized; quantize it first: fairseq-vit quantize vit -o OUT"),
        ("packed x.tflite", ".onnx, .xml, .pt, .pt2, .bin"),
        ("packed x.bin", "format 'c' is for integer-only models"),
        ("packed x.pt --format onnx", "ends in .onnx"),
        ("packed x.onnx --format tflite", "'onnx', 'openvino', 'torchscript', 'torch_export'"),
        ("packed x.onnx --ops other", "onnx_ops"),
        ("packed nowhere/x.onnx", "does not exist"),
    ],
)
def test_exports_that_cannot_be(cli, models, monkeypatch, words, said):
    monkeypatch.chdir(models)
    result = cli("export", *words.split(), "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err
    assert {path.name for path in models.iterdir()} == {"vit", "short", "packed", "clip"}


@pytest.fixture
def headers_only(monkeypatch):
    """Reading a tensor is an error."""

    class Headers:
        def __init__(self, *arguments, **keywords):
            self.opened = safetensors.safe_open(*arguments, **keywords)

        def __enter__(self):
            self.opened = self.opened.__enter__()
            return self

        def __exit__(self, *arguments):
            return self.opened.__exit__(*arguments)

        def __getattr__(self, name):
            assert name in ("metadata", "keys", "get_slice"), name
            return getattr(self.opened, name)

    monkeypatch.setattr(contents, "safe_open", Headers)


def test_inspect_loads_no_weights(cli, models, headers_only):
    folder = models / "packed"
    found = json.loads(cli("inspect", folder, "--json").out)
    assert found["quantized"] is True
    assert found["architecture"] == "ViTForImageClassification"
    assert found["format_version"] == contents.VERSION
    assert found["files"] == ["model.safetensors"]
    assert found["verified"] is False
    assert found["sizes"]["total"] == (folder / "model.safetensors").stat().st_size
    assert found["sizes"]["float"] == found["information"]["bytes_before"]
    layers = found["layers"]
    assert {name: layer["bits"] for name, layer in layers.items()} == {
        name: 8 if name == "classifier" else 4 for name in layers
    }
    assert len(layers) == 13
    assert layers["classifier"]["weights"] == 7 * 24
    assert layers["classifier"]["bytes"] == 7 * 24 + 7 * (4 + 1 + 4) + 16  # codes; scale, zero point, bias; settings
    weights = {name: layer["weights"] for name, layer in layers.items()}
    assert sum(weights.values()) == 2 * (4 * 24 * 24 + 2 * 24 * 40) + 7 * 24
    assert found["average_bits"] == pytest.approx(4 + 4 * 7 * 24 / sum(weights.values()))
    assert found["sizes"]["packed"] == sum(layer["bytes"] for layer in layers.values())
    with pytest.raises(AssertionError, match="get_tensor"):
        cli("inspect", folder, "--verify")


def test_inspect_as_text(cli, models):
    result = cli("inspect", models / "packed", "--layers", "--verify")
    assert result.code == 0
    assert "4-bit channel (12 layers), 8-bit channel (1 layers)" in result.out
    assert "compared, all right" in result.out
    assert sum(" 4  channel " in line for line in result.out.splitlines()) == 12
    assert "classifier" in result.out
    assert "classifier" not in cli("inspect", models / "packed").out


def test_inspect_a_file(cli, models, tmp_path, tiny_vit):
    quantized = ViTQuantizer(bits=8, activations=None, quantize_mlp=False).quantize_model(tiny_vit)
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors", {"metrics": {"top-1": 0.75}, "calibration_images": 9})
    result = cli("inspect", tmp_path / "vit.safetensors")
    assert result.code == 0
    for said in ("8-bit tensor (9 layers)", "float (9 layers)", "9 pictures", "top-1 0.75", "vit.safetensors"):
        assert said in result.out


def test_inspect_shards(cli, models, tmp_path, tiny_vit):
    ViTQuantizer(bits=8).quantize_model(tiny_vit).save_pretrained(tmp_path / "out", max_shard_size="5KB")
    found = json.loads(cli("inspect", tmp_path / "out", "--json").out)
    assert len(found["files"]) > 1
    assert len(found["layers"]) == 13


def test_a_float_model_is_1(cli, models):
    for path in (models / "vit", models / "vit" / "model.safetensors"):
        assert cli("inspect", path) == (1, f"{path} is not quantized\n", "")
    assert json.loads(cli("inspect", models / "vit", "--json").out)["quantized"] is False


def damage(folder, kind):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "weights":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif kind == "short":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "config":
        config.write_text("{")
    elif kind == "no config":
        config.unlink()
    elif kind == "list":
        config.write_text("[]")
    elif kind == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    else:
        config.write_text(config.read_text().replace('"bits": 4', '"bits": 5', 1))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("short", "not a whole safetensors file"), ("no weights", "no such file"), ("config", "config.json is damaged"),
        ("no config", "no config.json"), ("list", "JSON object"), ("index", "index.json is damaged"),
        ("other", "another model"),
    ],
)  # fmt: skip
def test_damaged_folders(cli, models, tmp_path, kind, said):
    folder = shutil.copytree(models / "packed", tmp_path / "packed")
    damage(folder, kind)
    result = cli("inspect", folder)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err


def test_damaged_weights_are_found_by_verify_and_by_whatever_loads_them(cli, models, tmp_path):
    folder = shutil.copytree(models / "packed", tmp_path / "packed")
    damage(folder, "weights")
    assert cli("inspect", folder).code == 0
    for words in (["inspect", folder, "--verify"], ["benchmark", folder], ["compare", models / "vit", folder]):
        result = cli(*words, "--quiet")
        assert (result.code, result.out) == (2, "")
        assert "is damaged: its checksum" in result.err
        assert result.err.count("\n") == 1


def test_nothing_there(cli, tmp_path):
    result = cli("inspect", tmp_path / "nothing")
    assert result == (2, "", f"error: {tmp_path / 'nothing'}: no such file\n")
