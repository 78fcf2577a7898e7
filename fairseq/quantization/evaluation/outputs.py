"""compare_outputs: how far each output of a quantized model is from the original's, in the measure of its task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.quantization.architectures.forward import call, class_dimension, evaluating, fields_of
from fairseq.quantization.evaluation.compare import moved

SURE = 0.3
"""The score from which a box counts, where each class has a probability of its own."""
OVERLAP = 0.5
"""Of two boxes that are of one object, at least, as their intersection over their union."""
DEEP = 1e-3
"""The share of the largest depth of a picture under which a pixel has no relative error."""
COMMON = ("top-1 match", "cosine")
"""Measures that outputs of classifiers and bare models have."""
ERROR = "absolute relative error"
LEFT_OUT = ("loss", "hidden_states", "attentions", "past_key_values", "cache")
"""Outputs, and ends of their names, that no task reads."""

SEGMENTATION = "segmentation"
"""What is made of the classes and masks of queries."""

Values = Mapping[str, Tensor]
Measured = tuple[Tensor, Tensor]
"""Sums over pictures, of which the first by the second is the measure, averaged where there are several."""


class OutputComparison(NamedTuple):
    """One output of both models.

    Attributes:
        output: its name; "feature_maps[2]" of one among several.
        relative_error: the norm of the difference by that of the original's, over all pictures.
        measure: what ``value`` is: see :func:`compare_outputs`.
        value: 0 to 1; 1 is the same, but for :data:`ERROR`, where 0 is and more than 1 may be. What is not a number
            counts as lost. NaN if there was nothing to look at.
    """

    output: str
    relative_error: float
    measure: str
    value: float

    @property
    def kept(self) -> float:
        """``value``, or of an error what is left to 1."""
        return max(0.0, 1 - self.value) if self.measure == ERROR else self.value


def least_kept(rows: Sequence[OutputComparison]) -> float:
    """The least of what is kept, of those outputs in which there was something to look at; NaN if in none."""
    return min((row.kept for row in rows if not math.isnan(row.kept)), default=math.nan)


def compare_outputs(
    original: nn.Module, quantized: nn.Module, inputs: Tensor | Mapping[str, Any], batch_size: int | None = None
) -> list[OutputComparison]:
    """Run both models on ``inputs`` and compare all that comes out, output by output.

    ===========================  ======================================================================================
    measure                      of
    ===========================  ======================================================================================
    "top-1 match"                logits (N, classes), or of tokens or queries (N, tokens, classes)
    "mean IoU"                   classes of pixels: logits (N, classes, H, W), or the "segmentation" that the classes
                                 and masks of Mask2Former give; the mean over classes that either model sees
    "IoU of masks"               "pred_masks" of SAM, logits of one class: of what is above 0
    "matched boxes"              "pred_boxes" of a detector: the share of the original's boxes for which the quantized
                                 model has one of the same class that overlaps by an IoU of 0.5, each counted once. The
                                 original's are those that are not "no object", or have a score of 0.3, or its best
    "absolute relative error"    "predicted_depth": the mean of the difference by the depth
    "key points kept"            "heatmaps": the share whose highest place moves by a pixel at most
    "cosine"                     everything else: of each picture's values, the mean
    ===========================  ======================================================================================

    Args:
        original, quantized: as for :func:`~fairseq.models.vit_quantization.compare_models`.
        inputs: pixel values (B, C, H, W), or what a processor returns.
        batch_size: pictures per run, for a tensor of pixel values; None for all at once.

    Raises:
        TypeError, ValueError: inputs are not as above, or the two models return different outputs.
    """
    parts: Iterator[Any] = iter([inputs]) if batch_size is None else iter(_split(inputs, batch_size))
    errors: dict[str, list[float]] = {}
    measured: dict[str, tuple[str, list[Measured]]] = {}
    for part in parts:
        expected, got = (_values(model, part) for model in (original, quantized))
        shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (expected, got)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the models do not match: the original returns {shapes[0]}, the quantized one {shapes[1]}"
            )
        if not expected:
            raise ValueError(f"{type(original).__name__} returned no floating tensor to compare")
        for name in expected:
            pair = errors.setdefault(name, [0.0, 0.0])
            pair[0] += _squared_error(expected[name].double(), got[name].double())
            pair[1] += float(expected[name].double().nan_to_num(0, 0, 0).square().sum())
        pixels = part if isinstance(part, Tensor) else part.get("pixel_values")
        for name, (kind, value) in _measures(expected, got, _labels(original), pixels).items():
            measured.setdefault(name, (kind, []))[1].append(value)
    found = []
    for name, (kind, sums) in measured.items():
        above, below = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
        shares = (above / below)[below > 0]
        difference, size = errors[name]
        error = (difference / size) ** 0.5 if size else float("nan") if difference else 0.0
        found.append(OutputComparison(name, error, kind, float(shares.mean()) if shares.numel() else float("nan")))
    return found


def _squared_error(expected: Tensor, got: Tensor) -> float:
    """Equal infinities, with which detectors pad, are no error."""
    return float(torch.where(expected == got, 0.0, got - expected).square().sum())


def _labels(model: nn.Module) -> int | None:
    """How many classes a model has by its config; None where prompts are the classes."""
    config = getattr(model, "config", None)
    return None if hasattr(config, "text_config") else getattr(config, "num_labels", None)


def _split(inputs: Any, batch_size: int) -> tuple[Tensor, ...]:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1 or None, got {batch_size!r}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"batch_size is for a tensor of pixel values; got {type(inputs).__name__}")
    return inputs.split(batch_size)


def _values(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The floating tensors among a model's outputs, by name, float32 on the CPU."""
    with evaluating(model), torch.no_grad():
        output = call(model, moved(model, inputs))
    values = {name: value.float().cpu() for key, given in output.items() for name, value in _tensors(key, given)}
    if {"class_queries_logits", "masks_queries_logits"} <= values.keys():
        values[SEGMENTATION] = _semantic(values)
    return values


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Each floating tensor in an output, and its name; numbers are none."""
    if name.endswith(LEFT_OUT):
        return
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim and value.numel():
            yield name, value
        return
    fields = fields_of(value)
    items = [(f"{name}.{key}", inner) for key, inner in fields.items()] if fields is not None else []
    if isinstance(value, list | tuple) and fields is None:
        items = [(f"{name}[{i}]", inner) for i, inner in enumerate(value)]
    for item in items:
        yield from _tensors(*item)


def _measures(
    expected: Values, got: Values, labels: int | None, pixels: Tensor | None
) -> dict[str, tuple[str, Measured]]:
    """By output, the name of its measure and the sums."""
    found: dict[str, tuple[str, Measured]] = {}
    for name, value in expected.items():
        own, other = value, got[name]
        if name == "pred_boxes" and "logits" in expected:
            found[name] = "matched boxes", _matched(expected, got, labels)
        elif name == "predicted_depth":
            found[name] = ERROR, _absolute_relative(own, other)
        elif name == "heatmaps" and value.ndim == 4:
            found[name] = "key points kept", _key_points(own, other)
        elif name == "pred_masks" or (name == "logits" and value.ndim == 4 and value.shape[1] == 1):
            found[name] = "IoU of masks", _masks(own, other)
        elif name == SEGMENTATION:
            found[name] = "mean IoU", _mean_iou(own, other)
        elif (dimension := class_dimension(name, value, pixels)) is not None and value.ndim < 4:
            found[name] = "top-1 match", _top1(own.movedim(dimension, -1), other.movedim(dimension, -1))
        elif dimension is not None:
            found[name] = "mean IoU", _mean_iou(own, other)
        else:
            found[name] = "cosine", _cosine(own, other)
    return found


def _top1(expected: Tensor, got: Tensor) -> Measured:
    """(..., classes) each."""
    same = expected.argmax(-1) == got.argmax(-1)
    return _share(same & ~(expected.isnan() | got.isnan()).any(-1))


def _mean_iou(expected: Tensor, got: Tensor) -> Measured:
    """(N, classes, H, W) each: of each class, intersection and union, over all pictures."""
    classes = expected.shape[1]
    first, second = expected.argmax(1), torch.where(got.isnan().any(1), -1, got.argmax(1))
    both = torch.bincount(first[first == second], minlength=classes)
    either = torch.bincount(first.flatten(), minlength=classes) - both
    either += torch.bincount(second[second >= 0], minlength=classes)
    return both.double(), either.double()


def _semantic(values: Values) -> Tensor:
    """The score of each class at each place, (N, classes, H, W), as transformers' post-processing makes it."""
    classes = values["class_queries_logits"].softmax(-1)[..., :-1]  # the last is "no object"
    return torch.einsum("nqc,nqhw->nchw", classes, values["masks_queries_logits"].sigmoid())


