"""Quantizing a model while its weights arrive, block by block: no more than a block or two are ever in float."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fairseq.quantization.architectures.layers import block_of, family_of, linear_layers
from fairseq.quantization.architectures.plan import check_data_free, make_plan, stages
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.conversion.convert import Conversion, Sizes, finish, make_report
from fairseq.quantization.conversion.embeddings import find_embeddings, pack_embeddings
from fairseq.quantization.engine import memory
from fairseq.quantization.engine.fused_block import check_engine
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
        self.model, self.config, self.engine = model, config, engine
        self.family = family_of(model)
        self.before = Sizes.of(model)
        self.embeddings = find_embeddings(model, self.family, config)
        self.plan = make_plan(linear_layers(model), config, self.family, self.embeddings)
        chosen = {name: layer for name, layer in self.plan.items() if isinstance(layer, LayerConfig)}
        check_data_free(chosen)
        self.work = Conversion(model, model, config, chosen, None, self.family)
        self.stages = stages(list(chosen))
        self.blocks = {block: names for names in self.stages if (block := block_of(names[0])) is not None}

    def wants(self, name: str) -> bool:
        """Whether a parameter is the weight of a layer in a block that is still to be quantized."""
        layer, _, last = name.rpartition(".")
        return last == "weight" and layer in self.blocks.get(block_of(layer) or "", ())

    def advance(self) -> None:
        """Quantize the blocks whose weights are all there."""
        for block in list(self.blocks):
            module = self.model.get_submodule(block)
            if not any(parameter.is_meta for parameter in module.parameters()):
                self._quantize(self.blocks.pop(block))
                for part in module.modules():  # or transformers would initialize the weights that are gone
                    vars(part)[INITIALIZED] = True

    def finish(self) -> QuantizationReport:
        """Quantize what is left and make the model ready to run."""
        for names in self.stages:
            if names[0] not in self.work.done:
                self._quantize(names)
        for part in self.model.modules():
            vars(part).pop(INITIALIZED, None)
        embeddings = pack_embeddings(self.model, self.embeddings, None)
        fused = finish(self.model, self.engine)
        report = make_report(self.model, self.plan, self.before, self.work.done, self.family)
        return replace(report, layers=(*embeddings, *report.layers), fused_blocks=fused)

    def _quantize(self, names: list[str]) -> None:
        for _ in self.work.quantize_stage(names):
            memory.release()
