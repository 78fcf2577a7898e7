"""The fused engine: encoder blocks of a packed model that run as one native call each."""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.modules.module as module_globals
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear, kernels
from fairseq.modules.quantization.packed.config import check_one_of
from fairseq.modules.quantization.packed.kernels import functional, native, operators
from fairseq.modules.quantization.packed.linear import use_native
from fairseq.modules.quantization.packed.no_gradient import NoGradient
from fairseq.quantization.architectures.layers import FUSABLE_BLOCKS, NORMS, layer_paths

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

ENGINES = ("auto", "fused", "layers")
SETTINGS = ("scaling", "num_attention_heads", "activation_fn", "intermediate_act_fn")
"""What the modules of a block are set to, and a native block was made for."""

HARMLESS = ("output_hidden_states", "return_dict", "interpolate_pos_encoding", "num_items_in_batch")
"""Arguments of a model that reach its blocks and change nothing in them."""


@dataclass(frozen=True)
class Plan:
    """Where a block keeps what the native kernels need.

    Attributes:
        layers: paths within the block of the query, key, value, output, fc1 and fc2 layers.
        norms: names of the LayerNorm before attention and of the one after.
        epsilons: of the two.
        heads: number of heads.
        scaling: what products of queries and keys are multiplied by.
    """

    layers: tuple[str, ...]
    norms: tuple[str, str]
    epsilons: tuple[float, float]
    heads: int
    scaling: float


