"""Replay: blocks before the layer do not run again, and where that would be wrong, all of them do."""

import pytest
from rounded import CHANNEL, directly

from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.bit_allocation.sensitivity import measure, measure_twins
from fairseq.quantization.bit_allocation.twins import Twins


def test_blocks_before_the_layer_do_not_run_again(tiny_vit, pixels, monkeypatch):
    runs = []
    layer_class = type(tiny_vit.get_submodule(block_of(next(iter(linear_layers(tiny_vit))))))
    forward = layer_class.forward

    def counted(self, *args, **keywords):
        runs.append(self)
        return forward(self, *args, **keywords)

    twins = Twins(tiny_vit, pixels, CHANNEL, choices=(4, 8))
    monkeypatch.setattr(layer_class, "forward", counted)
    measure_twins(twins, pixels)
    # all at their widest: 2, then 1 to check the second's start, 0 the head's; 6 layers by 1 width from either block
    assert len(runs) == 2 + 1 + 6 * 2 + 6


def test_a_model_whose_blocks_read_more_than_the_one_before_is_run_as_a_whole(tiny_vit, pixels):
    blocks = [m for name, m in tiny_vit.named_modules() if block_of(f"{name}.x") == name]
    assert len(blocks) == 2
    first = []
    blocks[0].register_forward_hook(lambda m, args, y: first.append(args[0]))
    tiny_vit.classifier.register_forward_pre_hook(lambda m, args: (args[0] + first.pop()[:, 0],))
    errors = measure(tiny_vit, pixels[:3], CHANNEL, choices=(3, 8))
    for name in list(errors)[::4]:
        assert errors[name][3] == pytest.approx(directly(tiny_vit, pixels[:3], name, 3), rel=1e-3)
