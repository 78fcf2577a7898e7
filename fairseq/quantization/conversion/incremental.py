"""Quantizing a model while its weights arrive, block by block: no more than a block or two are ever in float."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fairseq.modules.quantization.context import plain_context
from fairseq.quantization.architectures.plan import LayerPlan, resolve
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import Sizes, finish, make_report, with_engine
from fairseq.quantization.conversion.embeddings import pack_embeddings
from fairseq.quantization.conversion.quantize_stage import Finished, quantize_stage
from fairseq.quantization.engine import memory
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.evaluation.report import QuantizationReport

INITIALIZED = "_is_hf_initialized"


class WhileLoading:
    """Quantizes ``model`` in place, without calibration: the same integers as ``convert`` of the loaded model has.

    Args:
        model: the float model, its weights on the meta device until they are loaded.
        config: what to do; packed execution.
        engine: as for ``convert``.

    Raises:
        ValueError: as ``convert``, for what needs no weights to be seen.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig, engine: str = "auto"):
        check_engine(engine, config.execution)
        if config.execution != "packed":
            raise ValueError(
                f"a model is quantized while it is loaded for execution='packed', got {config.execution!r}"
            )
        if config.rotate:
            raise ValueError("rotate=True needs all weights at once; load the float model and pass it to ViTQuantizer")
        self.model, self.config, self.engine = model, config, engine
        self.before = Sizes.of(model)
        with plain_context():
            self.plan = resolve(model, config)
        self.finished = Finished()
        self.stages = self.plan.stages()
        self.blocks = {block: stage for stage in self.stages if (block := stage[0].block) is not None}

    def wants(self, name: str) -> bool:
        """Whether a parameter is the weight of a layer in a block that is still to be quantized."""
        layer = self.plan.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return layer is not None and layer.chosen and layer.block in self.blocks

    def advance(self) -> None:
        """Quantize the blocks whose weights are all there, and buffers, without which a block does not run."""
        for block in list(self.blocks):
            module = self.model.get_submodule(block)
            if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                self._quantize(self.blocks.pop(block))
                for part in module.modules():  # or transformers would initialize the weights that are gone
                    vars(part)[INITIALIZED] = True

    def finish(self) -> QuantizationReport:
        """Quantize what is left and make the model ready to run."""
        for stage in self.stages:
            if stage[0].name not in self.finished.records:
                self._quantize(stage)
        for part in self.model.modules():
            vars(part).pop(INITIALIZED, None)
        with plain_context():
            embeddings = pack_embeddings(self.model, self.plan.embeddings, None)
            reasons = finish(self.model, self.engine)
        report = make_report(self.model, self.plan, self.before, self.finished.records)
        return replace(with_engine(report, reasons), layers=(*embeddings, *report.layers))

    def _quantize(self, stage: list[LayerPlan]) -> None:
        with plain_context():
            for _ in quantize_stage(self.model, stage, self.plan, self.config, self.finished):
                memory.release()
