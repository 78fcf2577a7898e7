"""Parts and derivatives of packed models: each saves and loads the weights that it has, or says that it cannot."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import transformers
from beside import Beside, new_folder, python
from families import BUILDERS, build, each, pictures, shortened
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Backbone,
    PreTrainedModel,
    VisionEncoderDecoderModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from fairseq.models.vit_quantization import FairseqViTConfig, ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.engine.fused_block import FusedBlock
from fairseq.quantization.saving.description import packed_parts

FAMILIES = [
    name
    for name in BUILDERS
    if not name.startswith("timm") and sum(isinstance(module, PreTrainedModel) for module in build(name).modules()) > 1
]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def quantized(name="vit", **settings):
    return ViTQuantizer(**{"bits": 4, "method": "channel", **settings}).quantize_model(build(name))


def equal(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(a, b) for a, b in zip(state.values(), others.values()))


def inner(model):
    """The models within a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel) and name}


@pytest.mark.parametrize("name", each(FAMILIES))
def test_every_part_of_every_family_comes_back(name, tmp_path):
    model = build(name)
    towers = "all" if hasattr(model, "get_text_features") else "vision"
    whole = ViTQuantizer(bits=4, method="channel", towers=towers).quantize_model(model)
    for path, part in inner(whole).items():
        if type(part).__name__ == "SwinEncoder":  # no class that from_pretrained could make
            continue
        part.save_pretrained(tmp_path / path)
        loaded = type(part).from_pretrained(tmp_path / path, **as_made(part))
        assert equal(part, loaded), path


def as_made(part):
    """What a class has to be told that is not in a config."""
    settings = {"add_pooling_layer": False} if getattr(part, "pooler", 0) is None else {}
    if "use_mask_token" in inspect.signature(type(part)).parameters and part.embeddings.mask_token is not None:
        settings["use_mask_token"] = True
    return settings


def test_outputs_of_a_part_are_those_in_memory(tmp_path, pixels):
    whole = quantized()
    whole.vit.save_pretrained(tmp_path)
    for kind in (ViTModel, AutoModel):
        loaded = kind.from_pretrained(tmp_path, add_pooling_layer=False)
        assert torch.equal(loaded(pixels).last_hidden_state, whole.vit(pixels).last_hidden_state)
        assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 12
    assert "quantization_config" not in whole.config.to_dict()


def test_a_part_of_a_loaded_model_saves_itself(tmp_path, pixels):
    quantized().save_pretrained(tmp_path / "whole", metrics={"top-1": 0.5})
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    loaded.vit.save_pretrained(tmp_path / "part")
    again = AutoModel.from_pretrained(tmp_path / "part", add_pooling_layer=False)
    assert torch.equal(again(pixels).last_hidden_state, loaded.vit(pixels).last_hidden_state)
    assert "top-1" not in (tmp_path / "part" / "README.md").read_text()  # that was measured of the whole
    again.save_pretrained(tmp_path / "again")
    assert equal(again, AutoModel.from_pretrained(tmp_path / "again", add_pooling_layer=False))


def through_pickle(part):
    return pickle.loads(pickle.dumps(part))


def through_a_file(part):
    buffer = io.BytesIO()
    torch.save(part, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle, through_a_file])
@pytest.mark.parametrize("part_first", [True, False])
def test_copies_of_parts_save_themselves(duplicate, part_first, tmp_path):
    whole = quantized()
    part = duplicate(whole.vit) if part_first else duplicate(whole).vit
    with torch.no_grad():
        part.layernorm.weight.fill_(3)
    part.save_pretrained(tmp_path)
    assert equal(part, ViTModel.from_pretrained(tmp_path, add_pooling_layer=False))


OPENED = """
import torch
torch.load("vit.pt", weights_only=False).save_pretrained("out")
model, x, expected = torch.load("whole.pt", weights_only=False)
with torch.no_grad():
    assert torch.equal(model(x).logits, expected)
"""


@Beside
def opened():
    whole, x, path = quantized(), pictures(5), new_folder("pickled")
    torch.save(whole.vit, path / "vit.pt")
    with torch.no_grad():
        torch.save((whole, x, whole(x).logits), path / "whole.pt")
    return lambda: (whole, path / "out", python("-c", OPENED, cwd=path))


@opened
def test_what_was_pickled_saves_itself_and_runs_where_nothing_was_imported():
    """The part first, which has to bring all that it needs; then the whole, whose blocks are fused if they can be."""
    whole, path, done = opened.result()
    assert done.returncode == 0, done.stderr
    assert any(isinstance(module, FusedBlock) for module in whole.modules()) == bool(native.levels())
    assert equal(whole.vit, ViTModel.from_pretrained(path, add_pooling_layer=False))