def _masks(expected: Tensor, got: Tensor) -> Measured:
    """(..., H, W) each: of every mask that either model has."""
    first, second = expected > 0, got > 0
    both, either = ((f(first, second)).sum((-2, -1)).double() for f in (torch.logical_and, torch.logical_or))
    seen = either > 0
    return (both[seen] / either[seen]).sum(), seen.sum().double()


def _absolute_relative(expected: Tensor, got: Tensor) -> Measured:
    """(N, H, W) each."""
    deep = expected.abs() > DEEP * expected.abs().amax((-2, -1), keepdim=True)
    errors = ((got - expected).abs() / expected.abs())[deep]
    return errors.nan_to_num(1.0, 1.0).double().sum(), deep.sum().double()


def _key_points(expected: Tensor, got: Tensor) -> Measured:
    """(N, points, H, W) each."""
    width = expected.shape[-1]
    first, second = (x.flatten(2).argmax(-1) for x in (expected, got))
    moved_by = torch.maximum((first // width - second // width).abs(), (first % width - second % width).abs())
    return _share((moved_by <= 1) & ~got.isnan().flatten(2).any(-1))


def _cosine(expected: Tensor, got: Tensor) -> Measured:
    """(N, ...) each."""
    first, second = expected.flatten(1).double(), got.flatten(1).double()
    cosine = F.cosine_similarity(first, second, dim=-1)
    cosine = torch.where((first == second).all(1), 1.0, cosine.nan_to_num(0.0))
    return cosine.sum(), torch.tensor(float(len(cosine)), dtype=torch.float64)


def _matched(expected: Values, got: Values, labels: int | None) -> Measured:
    """How many of the original's boxes have one of the quantized model's, one to one; and how many there are."""
    kept = total = 0
    for own, boxes, other, places in zip(expected["logits"], expected["pred_boxes"], got["logits"], got["pred_boxes"]):
        sure, kinds, score = _boxes(own, labels)
        _, others, _ = _boxes(other, labels)
        rows = sure.nonzero().flatten() if bool(sure.any()) else score.argmax()[None]
        overlaps = _iou(_corners(boxes[rows]), _corners(places))  # (boxes, queries)
        overlaps[kinds[rows][:, None] != others[None]] = 0
        total += len(rows)
        for row in score[rows].argsort(descending=True).tolist():
            best = int(overlaps[row].argmax())
            if overlaps[row, best] >= OVERLAP:
                kept += 1
                overlaps[:, best] = 0
    return torch.tensor(float(kept)).double(), torch.tensor(float(total)).double()


def _boxes(logits: Tensor, labels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which queries are boxes, of which class, and how sure, (queries,) each; of logits (queries, classes)."""
    if labels is not None and logits.shape[-1] == labels + 1:  # the last class is "no object"
        score, kind = logits.softmax(-1)[:, :-1].max(-1)
        return logits.argmax(-1) < labels, kind, score
    score, kind = logits.sigmoid().max(-1)
    return score >= SURE, kind, score


def _corners(boxes: Tensor) -> Tensor:
    """(boxes, 4): centre and size -> left, top, right, bottom."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Of each pair of boxes, (boxes, others)."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    area: Callable[[Tensor], Tensor] = lambda sides: sides.clamp(min=0).prod(-1)  # noqa: E731
    both = area(high - low)
    either = area(first[:, None, 2:] - first[:, None, :2]) + area(second[None, :, 2:] - second[None, :, :2]) - both
    return both / either.clamp(min=torch.finfo(torch.float32).tiny)


def _share(kept: Tensor) -> Measured:
    return kept.double().sum(), torch.tensor(float(kept.numel()), dtype=torch.float64)
