"""save_pretrained of a packed model: what it writes, whole, and what it refuses."""

import copy
import inspect
import json
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.saving import contents, pretrained


def equal(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(a, b) for a, b in zip(state.values(), others.values()))


@pytest.fixture
def quantized(tiny_vit):
    return ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit)


def test_the_files(quantized, tmp_path):
    folder = tmp_path / "new" / "folder"
    quantized.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["dtype" if "dtype" in config else "torch_dtype"] == "float32"
    said = config["quantization_config"]
    assert said["quant_method"] == f"fairseq_vit ({said['load_with']})"
    assert said["description"] == contents.inspect([folder / "model.safetensors"]).description
    assert "quantization_config" not in quantized.config.to_dict()  # the model in memory is as it was
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.75 * sum(p.numel() * 4 for p in ViTForImageClassification(quantized.config).parameters())


def test_no_path_of_this_machine_is_in_the_files(tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "float")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "float")
    ViTQuantizer(bits=8).quantize_model(model).save_pretrained(tmp_path / "packed")
    for path in (tmp_path / "packed").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_model_card(quantized, tmp_path, pixels):
    quantized.config._name_or_path = "google/vit-base-patch16-224"
    quantized.save_pretrained(tmp_path / "a", metrics={"top-1 accuracy": 0.76412, "data": "1,000 pictures"})
    card = (tmp_path / "a" / "README.md").read_text()
    head = card.split("---")[1]
    for line in ("library_name: transformers", "base_model: google/vit-base-patch16-224", "- 4-bit", "- fairseq_vit"):
        assert f"\n{line}\n" in head
    assert "pipeline_tag: image-classification" in head
    for text in ("13 layers 4-bit channel", "top-1 accuracy | 0.7641", "data | 1,000 pictures", "| none |"):
        assert text in card
    assert "import fairseq.models.vit_quantization" in card
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # what was measured stays known
    assert "top-1 accuracy | 0.7641" in (tmp_path / "b" / "README.md").read_text()


def test_the_card_knows_of_calibration_and_mixed_bits(tiny_vit, pixels, tmp_path):
    quantizer = ViTQuantizer(bits=4, overrides={"classifier": {"bits": 8}})
    with pytest.warns(UserWarning, match="5 pictures"):
        quantized = quantizer.quantize_model(tiny_vit, calibration=pixels)
    quantized.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in ("5 pictures", "12 layers 4-bit tensor, 1 layers 8-bit tensor", "- 8-bit", "4 and 8 bits"):
        assert text in card


def test_a_card_of_somebody_stays(quantized, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    quantized.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_shards_and_their_index(quantized, tmp_path):
    quantized.save_pretrained(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index.values())) == shards
    for shard in shards:
        assert set(load_file(tmp_path / shard)) == {name for name, file in index.items() if file == shard}
    quantized.save_pretrained(tmp_path)  # one file, and the shards are gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_save_that_is_stopped_leaves_the_old_folder(quantized, tmp_path, monkeypatch):
    quantized.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "model_card", stopped)
    (tmp_path / "README.md").unlink()
    before.pop("README.md")
    with pytest.raises(KeyboardInterrupt):
        quantized.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_copies_save_themselves(quantized, tmp_path):
    other = copy.deepcopy(quantized)
    with torch.no_grad():
        other.vit.layernorm.weight.fill_(3)
    other.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["vit.layernorm.weight"].eq(3).all()


def test_a_state_dict_that_is_given_is_what_is_saved(quantized, tmp_path):
    state = {**quantized.state_dict(), "vit.layernorm.weight": torch.full((24,), 5.0)}
    quantized.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.vit.layernorm.weight.eq(5).all()
    assert torch.equal(loaded.classifier.integers(), quantized.classifier.integers())


def test_an_optimized_model_saves_the_same(quantized, tmp_path):
    ViTQuantizer.optimize(quantized, engine="layers").save_pretrained(tmp_path / "layers")
    quantized.save_pretrained(tmp_path / "fused")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("layers", "fused"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_dequantized_saves_as_transformers_does(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    ViTQuantizer.dequantize_model(loaded).save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "float")
    assert type(again.classifier) is torch.nn.Linear
    assert torch.equal(again.classifier.weight, quantized.classifier.dequantize())


def test_what_is_refused(quantized, tiny_vit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        quantized.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="the keys of the packed model"):
        quantized.save_pretrained(tmp_path, state_dict={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="safetensors only"):
        quantized.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="takes no 'speed'"):
        quantized.save_pretrained(tmp_path, speed=3)
    with pytest.raises(ValueError, match="nothing in the model is packed"):
        pretrained.save_pretrained(tiny_vit, tmp_path)
    quantized.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_emulated_model_saves_its_float_weights(tiny_vit, tmp_path):
    emulated = ViTQuantizer(bits=4, method="channel", execution="emulated").quantize_model(tiny_vit)
    emulated.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, tiny_vit.classifier.weight)