def test_a_part_in_which_nothing_is_packed_is_saved_in_float(tmp_path):
    whole = quantized("vit", overrides={"vit.*": {"skip": True}})
    assert not packed_parts(whole.vit)
    whole.save_pretrained(tmp_path / "whole")
    for model in (whole, AutoModelForImageClassification.from_pretrained(tmp_path / "whole")):
        model.vit.save_pretrained(tmp_path / "part")
        assert "quantization_config" not in (tmp_path / "part" / "config.json").read_text()
        assert equal(whole.vit, ViTModel.from_pretrained(tmp_path / "part", add_pooling_layer=False))
    assert model.config.quantization_config.quant_method == "fairseq_vit"  # the whole has it still


def test_the_encoder_of_an_encoder_decoder(tmp_path, pixels):
    whole = quantized("encoder-decoder")
    whole.encoder.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state, whole.encoder(pixels).last_hidden_state
    )
    whole.decoder.save_pretrained(tmp_path / "text")
    assert "quantization_config" not in (tmp_path / "text" / "config.json").read_text()


def test_a_model_that_is_built_around_a_packed_part(tmp_path, pixels):
    """Its class is transformers' own, and nobody told it."""
    backbone, classifier = quantized("vit-bare", quantize_classifier=False), build("vit")
    classifier.vit = quantized().vit
    classifier.save_pretrained(tmp_path / "head")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "head")
    assert equal(classifier, loaded)
    assert torch.equal(classifier(pixels).logits, loaded(pixels).logits)
    both = VisionEncoderDecoderModel(encoder=backbone, decoder=build("encoder-decoder").decoder).eval()
    both.save_pretrained(tmp_path / "both")
    assert equal(both, VisionEncoderDecoderModel.from_pretrained(tmp_path / "both"))


def test_parts_of_an_emulated_model_say_what_gets_lost(tmp_path, recwarn):
    emulated = ViTQuantizer(bits=4, execution="emulated").quantize_model(shortened(build("vit")))
    with pytest.warns(UserWarning, match="input_factor, which from_pretrained does not know"):
        copy.deepcopy(emulated.vit).save_pretrained(tmp_path / "lost")
    recwarn.clear()
    ViTQuantizer.dequantize_model(emulated).vit.save_pretrained(tmp_path / "kept")
    assert not recwarn


def test_parts_of_a_dequantized_model_are_float(tmp_path):
    quantized().save_pretrained(tmp_path / "packed")
    plain = ViTQuantizer.dequantize_model(AutoModelForImageClassification.from_pretrained(tmp_path / "packed"))
    plain.vit.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in (tmp_path / "float" / "config.json").read_text()
    assert equal(plain.vit, ViTModel.from_pretrained(tmp_path / "float", add_pooling_layer=False))


def load(kind, path, **settings):
    """A model from a folder, and the names of the weights that were made up."""
    model, info = kind.from_pretrained(path, output_loading_info=True, **settings)
    resized = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return model, {*info["missing_keys"], *resized}


def test_a_packed_backbone_in_a_classifier(tmp_path, pixels):
    backbone = quantized("vit-bare")
    assert isinstance(backbone.pooler.dense, PackedLinear)  # which a classifier has no place for
    backbone.save_pretrained(tmp_path)
    loaded, made_up = load(ViTForImageClassification, tmp_path, num_labels=5)
    assert made_up == {"classifier.weight", "classifier.bias"}
    assert torch.equal(loaded.vit(pixels).last_hidden_state, backbone(pixels).last_hidden_state)
    assert type(loaded.classifier) is torch.nn.Linear
    assert loaded.classifier.weight.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    again = ViTForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again(pixels).logits, loaded(pixels).logits)


def test_a_pooler_that_the_folder_has_not_is_made_up(tmp_path, pixels):
    whole = quantized()
    whole.save_pretrained(tmp_path / "whole")
    whole.vit.save_pretrained(tmp_path / "part")
    for folder in ("whole", "part"):
        loaded, made_up = load(AutoModel, tmp_path / folder)
        assert made_up == {"pooler.dense.weight", "pooler.dense.bias"}
        assert torch.equal(loaded(pixels).last_hidden_state, whole.vit(pixels).last_hidden_state)