class FusedBlock(nn.Module):
    """Put before the class of a block: its forward as one native call where that gives the same, else its own.

    It does on the CPU, in eval mode, without an attention mask, while nobody looks into the block: with hooks on what
    is in it, or attentions asked for, the block runs layer by layer. Parameters, buffers, their names and the state
    dict are those of the block as it was. The bits of an image's output depend neither on the rest of the batch nor
    on the number of threads. There is no gradient: RuntimeError in the backward pass.
    """

    plan: Plan
    _current: Current | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(images, tokens, width) -> the same, in the dtype of ``hidden_states``."""
        if not self._fits(hidden_states, args, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._run(hidden_states.detach())
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return NoGradient.apply(hidden_states, self)
        return self._run(hidden_states)

    @property
    def name(self) -> str:
        """How errors call the block."""
        path = self.plan.layers[0]
        return cast(PackedLinear, self.get_submodule(path)).name.removesuffix(f".{path}")

    def _fits(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the native block gives what this call asks for."""
        asked = [*args, *(value for key, value in kwargs.items() if key not in HARMLESS)]
        if self.training or functional.recording() or not kernels.runs_native("auto"):
            return False
        if any(value is not None and value is not False for value in asked):
            return False
        if x.ndim != 3 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        if torch.compiler.is_compiling():
            layers = [cast(PackedLinear, self.get_submodule(path)) for path in self.plan.layers]
            inner = [module for module in self.modules() if module is not self]
            return all(layer.panels is not None for layer in layers) and not _any_watched(inner)
        if self._current is None or not self._current.holds():
            self._current = Current.of(self)
        return self._current is not None and not _any_watched(self._current.inner)

    def _run(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32).contiguous()
        if torch.compiler.is_compiling():
            y = self._operator(x)
        else:
            assert self._current is not None
            y = native.run_block(self._current.block, x, native.level_number())
        return y.to(hidden_states.dtype)

    def _operator(self, x: Tensor) -> Tensor:
        plan = self.plan
        layers = [cast(PackedLinear, self.get_submodule(path)) for path in plan.layers]
        norms = [cast(nn.LayerNorm, self.get_submodule(name)) for name in plan.norms]
        return operators.native_block(
            x,
            [part for layer in layers for part in layer.parts()],
            [size for layer in layers for size in layer.sizes()],
            [tensor.detach().to(torch.float32) for norm in norms for tensor in (norm.weight, norm.bias)],
            plan.epsilons,
            plan.scaling,
            plan.heads,
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (_unfused(type(self)),), {**self.__dict__, "_current": None}  # pointers


class Current:
    """The native block of a :class:`FusedBlock` as its parts are now."""

    def __init__(self, block: nn.Module, plan: Plan):
        layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
        norms = [cast(nn.LayerNorm, block.get_submodule(name)) for name in plan.norms]
        tensors = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
        floats = [tensor.detach().to(torch.float32).contiguous() for tensor in tensors]
        prepared = [layer.prepared() for layer in layers]
        self.block = native.make_block(prepared, floats, plan.epsilons, plan.scaling, plan.heads)
        self.inner = [module for module in block.modules() if module is not block]
        self.seen: list[tuple[dict[str, Any], str]] = [
            *((module._modules, name) for module in block.modules() for name in module._modules),
            *((layer._buffers, name) for layer in layers for name in PackedLinear.PARTS),
            *((norm._parameters, name) for norm in norms for name in ("weight", "bias")),
            *((norm.__dict__, "eps") for norm in norms),
            *((module.__dict__, name) for module in self.inner for name in SETTINGS if name in module.__dict__),
        ]
        self.found = [holder[name] for holder, name in self.seen]
        self.addressed = [thing for thing in self.found if isinstance(thing, Tensor)]
        self.pointers = [tensor.data_ptr() for tensor in self.addressed]
        copied = [tensor for tensor in tensors if tensor.dtype != torch.float32]
        self.versions: list[tuple[Tensor, int]] = [(tensor, native.version(tensor)) for tensor in copied]
        self.versions += [pair for layer in prepared for pair in layer.versions]

    @classmethod
    def of(cls, block: FusedBlock) -> Current | None:
        """None where a part no longer fits, or is not on the CPU."""
        plan = _plan(block)
        if isinstance(plan, str):
            return None
        block.plan = plan
        layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
        return None if any(layer.panels is None for layer in layers) else cls(block, plan)

    def holds(self) -> bool:
        """Whether the block still has the same modules, tensors and settings; of copies, that they are unchanged.

        A copied tensor that is changed behind PyTorch's back, through ``.data``, is not noticed.
        """
        for (holder, name), found in zip(self.seen, self.found):
            if holder.get(name) is not found:
                return False
        return self.pointers == [tensor.data_ptr() for tensor in self.addressed] and all(
            native.version(tensor) == number for tensor, number in self.versions
        )


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
    result = copy.deepcopy(model)
    if engine == "layers":
        unfuse(result)
    else:
        fuse(result, engine)
    return result


def fuse(model: nn.Module, engine: str = "fused") -> dict[str, str | None]:
    """Let the native kernels run a packed model, in place: its encoder blocks fused, its other layers one by one.

    Args:
        model: what ``quantize_model`` returned; on any device, though only what is on the CPU runs natively.
        engine: "fused", or "auto", which leaves a model as it is where nothing can be fused.

    Returns:
        For each encoder block by name, None if it is fused, or why it is not.

    Raises:
        RuntimeError: the native kernels were not built ("fused" only).
        ValueError: not one block can be fused ("fused" only); the message says why.
    """
    if not native.levels():
        if engine == "fused":
            raise RuntimeError(f"engine='fused' needs the native kernels: {native.NOT_BUILT}")
        return {}
    blocks = {name: module for name, module in model.named_modules() if _fusable_class(module)}
    plans = {name: _plan(block) for name, block in blocks.items()}
    reasons = {name: plan if isinstance(plan, str) else None for name, plan in plans.items()}
    if engine == "fused" and all(reasons.values()):
        found = [f"{name}: {reason}" for name, reason in reasons.items()]
        why = found[0] if found else "there is no block of a ViT or DeiT in it"
        raise ValueError(f"engine='fused': no encoder block can be fused; {why}")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    use_native(layer for layer in packed if layer.reason_not_native() is None)
    for name, plan in plans.items():
        if isinstance(plan, str):
            logger.info("%s is not fused: %s", name, plan)
            continue
        block = cast(FusedBlock, blocks[name])
        block.plan, block._current = plan, None
        block.__class__ = _fused(_unfused(type(block)))
    return reasons


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.__class__ = _unfused(type(module))
            del module.plan, module._current
    use_native((module for module in model.modules() if isinstance(module, PackedLinear)), use=False)


def _plan(block: nn.Module) -> Plan | str:
    """How the native kernels run a block, or why they cannot."""
    paths = layer_paths(block)
    layers = {role: block.get_submodule(path) for role, path in paths.items()}
    for role, layer in layers.items():
        if not isinstance(layer, PackedLinear):
            return f"its {role} layer is not packed"
        if reason := layer.reason_not_native():
            return f"its {role} layer: {reason}"
    packed = cast(dict[str, PackedLinear], layers)
    readers = [packed[role] for role in ("query", "key", "value")]
    grids = {layer.input_grid.key() for layer in readers}
    if len(grids) > 1 or any(layer.input_factor is not None for layer in readers):
        return "its query, key and value layers round their input differently"
    norms = [getattr(block, name, None) for name in NORMS]
    if any(type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None for norm in norms):
        return "its norms are not LayerNorms with weight and bias"
    attention = [m for m in block.modules() if hasattr(m, "num_attention_heads") and hasattr(m, "scaling")]
    if len(attention) != 1:
        return "it has no attention module with num_attention_heads and scaling"
    heads, scaling = int(attention[0].num_attention_heads), float(attention[0].scaling)  # type: ignore[arg-type]
    if not scaling > 0:
        return f"its scaling is {scaling}"
    if packed["query"].out_features % heads:
        return f"its {packed['query'].out_features} columns do not divide into {heads} heads"
    if not _has_gelu(block):
        return "its activation is not the exact GELU"
    before, after = cast(list[nn.LayerNorm], norms)
    return Plan(tuple(paths.values()), NORMS, (before.eps, after.eps), heads, scaling)


@torch.no_grad()
def _has_gelu(block: nn.Module) -> bool:
    """Whether the activation of the MLP is the exact GELU: as it computes, whatever its class."""
    names = ("activation_fn", "intermediate_act_fn")
    functions = [getattr(module, name) for module in block.modules() for name in names if hasattr(module, name)]
    x = torch.linspace(-6, 6, 97)
    return len(functions) == 1 and torch.allclose(functions[0](x), F.gelu(x), rtol=0, atol=1e-6)


def _any_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether someone sees what goes through one of the modules, or has changed what it does."""
    if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
        return True
    for module in modules:
        forward = module.__dict__.get("forward")  # some transformers put the method itself there after a call
        if module.training or (forward and getattr(forward, "__func__", None) is not type(module).forward):
            return True
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if _active(hook):
                return True
    return False


def _active(hook: Any) -> bool:
    """Whether a hook does something: those of transformers stay after the call that collected attentions is over."""
    recorder = sys.modules.get("transformers.utils.output_capturing")
    if recorder is None or getattr(hook, "__module__", None) != recorder.__name__:
        return True
    collector = getattr(recorder, "_active_collector", None)
    return collector is None or bool(set(collector.get() or ()) - {"hidden_states", "_hidden_states_layers"})


def _fusable_class(module: nn.Module) -> bool:
    return _unfused(type(module)).__name__ in FUSABLE_BLOCKS


def _unfused(kind: type) -> type:
    return kind.__mro__[2] if issubclass(kind, FusedBlock) else kind


@functools.cache
def _fused(kind: type) -> Any:
    """The class of a fused block of a ``kind``."""
    return type(f"Fused{kind.__name__}", (FusedBlock, kind), {"__module__": __name__, "__doc__": FusedBlock.__doc__})


def _new(kind: type) -> Any:
    """An empty fused block of a kind, for pickle and copy, which know no class made on the fly."""
    fused = _fused(kind)
    return fused.__new__(fused)
