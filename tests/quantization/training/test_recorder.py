"""What is compared in a model is found by its structure, whatever it is called."""

import pytest
import torch
from families import build, pictures

from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.training.recorder import Recorder, anatomy


@pytest.mark.parametrize("name", ["vit", "swin", "dinov2", "clip-vision", "timm-vit"])
def test_blocks_and_their_queries_and_keys(name):
    model = build(name)
    known = anatomy(model)
    x = pictures(2)
    recorder = Recorder(model, known, features=True, attention=True)
    with torch.no_grad(), recorder:
        model(x)
    assert len(recorder.features) == len(known.blocks) >= 2
    blocks = [block for block in known.blocks if not any(other.startswith(f"{block}.") for other in known.blocks)]
    assert len(recorder.attention) == 2 * len(known.attention) == 2 * len(blocks)  # stages of Swin are blocks, too
    for (query, key, heads), q, k in zip(known.attention, recorder.attention[::2], recorder.attention[1::2]):
        assert query.layer.startswith(known.blocks[0][: known.blocks[0].index(".")])
        assert q.shape == k.shape
        assert q.shape[-1] % heads == 0
        assert (query != key) == (not torch.equal(q, k))
    with torch.no_grad():
        model(x)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_a_student_has_the_anatomy_of_its_teacher(student, tiny_vit):
    assert anatomy(student) == anatomy(tiny_vit)
    assert any(isinstance(m, EmulatedLinear) for m in student.modules())


def test_features_are_what_the_model_itself_calls_hidden_states(tiny_vit, pixels):
    recorder = Recorder(tiny_vit, anatomy(tiny_vit), features=True, attention=False)
    with torch.no_grad(), recorder:
        states = tiny_vit(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(mine, its) for mine, its in zip(recorder.features, states[1:], strict=True))
    assert recorder.attention == []
