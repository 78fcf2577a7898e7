"""from_pretrained: packed folders, quantizing while loading, and what transformers does with the result."""

import copy
import json
import random

import pytest
import torch
import transformers
from beside import Beside, new_folder, python
from families import BUILDERS, build, each
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from fairseq.models.vit_quantization import FairseqViTConfig, ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.conversion.incremental import WhileLoading
from fairseq.quantization.saving import told

HUGGINGFACE = [name for name in BUILDERS if not name.startswith("timm")]
SEEN = {
    "vit-bare", "vit-masked", "deit-teacher", "dinov2-registers", "vit-mae-encoder", "clip-vision",
    "clip-vision-projection", "clip-classifier", "siglip-vision", "siglip-classifier", "siglip2-vision",
}  # fmt: skip
"""Families of the blocks of another one, which is equalized while it is loaded; what is around them differs."""


def equal(model, other):
    """To the bit, buffers that no file holds included; those of kernels need not be there yet."""
    state, others = model.state_dict(), other.state_dict()
    buffers = dict(other.named_buffers())
    return (
        state.keys() == others.keys()
        and all(torch.equal(a, b) for a, b in zip(state.values(), others.values()))
        and all(torch.equal(a, buffers[name]) for name, a in model.named_buffers() if name in buffers)
    )


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def folder(tiny_vit, tmp_path):
    """A packed model of 4 bits, saved; (the quantized model, its folder)."""
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit)
    quantized.save_pretrained(tmp_path / "packed")
    return quantized, tmp_path / "packed"


@pytest.fixture
def float_folder(tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_a_folder_gives_the_same_model_to_the_bit(folder, pixels):
    quantized, path = folder
    loaded = AutoModelForImageClassification.from_pretrained(path)
    assert equal(quantized, loaded)
    assert torch.equal(quantized(pixels).logits, loaded(pixels).logits)
    assert not loaded.training
    assert type(loaded) is ViTForImageClassification
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 13
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in quantized.modules()]  # fused, too
    assert loaded.config.quantization_config.quant_method == "fairseq_vit"


@pytest.mark.parametrize("name", each(HUGGINGFACE))
def test_every_family_comes_back(name, tmp_path):
    model = build(name)
    quantized = ViTQuantizer(bits=4, method="channel", quantize_embeddings="siglip2" not in name).quantize_model(model)
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert equal(quantized, loaded)
    loaded.to("cpu")  # and nothing is left on the meta device


@pytest.mark.parametrize("name", each(HUGGINGFACE))
def test_every_family_is_quantized_while_it_is_loaded(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    settings = {"bits": 4, "method": "channel" if name in SEEN else "tensor"}
    quantized = ViTQuantizer(**settings).quantize_model(type(model).from_pretrained(tmp_path))
    loaded = type(model).from_pretrained(tmp_path, quantization_config=FairseqViTConfig(**settings))
    assert equal(quantized, loaded)
    assert not any(hasattr(module, "_is_hf_initialized") for n, module in loaded.named_modules() if n.endswith("fc1"))


def test_what_is_quantized_while_loading_is_saved_and_loaded(float_folder, tmp_path, pixels):
    settings = FairseqViTConfig(
        bits=4, method="channel", quantize_embeddings=True, overrides={"classifier": {"bits": 8}}
    )
    model = AutoModelForImageClassification.from_pretrained(float_folder, quantization_config=settings)
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert equal(model, loaded)
    assert loaded.classifier.config.bits == 8
    assert torch.equal(model(pixels).logits, loaded(pixels).logits)


def test_few_float_weights_are_there_at_any_time(tmp_path, monkeypatch):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=8, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    seen = []

    def advance(self):
        original(self)
        layers = [m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and not m.weight.is_meta]
        seen.append(len(layers))

    original = WhileLoading.advance
    monkeypatch.setattr(WhileLoading, "advance", advance)
    transformers.ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, quantization_config=FairseqViTConfig(bits=4, method="channel")
    )
    assert len(seen) == 48
    assert 1 <= max(seen) <= 12  # of two blocks


def test_a_bare_model_from_the_folder_of_a_classifier(folder, pixels):
    quantized, path = folder
    bare = AutoModel.from_pretrained(path, add_pooling_layer=False)
    assert torch.equal(bare(pixels).last_hidden_state, quantized.vit(pixels).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder, float_folder, device_map, pixels):
    quantized, path = folder
    loaded = AutoModelForImageClassification.from_pretrained(path, device_map=device_map)
    made = AutoModelForImageClassification.from_pretrained(
        float_folder, device_map=device_map, quantization_config=FairseqViTConfig(bits=4, method="channel")
    )
    for model in (loaded, made):
        assert torch.equal(model.to("cpu")(pixels).logits, quantized(pixels).logits)


