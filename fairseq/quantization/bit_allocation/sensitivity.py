"""How much the width of each layer changes the model's output.

errors = measure(model, pixel_values, config)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.modules.quantization.scalar.ops import check_tensor
from fairseq.quantization.architectures.plan import check_model
from fairseq.quantization.bit_allocation.replay import Replay
from fairseq.quantization.bit_allocation.twins import CHOICES, Twins
from fairseq.quantization.calibration import processes
from fairseq.quantization.config import QuantizationConfig

logger = logging.getLogger(__name__)

SAME_CURVATURE = 2.5
"""Two widths agree if the output error per error of the layer differs by no more than this factor."""
PICTURES = 64
"""How many of the pictures run through the model again and again, evenly taken from those that are held back."""
FEW = 32
"""Pictures below which none is held back."""


def measure(
    model: nn.Module,
    pixel_values: Tensor,
    config: QuantizationConfig,
    choices: Sequence[int] = CHOICES,
    batch_size: int = 16,
) -> dict[str, dict[int, float]]:
    """The error of the model's output when one layer alone is narrower than the others, for each width.

    What is measured is what will run: the packed model with every layer at its widest, equalized and rounded on the
    pictures as ``config`` says and with its activations, against the same with a twin of one layer in its place. Every
    fourth of at least 32 pictures is held back from rounding, and the error is measured on those.

    Two widths are run through the model, the second narrowest and the second widest of ``choices``, from the encoder
    block on that holds the layer, on up to 64 pictures. For small changes the error is quadratic in that of the
    layer's own output, so the other widths get theirs from what rounding left of that, which is known for each width,
    times the geometric mean of the two measured ratios. Where those ratios differ by more than 2.5 times (one outlier
    can saturate the error of a whole layer), or with up to three choices, every width is run. The widest has no error.

    In several processes each runs its share of the layers, and all get all errors.

    Args:
        model: the float model; it is not written to, its modules neither, whatever happens on the way.
        pixel_values: (N, channels, height, width), floating, finite, preprocessed as the model expects; some dozens.
        config: selects the layers and says how they are rounded; of its bits only those of an override count, which are
            then a layer's only width.
        choices: the widths of all other layers, 2 to 8.
        batch_size: pictures per run.

    Returns:
        For each selected layer, in the model's order, the error at each width: the mean over the pictures of the KL
        divergence, in nats, of the softmax of the logits from that with every layer at its widest; with a class for
        each pixel or query, over those, too. For a model without classes, the squared error of its last hidden state,
        reconstruction or first floating output, as a share of that one's square; the same of the logit where there is
        but one. A layer that changes nothing of that, such as a pooler beside the hidden state, has the error of its
        own output instead, a share far larger than the others' errors, so that it stays wide.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    check_model(model)
    check_pictures(pixel_values, batch_size)
    calibration, held_back = split(pixel_values)
    return measure_twins(Twins(model, calibration, config, choices), held_back, batch_size)


def split(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures to round on, and every fourth one, which rounding does not know; all for both where there are few.

    What is rounded on pictures does better on these than on others, and the more so the fewer bits there are.
    """
    if len(pixel_values) < FEW:
        return pixel_values, pixel_values
    held_back = torch.arange(len(pixel_values)) % 4 == 3
    return pixel_values[~held_back], pixel_values[held_back]


def measure_twins(twins: Twins, pixel_values: Tensor, batch_size: int = 16) -> dict[str, dict[int, float]]:
    """The errors of twins; see :func:`measure`."""
    check_pictures(pixel_values, batch_size)
    if not twins.layers:
        return {}
    few = pixel_values[torch.linspace(0, len(pixel_values) - 1, min(len(pixel_values), PICTURES)).long()]
    replay = Replay(twins.model, few, batch_size, twins.plan)
    errors: dict[str, dict[int, float]] = {}
    order = sorted((replay.place(name), name) for name in twins.layers)[processes.rank() :: processes.count()]
    for place, name in tqdm(order, desc="Measuring sensitivity", unit="layer", delay=1, leave=False):
        replay.advance(place)
        errors[name] = _measure_layer(replay, name, twins)
    everywhere = {name: error for part in processes.gathered(errors) for name, error in part.items()}
    for name, own in everywhere.items():
        if len(own) > 1 and not any(own.values()) and any(twins.noise[name].values()):
            logger.warning("%s does not change what is measured of the output: the wider it is, the better", name)
            everywhere[name] = dict(twins.noise[name])
    return {name: everywhere[name] for name in twins.layers}


def _measure_layer(replay: Replay, name: str, twins: Twins) -> dict[int, float]:
    """The error of the output at each width: of two it is measured, of the others derived where the two agree."""
    layers, noise = twins.layers[name], twins.noise[name]
    widths = sorted(layers)
    widest = widths[-1]

    def run(bits: int) -> float:
        return 0.0 if bits == widest else replay.error(name, layers[bits])

    measured = {bits: run(bits) for bits in _anchors(widths)}
    ratios = [error / noise[bits] if noise[bits] else 0.0 for bits, error in measured.items() if bits != widest]
    if not ratios or not 0 < max(ratios) <= SAME_CURVATURE * min(ratios) < math.inf:
        return {bits: measured[bits] if bits in measured else run(bits) for bits in widths}
    ratio = math.sqrt(ratios[0] * ratios[-1])  # of two that are positive
    return {bits: 0.0 if bits == widest else measured.get(bits, ratio * noise[bits]) for bits in widths}


def _anchors(widths: list[int]) -> list[int]:
    """The widths to measure."""
    inner = widths[1:-1] if len(widths) > 3 else widths[:-1] or widths
    return list(dict.fromkeys((inner[0], inner[-1])))


def check_pictures(pixel_values: Tensor, batch_size: int) -> None:
    check_tensor(pixel_values, "pixel_values")
    if pixel_values.ndim != 4 or not len(pixel_values):
        raise ValueError(
            f"pixel_values must be (N, channels, height, width), N at least 1; got {tuple(pixel_values.shape)}"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
