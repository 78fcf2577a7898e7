"""Integer-only models in files and folders: the same bits, small, and what is damaged or foreign refused."""

import copy
import io
import pickle
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
from integer_models import EACH, KINDS, PICTURES, made
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.saving import contents
from fairseq.quantization.saving.integer import bits_of


@pytest.fixture(scope="module", params=EACH)
def model(request):
    return made(request.param)


@pytest.fixture(scope="module")
def hub():
    return made("dynamic")


def integers(model):
    return model.integer_logits(model.round_pixels(PICTURES))


def same(one, other):
    """Whether they hold the same integers, and so give the same."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(a.dtype == states[1][name].dtype and torch.equal(a, states[1][name]) for name, a in states[0].items())
    assert repr(one) == repr(other)
    return torch.equal(integers(one), integers(other))


def test_one_file(model, tmp_path):
    ViTQuantizer.save(model, tmp_path / "vit.safetensors", {"note": 1})
    assert same(model, ViTQuantizer.load(tmp_path / "vit.safetensors"))
    assert contents.inspect([tmp_path / "vit.safetensors"]).description["information"] == {"note": 1}


@pytest.mark.parametrize("kind", ["4 bits", "timm, 3 bits"])
def test_narrow_weights_are_packed_in_the_file(kind, tmp_path):
    model = made(kind)
    bits = KINDS[kind][1]["bits"]
    ViTQuantizer.save(model, tmp_path / "vit.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "vit.safetensors")
    weight = model.blocks[0].fc1.weight
    assert bits_of(weight) == bits
    assert "integer.blocks.0.fc1.weight" not in stored
    assert stored["integer.blocks.0.fc1.weight_codes"].nbytes == weight.numel() * bits // 8
    assert torch.equal(stored["integer.blocks.0.fc1.weight_low"][:, 0], weight.amin(-1))
    assert "integer.patches.weight" in stored  # of 8 bits


def test_of_a_model_it_gets_class_and_config(hub, tmp_path):
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(hub, path)
    plain, like = ViTQuantizer.load(path), families.build("vit")
    assert type(plain) is IntegerViT
    loaded = ViTQuantizer.load(path, like)
    assert isinstance(loaded, IntegerViT)
    assert isinstance(loaded, ViTForImageClassification)
    assert loaded.config is not like.config
    assert loaded.config.id2label == like.config.id2label
    with pytest.raises(ValueError, match="no fused engine"):
        ViTQuantizer.load(path, like, engine="fused")


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("integer") / "vit"
    hub.save_pretrained(folder, metrics={"top-1 accuracy": 0.5})
    return folder


def test_a_folder(hub, folder):
    loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, ViTForImageClassification)
    assert same(hub, loaded)
    assert loaded.quantization_information == {**hub.quantization_information, "metrics": {"top-1 accuracy": 0.5}}
    guard = safetensors.torch.load_file(folder / "model.safetensors")["classifier.weight"]
    assert guard.shape == (0,)  # at which a loader stops that does not know the format
    card = (folder / "README.md").read_text()
    assert "12 pictures" in card
    assert "| Arithmetic | integers alone" in card


def test_what_was_loaded_is_as_what_was_made(hub, folder, tmp_path):
    loaded = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float16)
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), torch.load(buffer, weights_only=False)]
    for twin in (*twins, copy.deepcopy(loaded).half()):
        twin.save_pretrained(tmp_path / "again", max_shard_size="10KB")
        assert same(hub, AutoModelForImageClassification.from_pretrained(tmp_path / "again"))


def test_transformers_takes_it(hub, folder):
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    labels = torch.arange(6)
    output = loaded(PICTURES[:6], labels=labels)
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert torch.equal(loaded(PICTURES[:6], labels=labels, return_dict=False)[0], output.loss)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    photo = Image.new("RGB", (16, 16), "orange")
    found = pipeline("image-classification", model=loaded, image_processor=processor)(photo)[0]
    assert found["label"] in loaded.config.label2id


def test_another_class_is_refused(folder):
    for kind, settings, message in (
        (AutoModel, {}, "ViTModel has 1 patch embeddings and 0 classifiers"),
        (AutoModelForImageClassification, {"num_hidden_layers": 3}, "blocks=2, and ViTForImageClassification has 3"),
        (AutoModelForImageClassification, {"num_labels": 5}, "classes=7, and ViTForImageClassification has 5"),
        (AutoModelForImageClassification, {"patch_size": 2}, "patches=4x4, and ViTForImageClassification has 2x2"),
        (AutoModelForImageClassification, {"hidden_size": 48}, "width=24, and ViTForImageClassification has 48"),
    ):
        with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
            kind.from_pretrained(folder, **settings)


def test_a_trace_gives_the_same_integers_for_any_batch(model):
    traced = torch.jit.trace(model, PICTURES[:2], check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    expected = list(model.integer_outputs(model.round_pixels(PICTURES)).values())
    for found in (traced, torch.jit.load(buffer)):
        for count in (1, 3, 8):
            output = found(PICTURES[:count])
            got = output[len(expected) :] if isinstance(output, tuple) else [rounded(model, output)]
            assert all(torch.equal(a, b[:count]) for a, b in zip(got, expected, strict=True))


def rounded(model, logits):
    return (logits * 2.0 ** model.logit_exponent.item()).to(torch.int32)


CHANGES = {
    "head.readouts.logits.linear.output.shift": (lambda t: t - 80, "must be from 0 to 61"),
    "blocks.1.fc2.sums": (lambda t: t + 128, "128 times the sums"),
    "blocks.0.norm1.eps": (lambda t: t * 0, "must be from 1 to"),
    "head.readouts.logits.norm.output.multiplier": (
        lambda t: t[:-1],
        r"norm.output.shift must be I32 of shape \(23,\)",
    ),
    "head.readouts.logits.norm.output.shift": (lambda t: t.long(), "norm.output.shift must be I32"),
    "constants": (lambda t: t * 0 + 2**21, "constants must be from"),
    "pixel_step": (lambda t: -t, "pixel_step must be above 0"),
    "blocks.0.fc1.weight": (lambda t: t[:, :-1], "columns|shape"),
    "blocks.1.attention.multiplier": (lambda t: t[:1], "do not go together|shape"),
    "blocks.0.query.weight": (lambda t: t.short(), "must be I8"),
    "head.readouts.logits.exponent": (lambda t: None, "exponent is missing"),
    "blocks.0.activation.entries": (lambda t: t[:, :9], "must be I16 of shape"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_although_checksums_do(hub, tmp_path, name):
    """Somebody has written it so: one sentence, which names the file and the tensor or shape."""
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(hub, path)
    tensors, description = safetensors.torch.load_file(path), contents.inspect([path]).description
    change, message = CHANGES[name]
    changed = change(tensors.pop(f"integer.{name}"))
    if changed is not None:
        tensors[f"integer.{name}"] = changed.contiguous()
    contents.write(tensors, path, description)
    with pytest.raises(ValueError, match=message) as caught:
        ViTQuantizer.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("size"), "no 'size'"),
        (lambda s: s.update(activations="both"), "activations must be one of dynamic, static"),
        (lambda s: s.update(activations="static"), "has no integer.blocks.0.fc2.sums"),
        (lambda s: s.update(size=[17, 16]), "cannot be cut"),
        (lambda s: s.update(size=[20, 16]), "constants are of 17 tokens, and there are 20 patches"),
        (lambda s: s.update(blocks=3), r"blocks.2.*is missing"),
        (lambda s: s.update(blocks=1), "is a layer in one"),
        (lambda s: s.update(blocks=True), "whole number"),
        (lambda s: s.update(output="os.system"), "class of transformers' outputs"),
        (lambda s: s.update(output="transformers.modeling_utils.PreTrainedModel"), "class of transformers' outputs"),
        (lambda s: s.update(spread=[]), "spread must map"),
    ],
    ids=range(11),
)
def test_another_structure_is_refused(hub, tmp_path, change, message):
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(hub, path)
    tensors, description = safetensors.torch.load_file(path), contents.inspect([path]).description
    change(description["integer"])
    contents.write(tensors, path, description)
    with pytest.raises(ValueError, match=message):
        ViTQuantizer.load(path)


def test_damage_is_seen(hub, tmp_path):
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(hub, path)
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[: len(whole) // 2], whole[:-5] + b"\x7f" + whole[-4:], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=str(path)):
            ViTQuantizer.load(path)
    families.build("vit").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="no packed model"):
        ViTQuantizer.load(tmp_path / "float" / "model.safetensors")
    ViTQuantizer.save(ViTQuantizer(bits=8, method="channel").quantize_model(families.build("vit")), path)
    with pytest.raises(ValueError, match="into a float model of the same architecture"):
        ViTQuantizer.load(path)


def test_files_from_before_there_were_other_heads_load():
    """Their structure says nothing of a head, and its parts have other names."""
    folder = Path(__file__).parent / "first_integers"
    stored, expected = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("model", "expected"))
    assert "integer.classifier.weight" in stored
    for loaded in (
        ViTQuantizer.load(folder / "model.safetensors"),
        AutoModelForImageClassification.from_pretrained(folder),
    ):
        assert torch.equal(integers(loaded), expected["integer_logits"])
        assert loaded(PICTURES).integer_logits.shape == (12, 7)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("two heads", lambda h: h["outputs"].update(logits=["cls_logits", "other"]), "output 'logits' must be of one"),
        ("two heads", lambda h: h["outputs"].clear(), "head has no outputs"),
        ("two heads", lambda h: h["readouts"].update(cls_logits=5), "cls_logits must say its tokens"),
        ("two heads", lambda h: h["readouts"].pop("cls_logits"), "must be of one or two readouts"),
        ("two heads", lambda h: h.clear(), "head must have outputs and readouts"),
        ("two heads", lambda h: h["outputs"].update(logits=[["cls_logits"]]), "must be of one or two readouts"),
        ("two heads", lambda h: h["readouts"].update(values=None), "a readout is called 'values'"),
        ("class token and mean", lambda h: h["readouts"]["logits"].update(tokens=[[0, 1], [3, 3]]), "from 4 to 17"),
        ("class token and mean", lambda h: h["readouts"]["logits"].update(tokens=[[0, 1], [1, 18]]), "from 2 to 17"),
        ("class token and mean", lambda h: h["readouts"]["logits"].update(tokens=[[0, 1]]), "do not go together"),
        ("class token and mean", lambda h: h["readouts"]["logits"].update(norm_first=None), "must say its tokens"),
        (
            "attention pooling",
            lambda h: h["readouts"].update(last_hidden_state=None),
            "attention.multiplier is missing",
        ),
    ],
    ids=range(12),
)
def test_another_head_is_refused(tmp_path, kind, change, message):
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(made(kind), path)
    tensors, description = safetensors.torch.load_file(path), contents.inspect([path]).description
    change(description["integer"]["head"])
    contents.write(tensors, path, description)
    with pytest.raises(ValueError, match=message):
        ViTQuantizer.load(path)