def test_dtypes(folder, pixels):
    quantized, path = folder
    loaded = AutoModelForImageClassification.from_pretrained(path, dtype=torch.bfloat16)
    assert loaded(pixels.bfloat16()).logits.dtype == torch.bfloat16
    assert loaded.classifier.scale.dtype == torch.float32
    assert torch.equal(loaded.classifier.integers(), quantized.classifier.integers())
    assert loaded.float().half()(pixels.half()).logits.isfinite().all()


def test_shards(folder, tmp_path):
    quantized, _ = folder
    quantized.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert equal(quantized, AutoModelForImageClassification.from_pretrained(tmp_path / "shards"))


def test_a_variant(folder, tmp_path):
    quantized, _ = folder
    quantized.save_pretrained(tmp_path / "variant", variant="int4")
    assert (tmp_path / "variant" / "model.int4.safetensors").is_file()
    if told.VERSION_5:
        assert equal(quantized, AutoModelForImageClassification.from_pretrained(tmp_path / "variant", variant="int4"))
    else:
        with pytest.raises(ValueError, match="not by subfolder= or variant="):
            AutoModelForImageClassification.from_pretrained(tmp_path / "variant", variant="int4")


WITHOUT = """
import sys
from transformers import AutoModel, AutoModelForImageClassification
for kind in (AutoModelForImageClassification, AutoModel):
    try:
        kind.from_pretrained(sys.argv[1])
    except RuntimeError as error:
        print("stopped")
assert "fairseq" not in sys.modules
"""


@Beside
def without_this_library():
    path = new_folder("without this library")
    ViTQuantizer(bits=4, method="channel").quantize_model(build("vit")).save_pretrained(path)
    return lambda: (path, python("-c", WITHOUT, path, check=True))


@without_this_library
def test_without_this_library_loading_stops():
    path, done = without_this_library.result()
    assert done.stdout.split() == ["stopped", "stopped"]
    what_to_do = "import fairseq.models.vit_quantization before from_pretrained"
    assert f"Unknown quantization type, got fairseq_vit ({what_to_do})" in done.stderr
    assert json.loads((path / "config.json").read_text())["quantization_config"]["load_with"] == what_to_do


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["description"].update(format_version=3), "format_version 3 is later than 2"),
        (lambda c: c["description"].update(format_version=2), "format_version 2 goes with integer=None"),
        (lambda c: c["description"].pop("layers"), "layers must map"),
        (lambda c: c["description"]["layers"]["classifier"].update(activation_bits=6), "config.json describes another"),
        (lambda c: c["description"]["layers"].pop("classifier"), "config.json describes another"),
        (lambda c: c.update(description=3), "must be a mapping"),
        (lambda c: c.update(colour="red"), "unknown setting 'colour'"),
    ],
    ids=range(7),
)
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, change, message):
    change_config(folder[1], change)
    with pytest.raises((TypeError, ValueError), match=message):
        AutoModelForImageClassification.from_pretrained(folder[1])


def test_changed_entries_of_the_config_never_load_other_numbers(folder):
    quantized, path = folder
    text = (path / "config.json").read_text()
    start, rng, refused = text.index('"quantization_config"'), random.Random(0), 0
    end = text.index("transformers_version")
    for _ in range(50):
        bad = bytearray(text.encode())
        bad[rng.randrange(start + 30, end - 2)] = rng.choice(b'0123456789"ae,:}')
        (path / "config.json").write_bytes(bad)
        try:
            loaded = AutoModelForImageClassification.from_pretrained(path)
        except (OSError, RuntimeError, TypeError, ValueError):  # of another quant_method, the guard stops it
            refused += 1
        else:
            assert equal(loaded, quantized)
    assert refused > 25


