"""What files hold: read whole, under other names, and only together."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.saving.contents import inspect


@pytest.fixture
def folder(tiny_vit, tmp_path):
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit)
    quantized.save_pretrained(tmp_path / "packed", max_shard_size="5KB")
    return tmp_path / "packed"


def test_a_shard_that_is_missing_is_noticed(folder):
    shards = sorted(folder.glob("*.safetensors"))
    found = inspect(shards)
    assert len(found.tensors) == found.description["tensors"]
    with pytest.raises(ValueError, match=r"\d+ tensors, and \d+ are here; a file of it is missing"):
        inspect(shards[:-1])
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = set(load_file(shards[-1]))
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if key not in lost}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a file of it is missing"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_names_above_and_below(folder):
    found = inspect(sorted(folder.glob("*.safetensors")))
    below = found.below("vit.")
    assert len(below.parts) == len(found.parts) - 1  # the classifier is not below
    assert below.above("vit.").parts == {name: part for name, part in found.parts.items() if name != "classifier"}
    key = "encoder.layer.0.output.dense.scale"
    assert below.tensors[key] == found.tensors[f"vit.{key}"]  # the entry knows its name in the file
    assert below.read([key])[key].equal(found.read([f"vit.{key}"])[f"vit.{key}"])
    assert list(found.only(["classifier"]).parts) == ["classifier"]
