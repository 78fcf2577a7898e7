"""compare_outputs: each measure on values made by hand, and what it says of whole models."""

import math
from types import SimpleNamespace

import other_heads
import pytest
import torch
from torch import nn

from fairseq.models.vit_quantization import compare_outputs
from fairseq.quantization.evaluation.outputs import ERROR, SEGMENTATION, least_kept


class Says(nn.Module):
    """Returns, for each picture, the entry that its first pixel numbers."""

    def __init__(self, labels=None, **outputs):
        super().__init__()
        self.outputs, self.config = outputs, SimpleNamespace(num_labels=labels)

    def forward(self, pixel_values):
        rows = pixel_values[:, 0, 0, 0].long()
        return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in self.outputs.items()}


def pictures(count):
    return torch.arange(float(count)).view(count, 1, 1, 1).expand(count, 1, 2, 2)


def found(labels=None, batch_size=None, **pairs):
    """{output: comparison} of two models of these outputs, each a pair."""
    count = len(next(iter(pairs.values()))[0])
    models = [Says(labels, **{name: pair[i] for name, pair in pairs.items()}) for i in (0, 1)]
    return {row.output: row for row in compare_outputs(*models, pictures(count), batch_size)}


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_top1_and_relative_error(batch_size):
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    got = torch.tensor([[4.0, 3.0], [1.0, 0.0], [0.0, 2.0]])
    row = found(logits=(expected, got), batch_size=batch_size)["logits"]
    assert (row.measure, row.value, row.kept) == ("top-1 match", pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert row.relative_error == pytest.approx(math.sqrt(2 / 30))


def test_nan_keeps_no_class():
    expected, got = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.nan, 0.0]])
    assert found(logits=(expected, got))["logits"].value == 0


def test_padding_by_minus_infinity_is_no_difference():
    padded = torch.tensor([[[1.0, 0.0, -math.inf], [0.0, 1.0, -math.inf]]])
    row = found(logits=(padded, padded))["logits"]
    assert (row.value, row.relative_error) == (1, 0)


@pytest.mark.parametrize("name", ["logits", "predicted_depth", "pred_masks", "heatmaps", "feature_maps"])
def test_what_is_not_a_number_is_lost_wherever_it_is(name):
    values = torch.rand(1, 2, 4, 4) + 1
    values[..., 0, 0] = 3  # argmax of what is not a number is the first place too
    other = torch.rand(1, 8)
    rows = found(first=(other, other), **{name: (values, torch.full_like(values, math.nan))}).values()
    assert least_kept(list(rows)) == 0
    rows = found(**{name: (values, torch.full_like(values, math.nan))}, last=(other, other)).values()
    assert least_kept(list(rows)) == 0


def test_nothing_to_look_at_is_left_out():
    masks, other = torch.full((1, 1, 2, 2), -1.0), torch.tensor([[1.0, 0.0]])
    rows = list(found(pred_masks=(masks, masks), last=(other, torch.tensor([[1.0, 1.0]]))).values())
    assert math.isnan(rows[0].kept)
    assert least_kept(rows) == pytest.approx(0.5**0.5)
    assert math.isnan(least_kept(rows[:1]))


def test_two_outputs_of_zeros_are_the_same():
    assert found(embeds=(torch.zeros(2, 3), torch.zeros(2, 3)))["embeds"].value == 1


def test_a_map_without_classes_has_none():
    maps = torch.rand(1, 2, 2)  # as large as the pictures
    assert found(logits=(maps, maps))["logits"].measure == "cosine"


def test_a_prompt_more_than_labels_is_no_missing_object():
    """OWL-ViT's config has two labels, whatever it is asked for."""
    unsure = torch.full((1, 3, 3), -9.0)
    models = [Says(2, logits=unsure, pred_boxes=BOXES) for _ in (0, 1)]
    for model in models:
        model.config.text_config = None
    rows = {row.output: row for row in compare_outputs(*models, pictures(1))}
    assert rows["pred_boxes"].value == 1
    far = Says(2, logits=unsure, pred_boxes=torch.cat([BOXES[:, :1], BOXES[:, 1:] / 9], 1))
    far.config.text_config = None
    rows = {row.output: row for row in compare_outputs(models[0], far, pictures(1))}
    assert rows["pred_boxes"].value == 1  # it counts the best box, which is where it was


@pytest.mark.parametrize("batch_size", [None, 1])
def test_mean_iou_is_of_classes_over_all_pictures(batch_size):
    def maps(*rows):
        return nn.functional.one_hot(torch.tensor(rows), 4).permute(0, 2, 1)[..., None].float()

    # class 0: 1 of 3; class 1: 3 of 5; class 2 only in the second: 0 of 1; class 3 nowhere, and does not count
    expected = maps((0, 0, 1, 1), (1, 1, 1, 0))
    got = maps((0, 1, 1, 1), (1, 1, 2, 1))
    row = found(logits=(expected, got), batch_size=batch_size)["logits"]
    iou = {0: 1 / 3, 1: 4 / 7, 2: 0.0}
    assert row.measure == "mean IoU"
    assert row.value == pytest.approx(sum(iou.values()) / 3)


def test_masks_of_one_class():
    expected = torch.tensor([[[[[1.0, 1.0, -1.0]]]], [[[[-1.0, -1.0, -1.0]]]]])
    got = torch.tensor([[[[[1.0, -1.0, -1.0]]]], [[[[-1.0, -1.0, -1.0]]]]])
    row = found(pred_masks=(expected, got))["pred_masks"]
    assert (row.measure, row.value) == ("IoU of masks", 0.5)  # the empty one in both does not count