def test_damaged_weights_are_refused(folder):
    _, path = folder
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1000] ^= 4
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: .* is damaged"):
        AutoModelForImageClassification.from_pretrained(path)
    (path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises((OSError, ValueError, SafetensorError)):  # transformers 4 reads its header first
        AutoModelForImageClassification.from_pretrained(path)


def test_another_number_of_classes_is_refused(folder):
    _, path = folder
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|size mismatch"):  # as of a float model
        AutoModelForImageClassification.from_pretrained(path, num_labels=5)


def test_weights_that_are_not_finite_are_refused_while_loading(tiny_vit, tmp_path):
    with torch.no_grad():
        next(p for n, p in tiny_vit.named_parameters() if "fc2.weight" in n or "output.dense.weight" in n)[0, 0] = (
            torch.nan
        )
    tiny_vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=FairseqViTConfig(bits=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"speed": 3}, "unknown setting 'speed'"),
        ({"activations": "static"}, "needs images"),
        ({"execution": "emulated"}, "execution='packed'"),
        ({"engine": "warp"}, "engine"),
        ({"overrides": {"*none*": {"bits": 8}}}, "matches no selected layer"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(float_folder, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AutoModelForImageClassification.from_pretrained(float_folder, quantization_config=FairseqViTConfig(**settings))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["classifier"], lambda name: name == "classifier"),
        (["vit"], lambda name: name.startswith("vit.")),
        (["fc1", "intermediate.dense"], lambda name: name.endswith(("fc1", "intermediate.dense"))),
        (["lassifier"], lambda name: name == "classifier"),
        (["vit.layernorm"], lambda name: False),
        (["layers.0", "layer.0"], lambda name: ".0." in name),
        (["ayers.0", "ayer.0"], lambda name: transformers.__version__ < "5" and ".0." in name),
        ([], lambda name: False),
    ],
    ids=range(8),
)
def test_modules_to_not_convert(float_folder, tmp_path, names, kept):
    known = [name for name, _ in ViTForImageClassification.from_pretrained(float_folder).named_modules()]
    names = [name for name in names if any(module.endswith(name) or module.startswith(name) for module in known)]
    settings = FairseqViTConfig(bits=4, method="channel", modules_to_not_convert=names)
    model = AutoModelForImageClassification.from_pretrained(float_folder, quantization_config=settings)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | PackedLinear)}
    assert {name for name, layer in linear.items() if type(layer) is torch.nn.Linear} == set(filter(kept, linear))
    model.save_pretrained(tmp_path / "again")
    assert equal(model, AutoModelForImageClassification.from_pretrained(tmp_path / "again"))


def test_modules_to_not_convert_are_names_that_there_are(float_folder):
    with pytest.raises(ValueError, match="'lm_head' matches no module of ViTForImageClassification"):
        AutoModelForImageClassification.from_pretrained(
            float_folder, quantization_config=FairseqViTConfig(modules_to_not_convert=["lm_head"])
        )
    for wrong in ("classifier", [""], [3], {"classifier": 1}):
        with pytest.raises(TypeError, match="must be a list of names"):
            FairseqViTConfig(modules_to_not_convert=wrong)


def test_a_config_goes_through_json(recwarn):
    config = FairseqViTConfig(
        bits=4, weight_storage="unpacked", exclude=["*fc1"], modules_to_not_convert=["classifier"], engine="layers"
    )
    said = json.loads(json.dumps(config.to_dict()))
    assert said["resident"] == "unpacked"  # as earlier versions of this library call it
    again = FairseqViTConfig.from_dict(said)
    assert not recwarn
    assert again.to_dict() == config.to_dict()
    assert again.settings == config.settings
    assert again.modules_to_not_convert == ["classifier"]
    assert not {"exclude", "modules_to_not_convert", "weight_storage"} & FairseqViTConfig(bits=4).to_dict().keys()
    with pytest.warns(DeprecationWarning, match="resident is called weight_storage"):
        assert FairseqViTConfig(resident="unpacked").settings.weight_storage == "unpacked"


def test_engines(float_folder):
    for engine, fused in (("layers", False), ("auto", True)):
        settings = FairseqViTConfig(bits=8, method="channel", engine=engine)
        model = AutoModelForImageClassification.from_pretrained(float_folder, quantization_config=settings)
        assert any(type(m).__name__.startswith("Fused") for m in model.modules()) <= fused


def test_the_model_is_an_ordinary_module_afterwards(folder):
    loaded = AutoModelForImageClassification.from_pretrained(folder[1])
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert not getattr(loaded, name, None)
    assert equal(copy.deepcopy(loaded), loaded)


def test_pipeline(folder):
    quantized, path = folder
    loaded = AutoModelForImageClassification.from_pretrained(path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    for model in (quantized, loaded):
        classify = pipeline("image-classification", model=model, image_processor=processor)
        found = classify(picture, top_k=7)
        logits = quantized(**processor(images=picture, return_tensors="pt")).logits
        assert [entry["label"] for entry in found] == [
            f"LABEL_{i}" for i in logits[0].argsort(descending=True).tolist()
        ]


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": torch.tensor(index % 7)}


def test_trainer_evaluates_and_saves(folder, pixels, tmp_path):
    quantized, path = folder
    loaded = AutoModelForImageClassification.from_pretrained(path)
    for model in (quantized, loaded):
        arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model=model, args=arguments, eval_dataset=Pictures(pixels))
        logits = torch.from_numpy(trainer.predict(Pictures(pixels)).predictions)
        assert torch.equal(logits, quantized(pixels).logits)
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(5) % 7).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.save_model(str(tmp_path / "trained"))
    assert equal(quantized, AutoModelForImageClassification.from_pretrained(tmp_path / "trained"))


def test_a_loaded_model_compiles(folder, pixels):
    loaded = AutoModelForImageClassification.from_pretrained(folder[1])
    with torch.no_grad():
        compiled = torch.compile(loaded, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels).logits, loaded(pixels).logits, rtol=1e-4, atol=1e-4)
