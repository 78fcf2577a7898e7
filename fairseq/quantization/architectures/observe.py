"""What a forward pass shows: which layers are called with one tensor, and that a norm feeds just what it seems to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import on_device
from fairseq.quantization.architectures.blocks import BlockPlan
from fairseq.quantization.architectures.forward import Pixels, call, evaluating, picture_inputs, vision_config

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

SIZE = 224
"""Of a picture for a model that does not say which it takes."""
TOKENS = 8
"""Of a text, and of the input of a block that no forward pass was seen to reach."""


class Observation(NamedTuple):
    """What one picture showed on its way through a model.

    Attributes:
        shares: layer -> the first layer that was called with the very same tensor, itself if it was the first. Layers
            that were called more than once or not at all are missing.
        calls: block -> the arguments of its one call, copied.
        reached: the layers that pictures reach, whatever else the model is given.
        repeated: the LayerNorms that were called more than once, by the full name.
        failure: why there was no forward pass, or None.
    """

    shares: Mapping[str, str]
    calls: Mapping[str, Arguments]
    reached: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    failure: str | None = None

    def source(self, layer: str) -> str:
        """The name of the tensor that a layer reads: that of the first layer that was called with it."""
        return self.shares.get(layer, layer)


NOTHING = Observation({}, {})
"""Before anything was looked at: every layer reads a tensor of its own, and nothing is known of any block."""


def observe(
    model: nn.Module,
    layers: Sequence[str],
    blocks: Sequence[str],
    pixel_values: Pixels | None = None,
    text: bool = False,
) -> Observation:
    """Run ``model`` on one picture, in eval mode, and see what its layers and blocks are called with.

    On the meta device nothing is computed, and shapes alone are seen.

    Args:
        model: it stays as it is, and so does the state of the random number generators.
        layers: names of Linear layers.
        blocks: names of encoder blocks.
        pixel_values: pictures, (N, C, H, W), whose first is taken; None for noise of the size in the model's config.
        text: also run the text tower of a model that has one.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model)  # a model may keep what it computes, as BEiT does, which has no numbers here
    seen = _watched(model, layers, blocks, pixel_values, text=False)
    rest = [name for name in layers if name not in seen.reached]
    if seen.failure is not None or not text or not rest:
        return seen
    with_text = _watched(model, rest, [name for name in blocks if name not in seen.calls], pixel_values, text=True)
    return seen._replace(
        shares={**seen.shares, **with_text.shares},
        calls={**seen.calls, **with_text.calls},
        repeated=seen.repeated | with_text.repeated,
    )


def _watched(
    model: nn.Module, layers: Sequence[str], blocks: Sequence[str], pixel_values: Pixels | None, text: bool
) -> Observation:
    watch = _Watch(model, layers, blocks)
    try:
        inputs = _sample(model, pixel_values, text)
        where = on_device(inputs["pixel_values"].device)  # for what a model makes on its way, on the meta device
        with watch, evaluating(model), torch.no_grad(), torch.random.fork_rng(_cuda(model)), where:
            call(model, inputs)
    except Exception as error:  # whatever a model raises that is not called as we call it
        return Observation({}, {}, failure=f"{type(error).__name__}: {error}")
    calls = {name: calls[0] for name, calls in watch.calls.items() if len(calls) == 1}
    reached = frozenset(name for name, count in watch.counts.items() if count)
    return Observation(watch.shares, calls, reached, frozenset(n for n, count in watch.norms.items() if count > 1))


def folds(block: nn.Module, plan: BlockPlan, arguments: Arguments | None) -> bool:
    """Whether the factors that equalization moves between the layers of a block cancel, as seen by running it.

    Each norm's output is multiplied channel by channel with a power of two, its readers' weights are divided by it,
    and likewise between the value and the output layer. Scaling by powers of two is exact, so that the block computes
    the same to the last bit, unless something else reads one of these tensors.

    Args:
        block: of float layers; it stays as it is.
        plan: of the block.
        arguments: of a call, see :class:`Observation`; None for a few tokens of noise.
    """
    if not all(type(block.get_submodule(path)) is nn.Linear for path in plan.layers.values()):
        return False
    watched = [block.get_submodule(path) for path in (*plan.norms, *plan.layers.values())]
    if any(module._forward_hooks or module._forward_pre_hooks for module in watched):
        return False  # whatever a hook sees may be read outside of the block
    plain = {name: p.detach().clone() for name, p in _involved(block, plan).items()}
    scaled = _scaled(block, plan, plain)
    with evaluating(block), torch.no_grad(), torch.random.fork_rng(_cuda(block)):
        for args, keywords in _attempts(block, plan, arguments):
            try:
                first, second = (
                    _tensors(torch.func.functional_call(block, parameters, *copied((args, keywords))))
                    for parameters in (plain, scaled)
                )
            except Exception:  # called in another way than this block is
                continue
            return len(first) == len(second) > 0 and all(map(_same, first, second))
    return False


def copied(value: Any, device: torch.device | None = None) -> Any:
    """Arguments with new tensors, which a block may write into; those of the meta device become noise."""
    if isinstance(value, Tensor):
        if not value.is_meta or device is None:
            return value.detach().clone()
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(device)
        return noise.to(value.dtype) if value.is_floating_point() else torch.zeros_like(value, device=device)
    if type(value) in (list, tuple):
        return type(value)(copied(item, device) for item in value)
    if type(value) is dict:
        return {key: copied(item, device) for key, item in value.items()}
    return value


