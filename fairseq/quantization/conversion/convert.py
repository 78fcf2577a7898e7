"""convert: a copy of a model whose selected layers are quantized, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan, check_model, resolve
from fairseq.quantization.architectures.separate import separated
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.block_inputs import BlockInputs
from fairseq.quantization.calibration.calibration import Calibration
from fairseq.quantization.calibration.progress import Progress
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.embeddings import pack_embeddings
from fairseq.quantization.conversion.quantize_stage import Finished, Watch, quantize_stage, restore_stage
from fairseq.quantization.conversion.resume import DoneStage, Resume
from fairseq.quantization.engine import memory
from fairseq.quantization.engine.fuse import check_engine, fuse
from fairseq.quantization.evaluation.report import LayerReport, QuantizationReport
from fairseq.quantization.rounding.rotation import rotated


class Learner(Protocol):
    """Learns the blocks of one model."""

    def reconstruct(self, stage: Sequence[LayerPlan], done: DoneStage) -> None:
        """Change one block, whose layers are quantized by now, and ``done`` as well."""


class Learning(Protocol):
    """How blocks are learned after they are rounded; its repr says all of it."""

    def check(self, pictures: int, resumable: bool) -> None:
        """ValueError if so many pictures are too few, or if it cannot be resumed and should be."""

    def start(self, plan: ModelPlan) -> ModelPlan:
        """The plan by which blocks are rounded before they learn."""

    def learner(
        self, model: nn.Module, plan: ModelPlan, calibration: Calibration, config: QuantizationConfig
    ) -> Learner:
        """What learns the blocks of ``model``."""


def convert(
    model: nn.Module,
    config: QuantizationConfig,
    pixel_values: Pixels | None = None,
    engine: str = "auto",
    follow: Callable[[nn.Module, nn.Module, Any, list[str]], BlockInputs] = BlockInputs,
    resume: str | os.PathLike[str] | None = None,
    reconstruct: Learning | None = None,
    watch: Watch | None = None,
) -> tuple[nn.Module, QuantizationReport]:
    """Quantize a deep copy of ``model``: (the copy, what was done). ``model`` stays as it is.

    Block by block: equalize it, see what its layers read, round them, swap them. Float weights that become packed
    integers are copied for one block at a time: at its peak, memory holds the float model, the quantized one, a block
    and what rounding one layer takes; the hidden states of the calibration images are in temporary files, see
    :class:`~fairseq.quantization.calibration.storage.Storage`. The integers are the same whatever
    autocast, default dtype or device, or gradient mode is on around the call.

    Args:
        model: a Vision Transformer.
        config: what to do.
        pixel_values: calibration images, (N, C, H, W), or None.
        engine: "auto", "fused" or "layers", see :mod:`fairseq.quantization.engine`.
        follow: makes the :class:`BlockInputs` on which layers are rounded, of the same arguments.
        reconstruct: how the integers of each block are learned, a
            :class:`~fairseq.quantization.reconstruction.settings.Reconstruction`; None for not.
        watch: is told of each layer before it is rounded.
        resume: a folder for what is finished, see :class:`~fairseq.quantization.conversion.resume.Resume`.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``engine="fused"``, and the native kernels were not built.
        ValueError: it holds no weights (meta device), is quantized already, has none of the known layers, an override
            matches none of them, a weight is not finite, a setting needs calibration images and there are none, or
            ``engine="fused"`` and no block can be. The message names the layer.
    """
    check_engine(engine, config.execution)
    native.check_environment()
    check_model(model)
    if reconstruct is not None:
        if pixel_values is None:
            raise ValueError("reconstruct= learns from images: call quantize_model(model, calibration=images)")
        reconstruct.check(len(pixel_values) // getattr(pixel_values, "views", 1), resume is not None)
    with plain_context():
        model = separated(model)
        if isinstance(pixel_values, Tensor) and pixel_values.is_inference():
            pixel_values = pixel_values.clone()
        if config.rotate:
            model = rotated(model, config.seed)
        plan = resolve(model, config, pixel_values)
        plan = plan if reconstruct is None else reconstruct.start(plan)
        packed = config.execution == "packed"
        weightless = [model.get_submodule(layer.name) for layer in plan.chosen]
        result = copied(model, _without_weights(model, weightless) if packed else None)
        finished = Finished()
        kept = None if resume is None else Resume(resume, model, config, pixel_values, reconstruct)
        with Progress(model, plan, 0 if pixel_values is None else len(processes.share(len(pixel_values)))) as progress:
            weights = None if kept is None else kept.error_weights()
            calibration = None
            if pixel_values is not None:
                if plan.family.by_rule:  # whose blocks may run in any order, all of them for each layer
                    for layer in plan.chosen:
                        _materialize(result, model, layer.name)
                calibration = Calibration(
                    model, result, plan, pixel_values, config.seed, progress, follow, weights, bool(reconstruct),
                    all_widths=watch is not None,
                )  # fmt: skip
                memory.release()
                if kept is not None and weights is None:
                    kept.keep_error_weights(calibration.weights, calibration.moments)
            learner = None
            if reconstruct is not None:
                assert calibration is not None
                learner = reconstruct.learner(result, plan, calibration, config)
            for number, stage in enumerate(plan.stages()):
                for layer in stage:
                    _materialize(result, model, layer.name)
                done = None if kept is None else kept.load(number, stage)
                if done is not None:
                    for layer in restore_stage(result, stage, config, finished, done):
                        progress.skipped(layer)
                    continue
                done = None if kept is None and learner is None else DoneStage()
                keep_weights = learner is not None
                for layer in quantize_stage(
                    result, stage, plan, config, finished, calibration, done, keep_weights, watch
                ):
                    progress.rounded(layer)
                if learner is not None and done is not None:
                    learner.reconstruct(stage, done)
                    finished.records.update({name: rounded.record for name, (rounded, _) in done.layers.items()})
                memory.release()
                if kept is not None and done is not None:
                    kept.save(number, done)
        embeddings = pack_embeddings(result, plan.embeddings, pixel_values)
        reasons = finish(result, engine if packed else "layers")
        report = make_report(result, plan, Sizes.of(model), finished.records, config.execution)
        if kept is not None:
            kept.remove()
    return result, replace(with_engine(report, reasons), layers=(*embeddings, *report.layers))


def finish(model: nn.Module, engine: str) -> dict[str, str | None]:
    """Make a model with quantized layers ready to run, in place; what :func:`fuse` says of its blocks."""
    if tuple_while_tracing not in model._forward_hooks.values():  # a copy of one that was finished has it
        model.register_forward_hook(tuple_while_tracing)
    reasons = fuse(model, engine) if engine != "layers" else {}
    memory.release()
    return reasons


def with_engine(report: QuantizationReport, reasons: Mapping[str, str | None]) -> QuantizationReport:
    """The report with what :func:`finish` returned."""
    not_fused = {name: reason for name, reason in reasons.items() if reason is not None}
    return replace(report, fused_blocks=len(reasons) - len(not_fused), not_fused=not_fused)


def tuple_while_tracing(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: HuggingFace's outputs are dictionaries, which torch.jit.trace refuses; give it a tuple."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return output.to_tuple() if tracing and hasattr(output, "to_tuple") else output


class Sizes(NamedTuple):
    """What a float model takes: shape and bytes of each Linear by name, and the bytes of all parameters and buffers."""

    layers: dict[str, tuple[tuple[int, int], int]]
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        layers = cast(dict[str, nn.Linear], linear_layers(model))
        return cls({n: ((x.out_features, x.in_features), bytes_of(x)) for n, x in layers.items()}, bytes_of(model))


def make_report(
    result: nn.Module,
    plan: ModelPlan,
    before: Sizes,
    records: Mapping[str, Mapping[str, Any]],
    execution: str = "packed",
) -> QuantizationReport:
    """What became of each Linear."""
    reports = []
    for name, layer in plan.layers.items():
        shape, size = before.layers[name]
        after = bytes_of(result.get_submodule(name))
        report = LayerReport(name, layer.component, shape, size, after, block=layer.block)
        if layer.chosen:
            report = replace(report, bits=layer.settings.bits, method=layer.settings.method, **records[name])
        else:
            report = replace(report, skipped=str(layer.decision))
        reports.append(report)
    return QuantizationReport(tuple(reports), before.total, bytes_of(result), execution)


def _without_weights(model: nn.Module, chosen: list[nn.Module]) -> dict[int, Any]:
    """A memo for deepcopy that leaves out the weights of the ``chosen`` layers, unless another module uses them."""
    kept = {id(p) for module in model.modules() if module not in chosen for p in module._parameters.values()}
    weights = [w for layer in chosen if isinstance(w := layer.weight, nn.Parameter) and id(w) not in kept]
    return {id(w): nn.Parameter(w.new_empty(0), requires_grad=w.requires_grad) for w in weights}


def _materialize(result: nn.Module, model: nn.Module, name: str) -> None:
    """Give a layer of the copy its float weight, which deepcopy left out."""
    linear = cast(nn.Linear, result.get_submodule(name))
    source = cast(nn.Linear, model.get_submodule(name)).weight
    if linear.weight.shape != source.shape:
        linear.weight = nn.Parameter(source.detach().clone(), requires_grad=source.requires_grad)


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
