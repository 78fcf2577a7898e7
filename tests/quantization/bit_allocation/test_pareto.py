"""pareto: each point is the model that is quantized so, judged on pictures that were not calibrated on."""

import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.quantization.bit_allocation.pareto import Pareto
from fairseq.quantization.bit_allocation.point import Point
from fairseq.quantization.bit_allocation.twins import stored_bytes


def test_points_are_models(tiny_vit):
    pictures = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    tiny_vit.train().classifier.eval()
    flags = [module.training for module in tiny_vit.modules()]
    found = ViTQuantizer(method="channel").pareto(tiny_vit, pictures, images="all", average_bits=[3.5])
    assert (found.calibrated, found.evaluated) == (12, 4)
    assert [module.training for module in tiny_vit.modules()] == flags
    held_back = torch.arange(16) % 4 == 3
    mixed = found.points[-1]
    for point, settings in ((found.points[1], {"bits": 3}), (mixed, {"overrides": mixed.overrides})):
        quantized = ViTQuantizer(method="channel", **settings).quantize_model(tiny_vit, pictures[~held_back])
        assert point.agreement == compare_models(tiny_vit, quantized, pictures[held_back]).top_k_match
        assert point.bytes == stored_bytes(quantized)
        with torch.no_grad():
            p, q = (m(pictures[held_back]).logits.double().log_softmax(-1) for m in (tiny_vit.eval(), quantized.eval()))
        assert point.error == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-6)
    assert mixed.mixed
    assert 3 < mixed.bits <= 3.5


POINTS = (Point(2, 100, 0.5, 0.9), Point(3, 150, 0.4, 1.0), Point(2.5, 120, 0.75, 0.5, {"a": {"bits": 2}}))


def test_kept_in_a_file(tmp_path):
    found = Pareto("ViT", 400, 24, 8, POINTS)
    found.save(tmp_path / "sizes.json")
    assert Pareto.load(tmp_path / "sizes.json") == found
    assert [point.bytes for point in found.front] == [100, 120]
    assert str(found).splitlines()[2].split() == ["mixed", "2.50", "0.00", "75.0%", "0.5"]
    (tmp_path / "sizes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sizes.json is not what Pareto.save writes"):
        Pareto.load(tmp_path / "sizes.json")


@pytest.mark.parametrize("agreement", [0.5, None])
def test_the_picture(tmp_path, agreement):
    points = (Point(2, 100, agreement, 0.9), Point(3, 150, agreement, 0.1))
    Pareto("ViT", 400, 24, 8, points).plot(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no point to draw"):
        Pareto("ViT", 400, 24, 8, ()).plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