def equal(first: Any, second: Any) -> bool:
    """Whether two arguments hold the same: tensors with the same numbers, or else the very same objects."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if type(first) in (list, tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if type(first) is dict:
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return first is second or bool(first == second)


class _Watch:
    """Hooks that record, for as long as it is entered, what layers and blocks are called with."""

    def __init__(self, model: nn.Module, layers: Sequence[str], blocks: Sequence[str]):
        self.model, self.layers, self.blocks = model, layers, blocks
        self.shares: dict[str, str] = {}
        self.calls: dict[str, list[Arguments]] = {name: [] for name in blocks}
        self.seen: list[tuple[str, Tensor, Tensor]] = []  # layer, its input, and what was in that at the time
        self.counts: dict[str, int] = dict.fromkeys(layers, 0)
        self.norms = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        self.hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        for name in self.blocks:
            module = self.model.get_submodule(name)
            self.hooks.append(module.register_forward_pre_hook(self._block(name), with_kwargs=True))
            self.hooks.append(module.register_forward_hook(lambda *_: self.seen.clear()))
        for name in self.layers:
            self.hooks.append(self.model.get_submodule(name).register_forward_pre_hook(self._layer(name)))
        for name in self.norms:
            self.hooks.append(self.model.get_submodule(name).register_forward_pre_hook(self._norm(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for name, count in self.counts.items():
            if count != 1:
                self.shares.pop(name, None)

    def _block(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
            self.calls[name].append(copied((args, keywords)))

        return look

    def _norm(self, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.norms[name] += 1

        return count

    def _layer(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            self.counts[name] += 1
            if not args or not isinstance(args[0], Tensor):
                return
            x = args[0]
            first = next((n for n, other, content in self.seen if _one_tensor(x, other, content)), name)
            self.shares[name] = first
            self.seen.append((name, x, x.clone()))

        return look


def _one_tensor(x: Tensor, other: Tensor, content: Tensor) -> bool:
    """Whether ``x`` is ``other``, and still holds the ``content`` that was there."""
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (x, other)]
    return places[0] == places[1] and (x.is_meta or torch.equal(x, content))


def _involved(block: nn.Module, plan: BlockPlan) -> dict[str, Tensor]:
    """The parameters that equalization changes, by their names in the block."""
    paths = [*plan.norms, *plan.layers.values()]
    found = {
        f"{path}.{last}": block.get_submodule(path)._parameters.get(last)
        for path in paths
        for last in ("weight", "bias")
    }
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def _scaled(block: nn.Module, plan: BlockPlan, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These parameters, rescaled by powers of two that cancel."""
    generator = torch.Generator().manual_seed(0)
    scaled = dict(plain)

    def factor(like: Tensor) -> Tensor:
        return (2.0 ** torch.randint(-2, 3, (len(like),), generator=generator)).to(like.device, like.dtype)

    def times(name: str, by: Tensor) -> None:
        if name in scaled:
            scaled[name] = scaled[name] * by

    for norm, roles in plan.norms.items():
        r = factor(plain[f"{norm}.weight"])
        times(f"{norm}.weight", r)
        times(f"{norm}.bias", r)
        for role in roles:
            times(f"{plan.layers[role]}.weight", 1 / r)
    if plan.value_feeds_output:
        value, output = plan.layers["value"], plan.layers["output"]
        r = factor(plain[f"{value}.weight"])
        times(f"{value}.weight", r[:, None])
        times(f"{value}.bias", r)
        times(f"{output}.weight", 1 / r)
    return scaled


def _attempts(block: nn.Module, plan: BlockPlan, arguments: Arguments | None) -> list[Arguments]:
    weight = block.get_submodule(next(iter(plan.norms))).get_parameter("weight")
    if arguments is not None:
        return [copied(arguments, weight.device)]
    noise = torch.randn(1, TOKENS, len(weight), generator=torch.Generator().manual_seed(0))
    x = noise.to(weight.device, weight.dtype)
    return [((x,), {}), ((x, None), {}), ((x, None, None), {})]


def _tensors(output: Any) -> list[Tensor]:
    """Every floating tensor in what a block returned."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _same(first: Tensor, second: Tensor) -> bool:
    """Equal, but for a few units in the last place: another kernel may run on another day."""
    if first.shape != second.shape:
        return False
    size, error = (torch.linalg.vector_norm(t.double()) for t in (first, first - second))
    return bool(error <= 16 * torch.finfo(first.dtype).eps * size)


def _sample(model: nn.Module, pixel_values: Pixels | None, text: bool) -> dict[str, Any]:
    """The inputs of a forward pass for one picture, and a few words."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if pixel_values is None:
        config = vision_config(model)
        noise = torch.randn(1, *_picture_shape(model, config), generator=torch.Generator().manual_seed(0))
        pixel_values = noise
    inputs: dict[str, Any] = dict(picture_inputs(model, pixel_values[:1].to(torch.float32)))
    if text and hasattr(model, "get_text_features"):
        inputs["input_ids"] = torch.arange(1, TOKENS + 1)[None]
    return {
        name: x.to(parameter.device, parameter.dtype) if x.is_floating_point() else x.to(parameter.device)
        for name, x in inputs.items()
    }


def _picture_shape(model: nn.Module, config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the pictures that a model takes, as far as it says."""
    size = getattr(config, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None and getattr(config, "num_patches", None):  # SigLIP 2
        size = int(config.num_patches**0.5) * int(config.patch_size)
    height, width = (size, size) if isinstance(size, int) else size or (SIZE, SIZE)
    channels = getattr(config, "num_channels", None) or getattr(getattr(model, "patch_embed", None), "in_chans", None)
    return channels or 3, height, width


def _cuda(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
