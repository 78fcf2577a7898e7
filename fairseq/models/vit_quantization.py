"""ViTQuantizer and compare_models: the front door.

from fairseq.models.vit_quantization import ViTQuantizer, compare_models

quantized_model = ViTQuantizer(bits=4, method="tensor").quantize_model(model)
mse_loss, mae_loss, top1_match = compare_models(model, quantized_model, inputs, top_k=1)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import nn

from fairseq.quantization.compare import ModelComparison, compare_models
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.convert import convert, dequantize
from fairseq.quantization.report import LayerReport, QuantizationReport

__all__ = ["LayerReport", "ModelComparison", "QuantizationReport", "ViTQuantizer", "compare_models"]

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


class ViTQuantizer:
    """Quantizes the Linear layers of a HuggingFace Vision Transformer.

    Args:
        bits: width of the integers, 2 to 8.
        method: "tensor" (one scale per layer, from its minimum and maximum), "channel" (one per output channel) or
            "histogram" (one per output channel, clipped where the squared error is smallest: the most accurate and the
            slowest to compute).
        p: share of the selected layers that is quantized, 0 to 1; which ones, ``seed`` decides.
        quantize_attention: the query, key, value and output projections.
        quantize_mlp: the two layers of each MLP.
        quantize_classifier: the classifier, and the pooler of a bare model.
        seed: the same seed chooses the same layers, every time and everywhere.
        overrides: glob of layer names -> ``skip`` or any of ``bits``, ``method``, ``activations``, ``group_size``,
            ``symmetric``, ``resident``, ``backend`` for those layers; the first glob that matches wins.
            ``{"*classifier": {"bits": 8}, "vit.layers.0.*": {"skip": True}}``
        execution: "packed" holds the integers in memory and runs on them, for inference; "emulated" keeps float
            weights that are seen through the same integers, with gradients, for training.
        activations: "dynamic" rounds each token to 8 bits by its own scale, for integer products; None leaves them,
            and dequantizes the weight to multiply.
        group_size: input channels that share a scale, 32 to 128 in steps of 8; None for all of an output channel.
        symmetric: put the weights' zero point in the middle of the grid.
        resident: "packed" or, for more speed below 5 bits and more memory, "unpacked".
        backend: "auto", or the kernels that must run: "reference", "cpu", "cuda".

    Attributes:
        config: the settings, a frozen :class:`~fairseq.quantization.config.QuantizationConfig`.
        report: what the last :meth:`quantize_model` did; None before. ``print(quantizer.report)``.

    Raises:
        TypeError, ValueError: an argument outside what is accepted; the message says what came and what is.
    """

    def __init__(
        self,
        bits: int = 8,
        method: str = "tensor",
        p: float = 1.0,
        quantize_attention: bool = True,
        quantize_mlp: bool = True,
        quantize_classifier: bool = True,
        *,
        seed: int = 0,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        execution: str = "packed",
        activations: str | None = "dynamic",
        group_size: int | None = None,
        symmetric: bool = False,
        resident: str = "packed",
        backend: str = "auto",
    ):
        self.config = QuantizationConfig(
            bits=bits, method=method, activations=activations, group_size=group_size, symmetric=symmetric,
            resident=resident, backend=backend, p=p, quantize_attention=quantize_attention,
            quantize_mlp=quantize_mlp, quantize_classifier=quantize_classifier, seed=seed, execution=execution,
            overrides=dict(overrides or {}),
        )  # fmt: skip
        self.report: QuantizationReport | None = None

    def __repr__(self) -> str:
        return f"ViTQuantizer({self.config})"

    def quantize_model(self, model: Model) -> Model:
        """Return a quantized deep copy of ``model``, with the same call signature; ``model`` itself is not changed.

        Args:
            model: a ViTForImageClassification, ViTModel or ViTForMaskedImageModeling on any device, in any float dtype,
                of transformers 4.57 or later.

        Raises:
            TypeError: not a module.
            ValueError: already quantized, on the meta device, weights with NaN or Inf, no layer of a ViT in it, or an
                override that matches nothing. The message names the layers.
        """
        quantized, self.report = convert(model, self.config)
        logger.info("%s", self.report)
        return cast(Model, quantized)

    @staticmethod
    def dequantize_model(model: Model) -> Model:
        """Return a copy of a quantized model with float Linear layers again, which hold the rounded weights.

        For whatever knows only float models: ``ViTQuantizer.dequantize_model(quantized).save_pretrained(folder)``
        writes a folder that ``from_pretrained`` loads without this library.

        Raises:
            TypeError: not a module.
            ValueError: nothing in ``model`` is quantized.
        """
        return cast(Model, dequantize(model))
