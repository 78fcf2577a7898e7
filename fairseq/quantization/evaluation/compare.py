"""How far a quantized model's outputs, embeddings and zero-shot classes are from the original's, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.quantization.architectures.forward import call, class_dimension, evaluating, output_of, picture_inputs
from fairseq.quantization.architectures.picture_forms import in_batches

EMBEDDINGS = ("image_embeds", "pooler_output", "embedding", "last_hidden_state", "logits")
"""Outputs that describe a picture, the first that there is; of tokens or pixels, their mean."""

PICTURE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_grid_thw", "noise")
"""Inputs that are of pictures."""


class EmbeddingComparison(NamedTuple):
    """How much of what embeddings are used for is kept.

    Attributes:
        cosine: of each picture's two embeddings, the mean over the pictures.
        cosine_min: the least of them.
        overlap: the share of each picture's k nearest others, by cosine, that are still among them; the mean.
        k: of ``overlap``.
        output: which output of the model the embedding is.
    """

    cosine: float
    cosine_min: float
    overlap: float
    k: int
    output: str


class ModelComparison(NamedTuple):
    """Mean squared and mean absolute error of the outputs, and the share of images whose top class is kept, if any."""

    mse_loss: float
    mae_loss: float
    top_k_match: float | None


def compare_models(
    original: nn.Module, quantized: nn.Module, inputs: Tensor | Mapping[str, Any], top_k: int = 1
) -> ModelComparison:
    """Run both models on ``inputs`` and compare what comes out.

    Args:
        original, quantized: the two models; each may be on a device and in a dtype of its own. Both run in eval mode
            without gradients; their training flags are as before afterwards.
        inputs: what an image processor returns, or pixel_values, (B, channels, height, width), any batch size.
        top_k: 1 to the number of classes.

    Returns:
        (mse_loss, mae_loss, top_k_match): the errors of the logits, (B, classes), in float32; and the share of images,
        0 to 1, whose top-1 class in the original is among the first ``top_k`` of the quantized model. For CLIP and
        SigLIP with text among ``inputs`` the prompts are the classes. Where there is a class for each pixel, (B,
        classes, H, W), or for each query of a detector, (B, queries, classes), it is the share of pixels or queries.

        Models without logits are compared on their image embeddings, last hidden state or reconstruction, and all
        others on their first floating output, such as a depth map, with top_k_match = None; see :func:`output_of
        <fairseq.quantization.architectures.forward.output_of>` and :func:`compare_embeddings`. It is None, too, for
        logits without classes: one number per picture, or one per pixel.

    Raises:
        TypeError, ValueError: inputs or top_k are not as above, or the two outputs differ in kind or shape.
    """
    _check_count("top_k", top_k)
    kind, expected, classes = _run(original, inputs)
    other_kind, got, _ = _run(quantized, inputs)
    if (kind, expected.shape) != (other_kind, got.shape):
        raise ValueError(
            f"the models do not match: the original returns {kind} {tuple(expected.shape)}, "
            f"the quantized one {other_kind} {tuple(got.shape)}"
        )
    difference = got - expected
    match = None if classes is None else agreement(expected, got, classes, top_k)
    return ModelComparison(difference.square().mean().item(), difference.abs().mean().item(), match)


def agreement(expected: Tensor, got: Tensor, classes: int, top_k: int = 1) -> float:
    """The share of rows along the dimension ``classes`` whose best class is among the first ``top_k`` of ``got``.

    Raises:
        ValueError: there are not so many classes.
    """
    expected, got = expected.movedim(classes, -1), got.movedim(classes, -1)
    if top_k > expected.shape[-1]:
        raise ValueError(f"top_k must be at most the number of classes, {expected.shape[-1]}; got {top_k}")
    best = expected.argmax(-1, keepdim=True)  # (..., 1)
    finite = torch.isfinite(expected).all(-1) & torch.isfinite(got).all(-1)  # NaN has no top class
    return ((got.topk(top_k, dim=-1).indices == best).any(-1) & finite).float().mean().item()


def compare_embeddings(
    original: nn.Module, quantized: nn.Module, inputs: Tensor | Mapping[str, Any], k: int = 5, batch_size: int = 16
) -> EmbeddingComparison:
    """Run both models on ``inputs`` and compare the embeddings of the pictures: for models without classes.

    The embedding is the projected one of CLIP, else the pooler's output, else the mean of the last hidden state over
    the tokens, (B, tokens, width), or over the places of a map, (B, width, H, W), else the logits, likewise.

    Args:
        original, quantized: as for :func:`compare_models`.
        inputs: pixel values (B, C, H, W), or a processor's dict, whose text is left out; more than ``k`` pictures.
        k: how many neighbours are looked at, at least 1.
        batch_size: pictures per run.

    Raises:
        TypeError, ValueError: inputs or k are not as above, a model has no embedding, or the two differ.
    """
    _check_count("k", k)
    _check_count("batch_size", batch_size)
    kind, expected = embeddings(original, inputs, batch_size)
    other_kind, got = embeddings(quantized, inputs, batch_size)
    if (kind, expected.shape) != (other_kind, got.shape):
        raise ValueError(
            f"the models do not match: the original returns {kind} {tuple(expected.shape)}, "
            f"the quantized one {other_kind} {tuple(got.shape)}"
        )
    return compare_vectors(expected, got, k, kind)


def compare_vectors(expected: Tensor, got: Tensor, k: int, output: str) -> EmbeddingComparison:
    """:func:`compare_embeddings` of embeddings, (B, width) each.

    Raises:
        ValueError: there are no more than ``k`` pictures.
    """
    if len(expected) <= k:
        raise ValueError(f"k={k} neighbours need at least {k + 1} pictures, got {len(expected)}")
    cosine = F.cosine_similarity(expected, got, dim=-1)
    near = [_neighbours(vectors, k) for vectors in (expected, got)]  # (B, k)
    kept = (near[0].unsqueeze(2) == near[1].unsqueeze(1)).any(2)  # (B, k)
    return EmbeddingComparison(cosine.mean().item(), cosine.min().item(), kept.float().mean().item(), k, output)


def embeddings(model: nn.Module, inputs: Tensor | Mapping[str, Any], batch_size: int = 16) -> tuple[str, Tensor]:
    """The name of the output that describes a picture, and its values: (B, width), float32 on the CPU.

    Raises:
        TypeError, ValueError: inputs of another kind, or no such output.
    """
    keywords = moved(model, inputs)
    keywords = {name: x for name, x in keywords.items() if name in PICTURE_INPUTS and isinstance(x, Tensor)}
    if "pixel_values" not in keywords:
        raise ValueError("inputs must be a tensor of pixel values or a processor's dict with pixel_values")
    found: list[Tensor] = []
    kind = ""
    for batch in in_batches(keywords, batch_size):
        with evaluating(model), torch.no_grad():
            output = call(model, batch)
        kind = next((name for name in EMBEDDINGS if output.get(name) is not None), "")
        if not kind:
            raise ValueError(
                f"the model has no embedding: it returns none of {', '.join(EMBEDDINGS)}; see compare_models"
            )
        value = output[kind].float().cpu()
        if value.ndim == 4 and kind != "embedding":  # transformers has channels first, timm's Swin last
            value = value.flatten(2).transpose(1, 2)  # (B, places, width)
        found.append(value.flatten(1, -2).mean(1) if value.ndim > 2 else value)
    return kind, torch.cat(found)


def zero_shot_agreement(
    original: nn.Module,
    quantized: nn.Module,
    pixel_values: Tensor | Mapping[str, Any],
    text: Tensor | Mapping[str, Any],
    batch_size: int = 16,
) -> float:
    """The share of pictures, 0 to 1, for which both models find the same prompt the most fitting: for CLIP and SigLIP.

    Args:
        original, quantized: as for :func:`compare_models`.
        pixel_values: (B, C, H, W), or an image processor's dict.
        text: token ids of the prompts, (prompts, length), one for each class; or a tokenizer's dict.
        batch_size: pictures per run.

    Raises:
        TypeError, ValueError: what came and what is accepted; a model without a text tower.
    """
    _check_count("batch_size", batch_size)
    first, second = (_best_prompts(model, pixel_values, text, batch_size) for model in (original, quantized))
    return ((first == second) & (first >= 0)).float().mean().item()


def _best_prompts(model: nn.Module, pixels: Any, text: Any, batch_size: int) -> Tensor:
    """The number of the prompt with the highest logit for each picture: (B,); -1 where a logit is not finite."""
    words = {"input_ids": text} if isinstance(text, Tensor) else dict(text)
    if "input_ids" not in words:
        raise ValueError(f"text must be token ids or a tokenizer's dict with input_ids, got {', '.join(words)}")
    pictures, words = moved(model, pixels), moved(model, words)
    if "pixel_values" not in pictures:
        raise ValueError(f"pixel_values must be a tensor or an image processor's dict, got {', '.join(pictures)}")
    best = []
    for start in range(0, len(pictures["pixel_values"]), batch_size):
        batch = {name: x[start : start + batch_size] for name, x in pictures.items() if name in PICTURE_INPUTS}
        with evaluating(model), torch.no_grad():
            logits = call(model, {**batch, **words}).get("logits_per_image")
        if logits is None:
            raise ValueError(f"{type(model).__name__} compares no pictures with text: it returns no logits_per_image")
        best.append(torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1).cpu())
    return torch.cat(best)


def _neighbours(vectors: Tensor, k: int) -> Tensor:
    """The ``k`` nearest others of each vector, by cosine: (B, k)."""
    unit = F.normalize(vectors, dim=-1)
    similar = unit @ unit.T
    return similar.fill_diagonal_(-torch.inf).topk(k, dim=-1).indices


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[str, Tensor, int | None]:
    """The name and value of the output that is compared, float32 on the CPU; and its dimension of classes."""
    keywords = moved(model, inputs)
    with evaluating(model), torch.no_grad():
        name, value = output_of(model, keywords)
    return name, value.float().cpu(), class_dimension(name, value, keywords.get("pixel_values"))


def moved(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` by name, on the device and in the dtype of ``model``; pictures as the model takes them."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    if isinstance(inputs, Tensor):
        return picture_inputs(model, move(inputs))
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a tensor of pixel values or a processor's dict, got {type(inputs).__name__}")
    return {name: move(value) for name, value in inputs.items()}
