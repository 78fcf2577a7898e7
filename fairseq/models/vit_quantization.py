"""ViTQuantizer, compare_models and what compares embeddings: the front door.

from fairseq.models.vit_quantization import ViTQuantizer, compare_models

quantized_model = ViTQuantizer(bits=4, method="tensor").quantize_model(model, calibration=images)
mse_loss, mae_loss, top1_match = compare_models(model, quantized_model, inputs, top_k=1)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fairseq.modules.quantization.context import plain_context
from fairseq.quantization.architectures.plan import check_model
from fairseq.quantization.bit_allocation.assignment import BitAssignment
from fairseq.quantization.bit_allocation.knapsack import check_limit
from fairseq.quantization.bit_allocation.pareto import Pareto, pareto
from fairseq.quantization.bit_allocation.search import Widths, check_drop
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.images import pictures
from fairseq.quantization.config import QuantizationConfig, with_current_names
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.conversion.dequantize import dequantize
from fairseq.quantization.engine.fuse import optimize
from fairseq.quantization.evaluation.compare import (
    EmbeddingComparison,
    ModelComparison,
    compare_embeddings,
    compare_models,
    zero_shot_agreement,
)
from fairseq.quantization.evaluation.outputs import OutputComparison, compare_outputs
from fairseq.quantization.evaluation.report import LayerReport, QuantizationReport
from fairseq.quantization.export.export import export
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.integer_only.convert import check_arithmetic, check_functions, convert_to_integers
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.reconstruction.settings import Reconstruction, resolve_reconstruction
from fairseq.quantization.saving import checkpoint
from fairseq.quantization.saving.attach import disable_save_pretrained, enable_save_pretrained
from fairseq.quantization.saving.folder import check_folder
from fairseq.quantization.saving.huggingface import FairseqViTConfig
from fairseq.quantization.training.pack import pack

__all__ = [
    "BitAssignment", "EmbeddingComparison", "ExportReport", "FairseqViTConfig", "LayerReport", "ModelComparison",
    "OutputComparison", "Pareto", "QuantizationReport", "Reconstruction", "ViTQuantizer", "check_folder",
    "compare_embeddings", "compare_models", "compare_outputs", "zero_shot_agreement",
]  # fmt: skip

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


class ViTQuantizer:
    """Quantizes the Linear layers of a Vision Transformer, of HuggingFace or timm.

    Args:
        bits: width of the integers, 2 to 8.
        method: "tensor" (one scale per layer, clipped where the squared error is smallest), "channel" (one per output
            channel, from its minimum and maximum) or "histogram" (one per output channel, clipped: the most accurate
            without calibration and the slowest to compute). With calibration "channel" is clipped too.
        p: share of the selected layers that is quantized, 0 to 1; which ones, ``seed`` decides.
        quantize_attention: the query, key, value and output projections.
        quantize_mlp: the two layers of each MLP.
        quantize_classifier: the classifier, the pooler of a bare model, and projections of embeddings.

    Which layers:
        quantize_embeddings: also pack the convolution that embeds patches, and position embeddings (at 8 bits).
        towers: "vision", "text" or "all": which towers of a model that reads text, too, such as CLIP or LLaVA.
        exclude: globs of layers that stay in float: ``["*classifier"]``. It wins over ``overrides``.
        overrides: glob of layer names -> ``skip`` or any of ``bits``, ``method``, ``activations``, ``activation_bits``,
            ``group_size``, ``symmetric``, ``rounding``, ``bias_correction``, ``weight_storage``, ``backend`` for those
            layers; the first glob that matches wins. ``{"*classifier": {"bits": 8}, "*.layers.0.*": {"bits": 6}}``
        seed: the same seed chooses the same layers, every time and everywhere.

    How weights are rounded:
        group_size: input channels that share a scale, 32 to 128 in steps of 8; None for all of an output channel.
        symmetric: put the weights' zero point in the middle of the grid.
        rounding: "nearest"; with calibration images also "gptq", by the error at each layer's output, "gptaq", which
            makes up for the error of the layers before, too, and takes longer, "qronos", which does so in full and for
            which some hundred images are few, or "coordinate", which fits the scales to the integers as well, for 2 to
            4 bits; or "auto": with images coordinate up to 4 bits, gptaq above and with "tensor", else nearest. In
            blocks that are reconstructed with activations of fewer than 8 bits it makes up for nothing, and is gptq
            instead of gptaq.
        equalize: even out the ranges of input channels first, which changes nothing before rounding, where one scale
            serves a whole weight (method "tensor") or input (static activations).
        rotate: turn the hidden states by an orthogonal matrix first, so that no channel has a larger range than others,
            which changes no logit before rounding; for ViT, DeiT and ViT-MSN with a classifier. The hidden states that
            the model returns on request are turned, too.
        bias_correction: True adds each layer's mean output error on the calibration images to its bias, "add" also to
            layers without a bias.

    How activations are rounded:
        activations: "dynamic" rounds each token by its own scale, for integer products; "static" rounds all tokens
            with one calibrated scale (layers that cannot bear it stay dynamic, and the report says so); None leaves
            them, and multiplies by the weight in float; the native kernels round them to bfloat16.
        activation_bits: width of rounded activations, 2 to 8.

    How it runs:
        arithmetic: "float": integer products, and the rest in the model's dtype. "integer": from the rounded pixels to
            the integers of the outputs no floating-point operation; needs ``calibration``, and a ViT, DeiT, ViT-MSN,
            DINOv2, or CLIP or SigLIP of one tower. What :meth:`quantize_model` returns then is an
            :class:`~fairseq.quantization.integer_only.model.IntegerViT`.
        functions: of GELU and softmax where ``arithmetic="integer"``: "default", or the published ones of "ibert" or
            "ivit", which err more, have no native kernels, and are there to compare with.
        execution: "packed" holds the integers in memory and runs on them, for inference; "emulated" keeps float
            weights that are seen through the same integers, with gradients, for training; :meth:`pack_model` then
            packs the integers that were trained.
        weight_storage: "packed" or, for more speed below 5 bits and more memory, "unpacked".
        backend: "auto", or the kernels that must run: "reference", "cpu", "floats", "cuda", "triton", "native".
        resident: the former name of ``weight_storage``; deprecated.

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
        exclude: Sequence[str] = (),
        execution: str = "packed",
        activations: str | None = "dynamic",
        activation_bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = False,
        rounding: str = "auto",
        equalize: bool = True,
        rotate: bool = False,
        bias_correction: bool | str = False,
        weight_storage: str = "packed",
        backend: str = "auto",
        towers: str = "vision",
        quantize_embeddings: bool = False,
        arithmetic: str = "float",
        functions: str = "default",
        resident: str | None = None,
    ):
        if resident is not None:
            former = {"resident": resident} | ({"weight_storage": weight_storage} if weight_storage != "packed" else {})
            weight_storage = with_current_names(former)["weight_storage"]
        self.config = QuantizationConfig(
            bits=bits, method=method, activations=activations, activation_bits=activation_bits, group_size=group_size,
            symmetric=symmetric, rounding=rounding, equalize=equalize, bias_correction=bias_correction, rotate=rotate,
            weight_storage=weight_storage, backend=backend, p=p, quantize_attention=quantize_attention,
            quantize_mlp=quantize_mlp, quantize_classifier=quantize_classifier, seed=seed, execution=execution,
            overrides=overrides or {}, exclude=exclude, towers=towers, quantize_embeddings=quantize_embeddings,
        )  # fmt: skip
        self.arithmetic = check_arithmetic(arithmetic, self.config)
        self.functions = check_functions(functions, arithmetic)
        self.report: QuantizationReport | None = None

    def __repr__(self) -> str:
        integer = f", arithmetic='integer', functions={self.functions!r}" if self.arithmetic == "integer" else ""
        return f"ViTQuantizer({self.config}{integer})"

    def quantize_model(
        self,
        model: Model,
        calibration: Any = None,
        processor: Any = None,
        images: int | str = 128,
        engine: str = "auto",
        *,
        augment: int = 1,
        reconstruct: bool | Reconstruction = False,
        resume: str | os.PathLike[str] | None = None,
    ) -> Model:
        """Return a quantized deep copy of ``model``, with the same call signature; ``model`` itself is not changed.

        Args:
            model: a ViT, DeiT, BEiT, Swin, SwinV2, DINOv2, DINOv3, ViT-MAE, ViT-MSN, CLIP or SigLIP, bare or with a
                head, or as the backbone or vision tower of another model, or a VisionTransformer of timm, torchvision
                or OpenCLIP, on any device, in any float dtype, of transformers 4.57 or later. Others by a generic
                rule, with a warning.
            calibration: pictures like those that the model will see, without labels, for a smaller loss of accuracy: a
                tensor of pixel values (N, C, H, W), a list of PIL images or files, a folder, or a DataLoader. They do
                not reach a text tower, which is rounded as without them.
            processor: the model's image processor, for pictures that are not tensors.
            images: how many of them are used, drawn with ``seed``; or "all".
            engine: "fused" runs each encoder block as one native call, "layers" layer by layer, as it would on
                another device; "auto" fuses what it can.
            augment: how many views of each picture are used: itself, and random crops of it, half of them flipped.
                For when there are few pictures; more pictures are better.
            reconstruct: after a block is rounded, learn its integers, scales, biases and norms on what the float block
                gives for the pictures: takes minutes to hours, said before it starts, and pays below 5 bits. True, or
                a :class:`~fairseq.quantization.reconstruction.Reconstruction` with a number of epochs or minutes.
            resume: a folder that what is finished is written to, block by block. The same call again goes on after
                the last finished block, if it was interrupted, and gives the same integers as an uninterrupted one.
                The folder is removed at the end.

        Where torch.distributed has a process group, as under ``torchrun``, every process must call this with the same
        arguments. They share the pictures, and each returns the model that one process alone would.

        Raises:
            TypeError: not a module.
            RuntimeError: ``engine="fused"``, and the native kernels were not built.
            ValueError: already quantized, on the meta device, weights with NaN or Inf, no layer of a ViT in it, an
                override that matches nothing, pictures that cannot be used, a setting that needs pictures without
                them, or ``engine="fused"`` and no block that can be. The message names the layers or the picture.
        """
        _check_not_integers(model, "pass the float model")
        check_model(model)
        quantized: nn.Module
        if calibration is None and processor is not None:
            raise ValueError("a processor was given but no pictures; pass calibration=images, too")
        if calibration is None and augment != 1:
            raise ValueError(f"augment={augment!r} was given but no pictures; pass calibration=images, too")
        learning = resolve_reconstruction(reconstruct)
        pixels = None
        with plain_context():
            if calibration is not None:
                pixels = pictures(calibration, model, processor, images, self.config.seed, augment)
            if self.arithmetic == "integer":
                if learning is not None:
                    raise ValueError("reconstruct= needs arithmetic='float'; this quantizer has 'integer'")
                if resume is not None:
                    raise ValueError("resume= needs arithmetic='float'; with 'integer' a run starts from the beginning")
                with processes.alone():
                    quantized, self.report = convert_to_integers(
                        model, self.config, None if pixels is None else pixels[:], processor, engine, self.functions
                    )
            else:
                quantized, self.report = convert(
                    model, self.config, pixels, engine, resume=resume, reconstruct=learning
                )
        if self.config.execution == "packed":
            information = {"bytes_before": self.report.bytes_before}
            if pixels is not None:
                information["calibration_images"] = len(pixels) // pixels.views
            enable_save_pretrained(quantized, information)
        else:
            enable_save_pretrained(quantized)
        logger.info("%s", self.report)
        return cast(Model, quantized)

    def assign_bits(
        self,
        model: nn.Module,
        calibration: Any,
        processor: Any = None,
        images: int | str = 128,
        *,
        average_bits: float | None = None,
        max_bytes: int | None = None,
        max_milliseconds: float | None = None,
        max_accuracy_drop: float | None = None,
        batch_size: int = 1,
    ) -> BitAssignment:
        """How many bits each layer should get, from how much its width changes the output: ``overrides`` to pass on.

        ``ViTQuantizer(overrides=assignment.overrides)`` quantizes so, with the overrides of this quantizer carried on;
        the assignment can be printed, saved as JSON, edited and loaded. Layers that an override skips stay in float and
        out of the average; a width that an override gives stays, and counts. What is measured is what will run: packed
        layers, equalized, rounded and with activations as this quantizer does it; see
        :func:`~fairseq.quantization.bit_allocation.sensitivity.measure`.

        Args:
            model, calibration, processor, images: as for :meth:`quantize_model`.
            average_bits: per weight of the quantized layers, at most; the most accurate such assignment.
            max_bytes: of the packed model as it is saved, at most, whatever is in float included; the most accurate
                such assignment.
            max_milliseconds: for a batch of ``batch_size`` pictures on this machine as it is now, at most; the most
                accurate that was found. Layers and models are timed, so that a busy machine gives another result.
            max_accuracy_drop: in percentage points of top-1, at most, as measured on the calibration images by how many
                change their class; the smallest such assignment. Quantizes the model seven times.
            batch_size: pictures in a batch, for ``max_milliseconds``.

        Raises:
            TypeError, ValueError: not exactly one of the four, one that cannot be reached, a quantizer with
                ``arithmetic="integer"``, or as quantize_model.
        """
        limits = (average_bits, max_bytes, max_milliseconds, max_accuracy_drop)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("give exactly one of average_bits, max_bytes, max_milliseconds and max_accuracy_drop")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if batch_size > 1 and max_milliseconds is None:
            raise ValueError(f"batch_size={batch_size} is for max_milliseconds")
        if max_accuracy_drop is not None:
            check_drop(max_accuracy_drop)
        names = ("average_bits", "max_bytes", "max_milliseconds")
        for name, limit in zip(names, (average_bits, max_bytes, max_milliseconds), strict=True):
            if limit is not None:
                check_limit(name, limit)
        if average_bits is not None and not 2 <= average_bits <= 8:
            raise ValueError(f"average_bits must be from 2 to 8, got {average_bits}")
        self._check_float("assign_bits measures")
        check_model(model)
        with plain_context():
            pixels = pictures(calibration, model, processor, images, self.config.seed)[:]
            widths = Widths(model, pixels, self.config)
            if average_bits is not None:
                return widths.on_average(average_bits)
            if max_bytes is not None:
                return widths.in_bytes(max_bytes)
            if max_milliseconds is not None:
                return widths.in_milliseconds(max_milliseconds, batch_size)
            assert max_accuracy_drop is not None
            return widths.that_agree(max_accuracy_drop)

    def pareto(
        self,
        model: nn.Module,
        calibration: Any,
        processor: Any = None,
        images: int | str = 128,
        *,
        average_bits: Sequence[float] | None = None,
    ) -> Pareto:
        """Size against agreement with the float model, at single widths and at mixed ones: to print, save and plot.

        Every fourth picture is held back and judges; the others calibrate. The model is quantized once for each point.

        Args:
            model, calibration, processor, images: as for :meth:`quantize_model`; at least 8 pictures.
            average_bits: per weight, of the mixed widths; None for 2.5, 3, 3.5, 4, 4.5, 5 and 6, as far as overrides
                allow them.

        Raises:
            TypeError, ValueError: fewer pictures, an average that the widths do not allow, or as :meth:`assign_bits`.
        """
        if average_bits is not None:
            if not isinstance(average_bits, Sequence) or isinstance(average_bits, str):
                raise TypeError(f"average_bits must be a list of numbers, got {average_bits!r}")
            for average in average_bits:
                check_limit("average_bits", average)
                if not 2 <= average <= 8:
                    raise ValueError(f"average_bits must be from 2 to 8, got {average}")
        self._check_float("pareto measures")
        check_model(model)
        with plain_context():
            pixels = pictures(calibration, model, processor, images, self.config.seed)[:]
            if len(pixels) < 8:
                raise ValueError(f"pareto needs at least 8 pictures, of which it holds two back; got {len(pixels)}")
            held_back = torch.arange(len(pixels)) % 4 == 3
            return pareto(model, pixels[~held_back], pixels[held_back], self.config, average_bits)

    def _check_float(self, what: str) -> None:
        if self.arithmetic == "integer":
            raise ValueError(
                f"{what} arithmetic='float', and this quantizer has 'integer'; let another assign bits, and pass this "
                "one overrides=assignment.overrides"
            )

    @staticmethod
    def optimize(model: Model, engine: str = "fused") -> Model:
        """Return a copy of a packed model whose encoder blocks run as one native call each; ``model`` is not changed.

        ``quantize_model`` does it already where it can; this is for a model made with ``engine="layers"``, or to be
        told why a block cannot be fused. With ``engine="layers"`` it is the way back, before an export.

        Raises:
            TypeError: not a module.
            RuntimeError: the native kernels were not built.
            ValueError: nothing in ``model`` is packed, or no block can be fused; the message says why.
        """
        _check_not_integers(model, "it has no layers to fuse, and none to run one by one")
        return optimize(model, engine)

    @staticmethod
    def dequantize_model(model: Model) -> Model:
        """Return a copy of a quantized model with float Linear layers again, which hold the rounded weights.

        For whatever knows only float models: ``ViTQuantizer.dequantize_model(quantized).save_pretrained(folder)``
        writes a folder that ``from_pretrained`` loads without this library.

        Raises:
            TypeError: not a module.
            ValueError: nothing in ``model`` is quantized.
        """
        _check_not_integers(model, "it has no float layers to go back to; keep the float model beside it")
        result = dequantize(model)
        disable_save_pretrained(result)
        return cast(Model, result)

    @staticmethod
    def pack_model(student: Model, engine: str = "auto", weight_storage: str = "packed") -> Model:
        """Return the packed model of an emulated one, with the very integers and grids that it has, trained or not.

        ``student`` is not changed; the packed model is in eval mode, and fused, saved and loaded as any other.

        Args:
            student: what :meth:`quantize_model` returned with ``execution="emulated"``.
            engine: as for :meth:`quantize_model`.
            weight_storage: "packed" or "unpacked", as for :class:`ViTQuantizer`.

        Raises:
            TypeError: not a module.
            RuntimeError: ``engine="fused"``, and the native kernels were not built.
            ValueError: no layer of ``student`` is emulated, a weight is NaN or Inf, or as :meth:`quantize_model` says
                of the engine.
        """
        return pack(student, engine, weight_storage)

    @staticmethod
    def save(model: nn.Module, path: str | os.PathLike[str], information: Mapping[str, Any] | None = None) -> None:
        """Write a packed or integer-only model to one .safetensors file, whole or not at all; :meth:`load` reads it.

        A HuggingFace model also has ``save_pretrained``, for a folder that ``from_pretrained`` loads.

        Args:
            model: what :meth:`quantize_model` returned; on any device.
            path: of the file.
            information: anything that JSON can hold, to be kept in the file for people.

        Raises:
            TypeError: not a module.
            ValueError: nothing in it is packed, or another suffix.
            FileNotFoundError: the folder does not exist.
        """
        checkpoint.save(model, path, information)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Model | None = None, engine: str = "auto") -> Model:
        """Return a packed copy of ``model`` with the weights that :meth:`save` wrote; ``model`` stays as it is.

        The logits are those of the model that was saved, to the last bit. The file may come from another version of
        transformers.

        Args:
            path: of the file; its checksums are compared before anything is made of it.
            model: a float model of the same architecture and config, with any weights. The file of an integer-only
                model needs none, and gets its config and class from one. What tensors do not show, such as the number
                of heads, the activation and epsilons, is not in the file, and taken from ``model``.
            engine: as for :meth:`quantize_model`.

        Raises:
            TypeError: not a module.
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of a later version, or does not fit ``model``; the message names file and
                field.
        """
        result, information = checkpoint.load(path, model, engine)
        enable_save_pretrained(result, information)
        return result

    @staticmethod
    def export(
        model: nn.Module,
        path: str | os.PathLike[str],
        format: str = "onnx",
        sample: Any = None,
        *,
        external_data: bool | None = None,
        onnx_ops: str = "onnxruntime",
        pixels: str | None = None,
        free_size: bool = False,
    ) -> ExportReport:
        """Write a packed model as a file that runs without this library, verified before it appears at ``path``.

        Args:
            model: what ``quantize_model`` returned, on the CPU; it is not changed.
            path: ending in .onnx, .xml (of OpenVINO, with its .bin beside it), .pt, .pt2 or .bin.
            format: "onnx", "openvino", "torchscript", "torch_export" or, of an integer-only model, "c".
            sample: a processor's output or pixel values, for verification; None for noise.
            external_data: keep the weights of an ONNX file in a second one; None for only where they exceed 2 GB.
            onnx_ops: "standard" for operators of ONNX alone, "onnxruntime" for what is fastest there.
            pixels: what the file of an integer-only model takes: "uint8" (None) or "float32", rounded first.
            free_size: take pictures of any height and width in whole patches, too, as the model does when it resizes
                its position embeddings; ONNX, OpenVINO and torch.export only.

        Raises:
            TypeError, ValueError: not a packed model on the CPU, an unknown format, a suffix that does not fit it, a
                model that takes one size only.
            FileNotFoundError: the folder does not exist.
            ImportError: ``pip install -e ".[onnx]"``, or ``".[openvino]"``, is needed.
            RuntimeError: the file does not run, gives other outputs, or holds float weights; nothing is left.
        """
        return export(
            model, path, format, sample,
            external_data=external_data, onnx_ops=onnx_ops, pixels=pixels, free_size=free_size,
        )  # fmt: skip


def _check_not_integers(model: nn.Module, what: str) -> None:
    if isinstance(model, IntegerViT):
        raise ValueError(f"the model is an integer-only one already: {what}")