def test_depth_counts_where_there_is_some():
    expected, got = torch.tensor([[[2.0, 4.0, 0.0]]]), torch.tensor([[[1.0, 5.0, 9.0]]])
    row = found(predicted_depth=(expected, got))["predicted_depth"]
    assert (row.measure, row.value, row.kept) == (ERROR, pytest.approx(0.375), pytest.approx(0.625))


def test_key_points_may_move_by_a_pixel():
    expected, got = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    for point, (before, after) in enumerate((((1, 1), (2, 2)), ((0, 3), (1, 0)), ((2, 2), (2, 2)))):
        expected[0, point][before], got[0, point][after] = 1, 1
    assert found(heatmaps=(expected, got))["heatmaps"].value == pytest.approx(2 / 3)


BOXES = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]])
KINDS = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])  # two objects, and "no object"


def matched(boxes, logits, expected=KINDS, labels=2):
    return found(labels, logits=(expected, logits), pred_boxes=(BOXES, boxes))["pred_boxes"]


def test_boxes_match_whichever_query_gives_them():
    order = [1, 0, 2]
    row = matched(BOXES[:, order], KINDS[:, order])
    assert (row.measure, row.value) == ("matched boxes", 1)


def test_boxes_of_another_class_or_place_do_not():
    assert matched(BOXES, KINDS[:, [1, 0, 2]]).value == 0
    moved = BOXES.clone()
    moved[0, 0, 0] += 0.1  # half of its width: an IoU of a third
    assert matched(moved, KINDS).value == 0.5
    moved[0, 0, 0] -= 0.05  # a quarter of its width: an IoU of 0.6
    assert matched(moved, KINDS).value == 1


def test_a_box_counts_once():
    twice = BOXES.clone()
    twice[0, 1] = twice[0, 0]
    kinds = KINDS.clone()
    kinds[0, 1] = kinds[0, 0]
    row = found(2, logits=(kinds, KINDS), pred_boxes=(twice, BOXES))["pred_boxes"]
    assert row.value == 0.5


def test_without_a_class_for_no_object_the_score_counts_or_the_best_box():
    sure, unsure = torch.tensor([[[2.0, -9.0], [-9.0, 2.0], [-9.0, -9.0]]]), torch.full((1, 3, 2), -9.0)
    unsure[0, 1, 1] = -8
    other = unsure.clone()
    other[0, 1] = torch.tensor([-8.0, -9.0])
    assert matched(BOXES, sure, sure).value == 1
    assert matched(BOXES, unsure, unsure).value == 1
    assert matched(BOXES, other, unsure).value == 0


def test_classes_and_masks_of_queries_make_a_map():
    classes = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    masks = torch.tensor([[[[5.0, -5.0]], [[-5.0, 5.0]]]])
    rows = found(class_queries_logits=(classes, classes), masks_queries_logits=(masks, -masks))
    assert rows[SEGMENTATION].measure == "mean IoU"
    assert rows[SEGMENTATION].value == 0
    assert found(class_queries_logits=(classes, classes), masks_queries_logits=(masks, masks))[SEGMENTATION].value == 1


def test_everything_else_by_its_cosine_and_inner_tensors_by_name():
    maps = (torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    other = (torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 3.0]]))
    first, second = (Says(feature_maps=value, hidden_states=value, loss=torch.ones(1)) for value in (maps, other))
    rows = {row.output: row for row in compare_outputs(first, second, pictures(1))}
    assert rows.keys() == {"feature_maps[0]", "feature_maps[1]"}
    assert [row.measure for row in rows.values()] == ["cosine"] * 2
    assert rows["feature_maps[1]"].value == pytest.approx(24 / 25)


def test_models_that_do_not_match():
    first, second = Says(logits=torch.ones(1, 3)), Says(logits=torch.ones(1, 4))
    with pytest.raises(ValueError, match="the models do not match"):
        compare_outputs(first, second, pictures(1))
    with pytest.raises(ValueError, match="no floating tensor"):
        compare_outputs(Says(loss=torch.ones(1)), Says(loss=torch.ones(1)), pictures(1))
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1"):
        compare_outputs(first, first, pictures(1), 0)
    with pytest.raises(TypeError, match="batch_size is for a tensor"):
        compare_outputs(first, first, {"pixel_values": pictures(1)}, 1)


@pytest.mark.parametrize(
    ("name", "measures"),
    {
        "dpt": {"predicted_depth": ERROR},
        "segformer": {"logits": "mean IoU"},
        "yolos": {"logits": "top-1 match", "pred_boxes": "matched boxes", "last_hidden_state": "cosine"},
        "sam": {"iou_scores": "cosine", "pred_masks": "IoU of masks"},
        "vitpose": {"heatmaps": "key points kept"},
        "backbone-dinov2": {"feature_maps[0]": "cosine", "feature_maps[1]": "cosine"},
    }.items(),
)
def test_a_model_is_itself(name, measures):
    model = other_heads.build(name)
    rows = compare_outputs(model, model, other_heads.pictures(name))
    assert {row.output: row.measure for row in rows} == measures
    assert all(row.relative_error == 0 and row.kept == pytest.approx(1) for row in rows)
