"""fuse and unfuse: the encoder blocks of a packed model as native calls, where those give what the layers give."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.config import check_one_of
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.modules.quantization.packed.linear import use_native
from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.layers import block_of
from fairseq.quantization.engine.check import compare
from fairseq.quantization.engine.fused_block import BLOCKS, FusedBlock, fused_class
from fairseq.quantization.engine.known_block import remember_code
from fairseq.quantization.engine.patch_convolution import PatchConvolution, reason_not_patches
from fairseq.quantization.engine.plan import FusedPlan, fused_plan, unfused_class
from fairseq.quantization.engine.runners import reason_not_runnable

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

ENGINES = ("auto", "fused", "layers")


def check_engine(engine: str, execution: str = "packed") -> None:
    """ValueError unless it is one of :data:`ENGINES`, and one that such a model can have."""
    check_one_of("engine", engine, ENGINES)
    if engine == "fused" and execution != "packed":
        raise ValueError(f"engine='fused' runs packed integers; execution={execution!r} holds none")


def optimize(model: Model, engine: str = "fused") -> Model:
    """A copy of a packed model whose encoder blocks run as one native call each; see :func:`fuse`.

    With "layers" it is one that runs layer by layer, its integers in rows: for exporters.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is packed; an unknown engine; or as :func:`fuse`.
    """
    check_engine(engine)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("nothing in the model is packed; pass what quantize_model returned with execution='packed'")
    result = copied(model)
    if engine == "layers":
        unfuse(result)
    else:
        fuse(result, engine)
    return result


def fuse(model: nn.Module, engine: str = "fused") -> dict[str, str | None]:
    """Let the native kernels run a packed model, in place: its encoder blocks fused, its other layers one by one.

    The patch embeddings in float32 of such blocks become a
    :class:`~fairseq.quantization.engine.patch_convolution.PatchConvolution`.

    A block is fused if its class and the classes of all its parts are known, and its native block was seen to give what
    its layers give: once for each class, configuration and device, the CPU or a GPU; for a model elsewhere that is seen
    when it comes there.

    Args:
        model: what ``quantize_model`` returned; on any device, though only what is on the CPU or on a GPU runs fused.
        engine: "fused", or "auto", which leaves a model as it is where nothing can be fused.

    Returns:
        For each encoder block by name, None if it is fused, or why it is not.

    Raises:
        RuntimeError: the native kernels were not built, and the model is not on a GPU ("fused" only).
        ValueError: not one block can be fused ("fused" only); the message says why.
    """
    on_gpu = any(buffer.is_cuda for buffer in model.buffers())
    if not native.levels() and not on_gpu:
        if engine == "fused":
            raise RuntimeError(f"engine='fused' needs the native kernels: {library.NOT_BUILT}")
        return {}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    use_native(layer for layer in packed if layer.reason_not_native() is None)
    blocks = {name: model.get_submodule(name) for name in _blocks(model)}
    plans = {name: _plan(block) for name, block in blocks.items()}
    reasons = {name: plan if isinstance(plan, str) else None for name, plan in plans.items()}
    if engine == "fused" and all(reasons.values()):
        found = [f"{name}: {reason}" for name, reason in reasons.items()]
        raise ValueError(
            f"engine='fused': no encoder block can be fused; {found[0] if found else 'there is none in it'}"
        )
    for name, plan in plans.items():
        if isinstance(plan, str):
            logger.info("%s is not fused: %s", name, plan)
            continue
        block = cast(FusedBlock, blocks[name])
        block.plan, block._native = plan, None
        block.__class__ = fused_class(unfused_class(type(block)))
        BLOCKS[id(block)] = block
    for name, module in model.named_modules():
        if reason_not_patches(module) is None and _leads_to_fused(name, reasons):
            module.__class__ = PatchConvolution
    return reasons


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.__class__ = unfused_class(type(module))
            del module.plan, module._native
        elif type(module) is PatchConvolution:
            module.__class__ = cast(Any, nn.Conv2d)
    use_native((module for module in model.modules() if isinstance(module, PackedLinear)), use=False)


def _blocks(model: nn.Module) -> list[str]:
    """The encoder blocks of a packed model: those of a known class, and what else holds several packed layers so."""
    known = [name for name, module in model.named_modules() if class_of(unfused_class(type(module)))]
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    others = Counter(block for name in packed if (block := block_of(name)) is not None)
    inside = tuple(f"{name}." if name else "" for name in known)
    several = [name for name, count in others.items() if count > 1]
    return known + [name for name in several if name not in known and not f"{name}.".startswith(inside)]


def _leads_to_fused(name: str, reasons: dict[str, str | None]) -> bool:
    """Whether the smallest part of a model that holds that module and encoder blocks has fused ones."""
    while name:
        name = name.rpartition(".")[0]
        prefix = f"{name}." if name else ""
        found = [reason for block, reason in reasons.items() if block.startswith(prefix)]
        if found:
            return None in found
    return False


def _plan(block: nn.Module) -> FusedPlan | str:
    plan = fused_plan(block, unfused_class(type(block)))
    if isinstance(plan, str):
        return plan
    if reason := reason_not_runnable(block, plan):
        cpu = all(tensor.device.type == "cpu" for tensor in (*block.parameters(), *block.buffers()))
        return reason if cpu else plan  # elsewhere it runs when it comes to a device that can
    finding = compare(block, plan)
    if finding.reason is None:
        remember_code(block)
    return finding.reason or replace(plan, returns=finding.returns)
