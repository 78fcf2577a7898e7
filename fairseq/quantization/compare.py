"""compare_models: how far a quantized model's outputs are from the original's, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OUTPUTS = ("logits", "last_hidden_state", "reconstruction")


class ModelComparison(NamedTuple):
    """Mean squared and mean absolute error of the outputs, and the share of images whose top class is kept."""

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
        0 to 1, whose top-1 class in the original is among the first ``top_k`` of the quantized model. Models without
        logits are compared on their last hidden state (or their reconstruction), with top_k_match = None.

    Raises:
        TypeError, ValueError: inputs or top_k are not as above, or the two outputs differ in kind or shape.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int of at least 1, got {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    kind, expected = _run(original, inputs)
    other_kind, got = _run(quantized, inputs)
    if (kind, expected.shape) != (other_kind, got.shape):
        raise ValueError(
            f"the models do not match: the original returns {kind} {tuple(expected.shape)}, "
            f"the quantized one {other_kind} {tuple(got.shape)}"
        )
    difference = got - expected
    match = None
    if kind == "logits":
        if top_k > expected.shape[-1]:
            raise ValueError(f"top_k must be at most the number of classes, {expected.shape[-1]}; got {top_k}")
        best = expected.argmax(-1, keepdim=True)  # (B, 1)
        finite = torch.isfinite(expected).all(-1) & torch.isfinite(got).all(-1)  # NaN has no top class
        match = ((got.topk(top_k, dim=-1).indices == best).any(-1) & finite).float().mean().item()
    return ModelComparison(difference.square().mean().item(), difference.abs().mean().item(), match)


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[str, Tensor]:
    """The name and value of the output that is compared, float32 on the CPU."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    if isinstance(inputs, Tensor):
        keywords = {"pixel_values": move(inputs)}
    elif isinstance(inputs, Mapping):
        keywords = {name: move(value) for name, value in inputs.items()}
    else:
        raise TypeError(f"inputs must be a tensor of pixel values or a processor's dict, got {type(inputs).__name__}")
    with evaluating(model), torch.no_grad():
        output = model(**keywords)
    for name in OUTPUTS:
        if isinstance(output, Mapping) and name in output:
            return name, output[name].float().cpu()
    raise ValueError(f"the model returned {type(output).__name__}, which has none of {', '.join(OUTPUTS)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every submodule's training flag as before after it."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
