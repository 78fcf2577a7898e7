"""Names on disk: those of transformers 4.57, whichever version is here."""

import json
from pathlib import Path

import pytest
from families import BUILDERS, build

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
