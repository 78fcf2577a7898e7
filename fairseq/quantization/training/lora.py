"""LoRA on packed layers with PEFT: adapters beside integers, which get no gradient and stay as they are."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.json_files import read_json
from fairseq.quantization.saving.contents import opened

INSTALL = 'adapters need peft; install it with: pip install -e ".[lora]"'


def add_lora(model: nn.Module, config: Any, adapter_name: str = "default") -> Any:
    """Put PEFT's LoRA adapters beside the packed (and plain) layers of a model, in place; the PeftModel.

    The gradient goes through the integers to what comes before, by the rounded weight, as that of the emulated model
    does; only adapters, and modules that ``config.modules_to_save`` names, are trained. A head that is to be trained
    has to be in float: quantize with ``exclude=["*classifier"]``. Blocks with adapters run layer by layer. Adapters
    cannot be merged into integers. Hu et al., 2021, https://arxiv.org/abs/2106.09685; on a quantized model Dettmers et
    al., 2023, https://arxiv.org/abs/2305.14314.

    Args:
        model: what ``quantize_model``, ``pack_model`` or ``from_pretrained`` returned, with packed layers; or a
            PeftModel of such a model, which gets one more adapter and keeps the active one.
        config: a ``peft.LoraConfig``; its ``target_modules`` name the layers. DoRA and initializations that look at
            the weight are not for integers.
        adapter_name: of the adapter; PeftModel's own ``set_adapter`` chooses one of several.

    Raises:
        ImportError: peft is missing.
        ValueError: nothing in ``model`` is packed, or as peft: no layer of such a name, a config of another method,
            an adapter of this name is there.
    """
    peft = _peft()
    with _known_to_peft(model, config):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
            return model
        return peft.get_peft_model(model, config, adapter_name=adapter_name)


def load_lora(
    model: nn.Module, folder: str | os.PathLike[str], trainable: bool = False, *, adapter_name: str = "default"
) -> Any:
    """The packed model with the adapters that ``PeftModel.save_pretrained`` wrote to a folder; ``model`` is changed.

    Args:
        model: as for :func:`add_lora`.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapters are trained further.
        adapter_name: of the adapter, as for :func:`add_lora`.

    Raises:
        ImportError: peft is missing.
        ValueError: nothing in ``model`` is packed, or there are no adapters in the folder, or its files are no plain
            ones, damaged, or a pickle.
    """
    peft = _peft()
    _check_adapters(Path(folder))
    config = peft.PeftConfig.from_pretrained(os.fspath(folder))
    config.inference_mode = not trainable
    if isinstance(model, peft.PeftModel):  # its own load_adapter would take only layers that have an adapter already
        training = model.training
        add_lora(model, config, adapter_name)
        try:
            model.load_adapter(os.fspath(folder), adapter_name, is_trainable=trainable)
        except BaseException:
            model.delete_adapter(adapter_name)
            raise
        return model.train(training)  # which peft ends
    with _known_to_peft(model, config):
        return peft.PeftModel.from_pretrained(
            model, os.fspath(folder), adapter_name=adapter_name, config=config, is_trainable=trainable
        )


def _check_adapters(folder: Path) -> None:
    """ValueError for what peft would not refuse in a local folder; one that is none may be of the hub."""
    if folder.is_dir() and os.path.lexists(folder / "adapter_config.json"):
        read_json(folder / "adapter_config.json")
        weights = folder / "adapter_model.safetensors"
        if not os.path.lexists(weights) and os.path.lexists(folder / "adapter_model.bin"):
            raise ValueError(f"{folder}: adapters are read from safetensors only, and these are a pickle")
        with opened(weights):
            pass  # its header is looked at


@contextmanager
def _known_to_peft(model: nn.Module, config: Any) -> Iterator[None]:
    """Inside, peft takes packed layers: it asks each for a tensor, and ``config`` what stands in for it."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not layers:
        raise ValueError("nothing in the model is packed; peft itself adds adapters to a float or emulated model")
    if not hasattr(config, "_register_custom_module"):
        raise ValueError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    if getattr(config, "use_dora", False):
        raise ValueError("use_dora=True scales the weight by its columns, and integers have none to scale")
    config._register_custom_module({PackedLinear: _lora_class()})
    for layer in layers:
        vars(layer)["qweight"] = layer.scale  # for its device and dtype, which adapters get
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type .*PackedLinear")
            yield
    finally:
        for layer in layers:
            vars(layer).pop("qweight")


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ImportError(INSTALL) from None


@functools.cache
def _lora_class() -> Any:
    base: Any = importlib.import_module("peft.tuners.lora.layer").Linear

    class LoraPackedLinear(base):
        """A packed layer and its adapters: base_layer(x) + B A x * scaling."""

        def merge(self, *arguments: Any, **keywords: Any) -> None:
            raise ValueError(f"an adapter cannot be merged into the integers of {self.get_base_layer().name}")

    return LoraPackedLinear