def test_another_head(tmp_path, pixels):
    whole = quantized()
    whole.save_pretrained(tmp_path)
    loaded, made_up = load(ViTForMaskedImageModeling, tmp_path)
    assert made_up == {"vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert torch.equal(loaded.vit(pixels).last_hidden_state, whole.vit(pixels).last_hidden_state)


def test_no_head(tmp_path, pixels):
    whole = quantized()
    whole.save_pretrained(tmp_path)
    loaded, made_up = load(AutoModelForImageClassification, tmp_path, num_labels=0)
    assert not made_up
    assert isinstance(loaded.classifier, torch.nn.Identity)
    assert torch.equal(loaded(pixels).logits, whole.vit(pixels).last_hidden_state[:, 0])


@pytest.mark.parametrize("packed_head", [True, False])
def test_a_head_of_another_size(tmp_path, pixels, packed_head):
    whole = quantized(quantize_classifier=packed_head)
    whole.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|size mismatch"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    for kind in (AutoModelForImageClassification, ViTForImageClassification):
        loaded, made_up = load(kind, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
        assert made_up == {"classifier.weight", "classifier.bias"}
        assert loaded.classifier.weight.shape == (5, 24)
        assert 0 < loaded.classifier.weight.std() < 1
        assert torch.equal(loaded.vit(pixels).last_hidden_state, whole.vit(pixels).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    assert equal(loaded, AutoModelForImageClassification.from_pretrained(tmp_path / "again"))
    plain = ViTQuantizer.dequantize_model(loaded)
    plain.save_pretrained(tmp_path / "plain")
    assert equal(plain, AutoModelForImageClassification.from_pretrained(tmp_path / "plain"))


def test_a_packed_layer_without_a_bias_of_another_size(tmp_path):
    whole = quantized("clip-vision-projection")
    whole.save_pretrained(tmp_path)
    kind = type(whole)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|size mismatch"):
        kind.from_pretrained(tmp_path, projection_dim=12)
    loaded, made_up = load(kind, tmp_path, projection_dim=12, ignore_mismatched_sizes=True)
    assert made_up == {"visual_projection.weight"}
    assert loaded.visual_projection.weight.shape == (12, 24)
    assert equal(loaded.vision_model, whole.vision_model)


def test_packed_position_embeddings_of_another_size(tmp_path):
    whole = quantized("vit", quantize_embeddings=True)
    whole.save_pretrained(tmp_path)
    loaded, made_up = load(AutoModelForImageClassification, tmp_path, image_size=24, ignore_mismatched_sizes=True)
    assert made_up == {"vit.embeddings.position_embeddings"}
    assert loaded.vit.embeddings.position_embeddings.shape == (1, 37, 24)
    assert loaded(torch.randn(2, 3, 24, 24)).logits.isfinite().all()


def test_a_new_head_while_quantizing(tmp_path, pixels):
    build("vit").save_pretrained(tmp_path)
    settings = FairseqViTConfig(bits=4, method="channel")
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|size mismatch"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, quantization_config=settings)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, quantization_config=settings
    )
    assert isinstance(loaded.classifier, PackedLinear)
    assert loaded.classifier.out_features == 5
    assert equal(loaded.vit, quantized().vit)


def test_what_has_no_place_within_the_backbone_is_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\..* is packed in it, and the model .* has no such layer"):
        ViTForImageClassification.from_pretrained(tmp_path, num_hidden_layers=1)


def test_a_backbone_for_detectors(tmp_path, pixels):
    whole = quantized("dinov2")
    whole.save_pretrained(tmp_path / "whole")
    whole.dinov2.save_pretrained(tmp_path / "part")
    backbones = [Dinov2Backbone.from_pretrained(tmp_path / name, out_indices=[1, 2]) for name in ("whole", "part")]
    backbones[0].save_pretrained(tmp_path / "backbone")
    backbones.append(Dinov2Backbone.from_pretrained(tmp_path / "backbone"))
    hidden = whole.dinov2(pixels, output_hidden_states=True).hidden_states
    for backbone in backbones:
        assert sum(isinstance(module, PackedLinear) for module in backbone.modules()) == 12
        found = backbone(pixels).feature_maps
        assert torch.equal(found[1], backbones[0](pixels).feature_maps[1])
        expected = whole.dinov2.layernorm(hidden[2])[:, 1:].reshape(5, 4, 4, 24).permute(0, 3, 1, 2)
        torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)


def test_a_tower_loaded_from_the_whole(tmp_path, pixels):
    whole = quantized("clip")
    whole.save_pretrained(tmp_path)
    loaded, made_up = load(transformers.CLIPVisionModel, tmp_path)
    assert not made_up
    expected = whole.vision_model(pixels).last_hidden_state
    assert torch.equal(loaded(pixels).last_hidden_state, expected)
