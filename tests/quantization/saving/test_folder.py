"""Folders that somebody else made: links, indexes that leave the folder, and sizes that no model has."""

import json
import os
import shutil

import pytest
import torch
import transformers
from families import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from fairseq.cli.loading import load
from fairseq.cli.output import UserError
from fairseq.models.vit_quantization import ViTQuantizer, check_folder
from fairseq.quantization.saving.contents import inspect, write
from fairseq.quantization.saving.folder import INDEX, weight_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """ "float" and "packed" in one file, "sharded" and "float-sharded" in several; not to be written to."""
    folder, model = tmp_path_factory.mktemp("saved"), build("vit")
    packed = ViTQuantizer(bits=4, method="channel").quantize_model(model)
    model.save_pretrained(folder / "float")
    model.save_pretrained(folder / "float-sharded", max_shard_size="20KB")
    packed.save_pretrained(folder / "packed")
    packed.save_pretrained(folder / "sharded", max_shard_size="5KB")
    return folder


def copied(saved, name, tmp_path):
    return shutil.copytree(saved / name, tmp_path / "copy")


def changed(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder, *parts, look=True):
    """By the program, by the look that a person may take, and, if it is packed, by from_pretrained: one sentence."""
    calls = {lambda folder: load(str(folder)): UserError} | ({check_folder: ValueError} if look else {})
    packed = "quantization_config" in (folder / "config.json").read_text()
    if packed and (look or transformers.__version__ >= "5"):  # 4 makes models in memory before it asks
        calls[AutoModelForImageClassification.from_pretrained] = ValueError
    for call, kind in calls.items():
        with pytest.raises(kind) as caught:
            call(folder)
        message = str(caught.value)
        assert "\n" not in message
        assert str(folder) in message
        assert all(part in message for part in parts), message


@pytest.mark.parametrize("kind", ["sharded", "float-sharded"])
@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_leaves_the_folder(saved, tmp_path, kind, absolute):
    folder = copied(saved, kind, tmp_path)
    shard = weight_files(folder)[0]
    moved = shard.rename(tmp_path / shard.name)  # all would be well with it
    to = str(moved) if absolute else f"../{shard.name}"
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    changed(folder / INDEX, weight_map={key: to if name == shard.name else name for key, name in names.items()})
    refused(folder, "is no name of a .safetensors file in this folder", to[:40])


@pytest.mark.parametrize("names", [{"a": 5}, {"a": "b.bin"}, {"a": "b\0.safetensors"}, {"a": ["x"]}, {}, []], ids=str)
def test_an_index_that_is_none(saved, tmp_path, names):
    folder = copied(saved, "sharded", tmp_path)
    changed(folder / INDEX, weight_map=names)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        check_folder(folder)


@pytest.mark.parametrize("kind", ["packed", "float"])
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1000, got 1000000000"),
        ({"hidden_size": 10**18}, "hidden_size must be at most 1099511627776"),
        ({"image_size": 40_000, "patch_size": 1}, "they do not belong together"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has(saved, tmp_path, kind, changes, part):
    """What is not in the file would be made up in memory, of the size that config.json says."""
    folder = copied(saved, kind, tmp_path)
    changed(folder / "config.json", **changes)
    file = folder / "model.safetensors"
    gone, tensors = "vit.embeddings.position_embeddings", load_file(file)
    del tensors[gone]
    if kind == "packed":
        description = inspect([file]).description | {"tensors": len(tensors)}
        write(tensors, file, description)
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        changed(folder / "config.json", quantization_config={**said, "description": description})
    else:
        save_file(tensors, file, {"format": "pt"})
    refused(folder, part, look="together" not in part)


def test_large_models_and_the_numbers_of_others_are_no_mistake(saved, tmp_path):
    folder = copied(saved, "packed", tmp_path)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings["description"]["information"]["bytes_before"] = 5 * 10**9
    (folder / "tokenizer.json").symlink_to("nothing")  # as in a cache that is filled in part
    changed(folder / "config.json", quantization_config=settings, some_id=2**32 - 1)
    check_folder(str(folder))


def test_labels_that_would_fill_the_memory(saved, tmp_path):
    folder = copied(saved, "packed", tmp_path)
    changed(folder / "config.json", num_labels=10**9)
    with pytest.raises(UserError, match="num_labels must be at most 1000000"):
        load(str(folder))


def test_links_of_a_cache_are_followed_and_others_refused(saved, tmp_path, pixels):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    shutil.copytree(saved / "packed", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(saved / "packed").eval()(pixels).logits
        assert torch.equal(load(str(snapshot)).model(pixels).logits, expected)
        assert torch.equal(AutoModelForImageClassification.from_pretrained(snapshot).eval()(pixels).logits, expected)
    os.mkfifo(snapshot / "preprocessor_config.json")
    with pytest.raises(UserError, match=r"preprocessor_config\.json must be a plain file; it is a pipe"):
        load(str(snapshot))
    os.remove(snapshot / "preprocessor_config.json")
    os.remove(snapshot / "config.json")
    (snapshot / "config.json").symlink_to("config.json")
    with pytest.raises((UserError, OSError)):
        load(str(snapshot))


def test_a_layer_without_tensors_is_refused(saved, tmp_path):
    file = copied(saved, "packed", tmp_path) / "model.safetensors"
    description = inspect([file]).description
    description["layers"]["vit.forward"] = {"bits": 4}
    write(load_file(file), file, description)
    with pytest.raises(ValueError, match=r"'vit\.forward' is described as packed, and has no tensors"):
        inspect([file])


def test_a_header_that_is_longer_than_any(saved, tmp_path):
    file = copied(saved, "packed", tmp_path) / "model.safetensors"
    os.truncate(file, 2**30)  # sparse
    with file.open("r+b") as opened:
        opened.write((2**29).to_bytes(8, "little"))
    for kind in ("packed", "float"):
        with pytest.raises(ValueError, match="its header says that it has 536870912 bytes"):
            inspect([file]) if kind == "packed" else check_folder(file.parent)
