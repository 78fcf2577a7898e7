"""Names on disk: those of transformers 4.57, whichever version is here."""

import json
from pathlib import Path

import other_heads
import pytest
import torch
import transformers
from families import BUILDERS, build

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.saving import names as naming
from fairseq.quantization.saving.names import names_on_disk

NAMES = json.loads((Path(__file__).parent / "saved" / "names-4.57.json").read_text())
"""The names of every family's tensors in the memory of transformers 4.57.6."""

FUSED_IN_4 = "dinov2-giant"
"""Its gate and up projections are one Linear in transformers 4, two in 5."""
NOT_SAVED_IN_5 = "relative_position_index"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_one_set_of_names(name):
    model = build(name)
    names = names_on_disk(model, model.state_dict())
    assert len(set(names.values())) == len(names)
    expected = {key for key in NAMES[name] if NOT_SAVED_IN_5 not in key}
    found = {key for key in names.values() if NOT_SAVED_IN_5 not in key}
    if name == FUSED_IN_4:
        expected, found = ({k for k in keys if ".mlp." not in k} for keys in (expected, found))
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_called_as_their_tensors(name):
    model = build(name)
    modules = [name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))]
    names, tensors = names_on_disk(model, modules), names_on_disk(model, [f"{module}.weight" for module in modules])
    assert {module: f"{names[module]}.weight" for module in modules} == {
        module: tensors[f"{module}.weight"] for module in modules
    } or name == FUSED_IN_4


@pytest.mark.parametrize("name", [name for name in BUILDERS if name.startswith("timm")])
def test_other_models_keep_their_names(name):
    pytest.importorskip("timm")
    model = build(name)
    assert names_on_disk(model, model.state_dict()) == {key: key for key in model.state_dict()}


def test_a_model_within_another_has_its_names():
    names = names_on_disk(model := other_heads.build("llava"), model.state_dict())
    places = {name.removeprefix("model.").partition(".")[0] for name in names.values()}
    assert places == {"vision_tower", "multi_modal_projector", "language_model", "lm_head"}
    tower = [name for name in names.values() if "vision_tower" in name]
    assert all(name.startswith("model.vision_tower.vision_model.") for name in tower)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 renames nothing")
@pytest.mark.parametrize("broken", [["_as_of_4_57"], ["_as_of_4_57", "_as_saved"]], ids=["first", "both"])
def test_names_that_would_not_arrive_are_not_used(broken, monkeypatch, tmp_path):
    model = other_heads.build("llava")
    for way in broken:
        monkeypatch.setattr(naming, way, lambda *_: lambda name: f"vision_model.{name}")
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(model)
    assert not any(name.startswith("vision_model.") for name in names_on_disk(model, model.state_dict()).values())
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in quantized.state_dict().items())