def test_an_emulated_model_with_input_factors_says_that_they_get_lost(tiny_vit, tmp_path, recwarn):
    emulated = ViTQuantizer(bits=4, execution="emulated").quantize_model(tiny_vit)
    with pytest.warns(UserWarning, match="does not know"):
        copy.deepcopy(emulated).save_pretrained(tmp_path / "lost")
    plain = ViTQuantizer.dequantize_model(emulated)
    recwarn.clear()
    plain.save_pretrained(tmp_path / "kept")
    assert not recwarn


def test_a_state_dict_without_a_float_tensor_is_saved_without_it(quantized, tmp_path):
    state = quantized.state_dict()
    del state["vit.layernorm.bias"]
    quantized.save_pretrained(tmp_path, state_dict=state)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"vit.layernorm.bias"}
    assert torch.equal(loaded.classifier.integers(), quantized.classifier.integers())
    del state["classifier.scale"]
    with pytest.raises(ValueError, match=r"classifier\.scale is missing"):
        quantized.save_pretrained(tmp_path, state_dict=state)
    state = {**quantized.state_dict(), "vit.layernorm.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"layernorm\.bias must be of shape \(24,\), .* got \(3,\)"):
        quantized.save_pretrained(tmp_path, state_dict=state)


ACCEPTED = {
    "as accelerate does": {"is_main_process": True, "save_function": torch.save, "state_dict": None},
    "as Trainer of 4.57 does": {"state_dict": None, "safe_serialization": True},
    "defaults": {
        "push_to_hub": False, "variant": None, "token": None, "save_peft_format": True, "max_shard_size": "50GB",
        "save_original_format": True, "distributed_checkpoint": False,
    },
    "for the hub": {"token": "t", "repo_id": "me/vit", "private": True, "create_pr": False, "revision": "main"},
}  # fmt: skip


@pytest.mark.parametrize("keywords", ACCEPTED.values(), ids=ACCEPTED)
def test_what_transformers_takes_is_taken(quantized, tmp_path, keywords):
    quantized.save_pretrained(tmp_path, **keywords)
    assert equal(quantized, AutoModelForImageClassification.from_pretrained(tmp_path))


def test_positional_arguments_have_the_places_of_transformers(quantized, tmp_path):
    places = list(inspect.signature(ViTForImageClassification.save_pretrained).parameters)[1:]
    values = {
        "save_directory": tmp_path / "saved", "is_main_process": True, "max_shard_size": "5KB", "variant": "int4",
        "save_function": torch.save, "safe_serialization": True, "push_to_hub": False,
    }  # fmt: skip
    upto = places[: places.index("variant") + 1]
    quantized.save_pretrained(*[values.get(name) for name in upto])
    assert (tmp_path / "saved" / "model.safetensors.index.int4.json").is_file() or len(
        list((tmp_path / "saved").glob("model-*-of-*.int4.safetensors"))
    ) > 1
    quantized.save_pretrained(tmp_path / "none", False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(TypeError, match="positional arguments"):
        quantized.save_pretrained(tmp_path, *places, 1, 2, 3)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("safe_serialization", False, "safetensors only"),
        ("save_original_format", False, "names that every version"),
        ("distributed_checkpoint", True, "by one process"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(quantized, tmp_path, keyword, value, message):
    with pytest.raises(ValueError, match=f"{message}.*leave {keyword} at {not value}"):
        quantized.save_pretrained(tmp_path / "new", **{keyword: value})
    assert not (tmp_path / "new").exists()


def test_accelerate_saves_and_unwraps(quantized, tiny_vit, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(quantized))
    model.save_pretrained(
        tmp_path / "folder", is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )  # fmt: skip
    assert equal(quantized, AutoModelForImageClassification.from_pretrained(tmp_path / "folder"))
    accelerator.save_model(model, tmp_path / "state")
    other = ViTQuantizer(bits=4, method="channel").quantize_model(ViTForImageClassification(tiny_vit.config).eval())
    load_checkpoint_in_model(other, tmp_path / "state")
    assert equal(quantized, other)


class Hub:
    """What HfApi is asked for."""

    calls: ClassVar[list] = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, name, private=None, exist_ok=False):
        self.calls.append(("create", name, private, exist_ok))
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, repo_id, folder_path, **settings):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), settings))


def test_push_to_hub_uploads_the_whole_folder(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    quantized.save_pretrained(tmp_path / "vit-int4", push_to_hub=True, token="t", private=True, commit_message="first")
    assert Hub.calls == [
        ("token", "t"),
        ("create", "vit-int4", True, True),
        ("upload", "me/vit-int4", ["README.md", "config.json", "model.safetensors"], {"commit_message": "first"}),
    ]
