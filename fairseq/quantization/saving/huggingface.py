"""from_pretrained of HuggingFace models that loads packed ones, or makes them while it loads.

Importing this registers ``quant_method`` "fairseq_vit" with transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from fairseq.modules.quantization.context import plain_context
from fairseq.quantization.config import FORMER_NAMES, QuantizationConfig, with_current_names
from fairseq.quantization.conversion.convert import finish
from fairseq.quantization.conversion.incremental import WhileLoading
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.files import plain_file
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.integer_only.pretrained import become
from fairseq.quantization.saving import checkpoint, integer
from fairseq.quantization.saving.attach import enable_save_pretrained, of_parts
from fairseq.quantization.saving.contents import FORMAT, QUANT_METHOD, check_description, inspect
from fairseq.quantization.saving.description import Placeholder, empty_part, put
from fairseq.quantization.saving.excluding import exclude_modules
from fairseq.quantization.saving.fitting import Fit, fit
from fairseq.quantization.saving.folder import check_folder, check_inside, check_size
from fairseq.quantization.saving.names import names_on_disk
from fairseq.quantization.saving.pretrained import config_entry, parts_of_config
from fairseq.quantization.saving.told import empty_of_floats, tell

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INITIALIZED = "_is_hf_initialized"
"""By which transformers knows a module that needs no first weights."""
CACHE_LINE = 64
"""Bytes; torch's own memory begins at a multiple of it."""


class FairseqViTConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of from_pretrained, and of a config.json that save_pretrained wrote.

    To quantize while loading, give it what :class:`~fairseq.models.vit_quantization.ViTQuantizer` takes:
    ``FairseqViTConfig(bits=4, method="channel")``. What needs pictures is refused.

    Args:
        engine: as for ``quantize_model``.
        description: of a saved model; from its config.json.
        modules_to_not_convert: layers that stay in float, as transformers' other quantizers take them: a name, what is
            in front of a dot in one, or how one ends. Its version decides, by ``should_convert_module`` where it has
            that. ``exclude`` takes globs.
        settings: of a :class:`~fairseq.quantization.config.QuantizationConfig`.

    Raises:
        TypeError, ValueError: a setting that is none; the message says what is accepted.
    """

    def __init__(
        self,
        engine: str = "auto",
        description: Mapping[str, Any] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        **settings: Any,
    ):
        self.quant_method = FORMAT
        check_engine(engine)
        self.engine = engine
        settings = {key: value for key, value in settings.items() if key not in ("quant_method", "load_with")}
        self.description = None if description is None else check_description(description, "config.json")
        if not isinstance(modules_to_not_convert, list | tuple | None) or not all(
            isinstance(name, str) and name for name in modules_to_not_convert or ()
        ):
            raise TypeError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}")
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        settings = with_current_names(settings)
        accepted = {field.name for field in dataclasses.fields(QuantizationConfig)}
        if unknown := set(settings) - accepted:
            known = ", ".join(("engine", "modules_to_not_convert", *sorted(accepted)))
            raise TypeError(f"unknown setting {min(unknown)!r}; accepted are {known}")
        self.settings = QuantizationConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What goes to config.json."""
        if self.description is not None:
            return config_entry(self.description)
        settings = dataclasses.asdict(self.settings)
        settings["resident"] = settings.pop("weight_storage")  # as earlier versions call it
        settings["exclude"] = list(settings["exclude"])
        settings["modules_to_not_convert"] = self.modules_to_not_convert
        new = ("exclude", "modules_to_not_convert", "rotate")  # that they do not know
        kept = {key: value for key, value in settings.items() if value or key not in new}
        return {"quant_method": FORMAT, "engine": self.engine, **kept}

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What :meth:`to_dict` wrote, or an earlier version.

        Raises:
            ValueError: a setting that is none; it is of a file.
        """
        settings = {FORMER_NAMES.get(key, key): value for key, value in config_dict.items()}
        try:
            return super().from_dict(settings, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise ValueError(f"quantization_config: {error}") from error

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"FairseqViTConfig({json.dumps(self.to_dict())})"


class FairseqViTQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with such a config.

    It leaves no trace on the model, which is an ordinary module afterwards, on which ``.to()`` and ``.half()`` work.
    """

    requires_calibration = False
    requires_parameters_quantization = True
    required_packages: tuple[str, ...] = ()
    quantization_config: FairseqViTConfig

    def __init__(self, quantization_config: FairseqViTConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.description is not None
        self.arriving: WhileLoading | None = None
        self.failure: Exception | None = None
        self.integers: IntegerViT | None = None
        self.resized: set[str] = set()  # weights that arrive in another size, which transformers sees to

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    def adjust_target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Look at a folder before transformers 5 builds a model of what its config.json says, for the Auto classes.

        A config that another class read does not know its folder, and none knows its subfolder.
        """
        folder = Path(str(config.name_or_path))
        if self.pre_quantized and (folder / "config.json").is_file():
            check_folder(folder)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same for transformers 4, which asks this at that moment."""
        return self.update_attn_implementation(config)

    def get_special_dtypes_update(self, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            settings = exclude_modules(model, config.settings, config.modules_to_not_convert or ())
            self.arriving = WhileLoading(model, settings, config.engine)
            return model
        files = checkpoint_files or _files_of(model.config)
        folder = str(model.config.name_or_path)
        if os.path.isdir(folder):
            check_inside((str(file).removeprefix(os.path.join(folder, "")) for file in files), folder)
        check_size(model, map(plain_file, files), str(files[0]))
        contents = inspect(files)
        if json.loads(json.dumps(config.description)) != contents.description:
            raise ValueError(
                f"{files[0]}: config.json describes another model than the weights do; they were not saved "
                "together, or one of them was changed"
            )
        if contents.integer is not None:
            with plain_context():
                self.integers = integer.read(contents, model)
            empty_of_floats(model)
            return model
        self.fit = fit(model, contents)
        _check_complete(model, self.fit)
        with torch.device("cpu"):  # transformers builds the model on the meta device
            for on_disk, name in self.fit.names.items():
                owner, _, last = name.rpartition(".")
                part = model.get_submodule(owner)._modules.get(last)
                # a table in place of a parameter is small, and read by code that initializes weights
                table = None if part is not None else empty_part(model, name, self.fit.contents.parts[on_disk], "cpu")
                put(model, name, table or Placeholder(part).train(part.training))
                around = model.get_submodule(owner)
                if not around._parameters and not around._buffers:
                    # its code to initialize weights, which fills buffers that no file holds, has placeholders alone
                    vars(around)[INITIALIZED] = True
        self.told = tell(model, self.fit)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return ".packed_" in f".{param_name}"
        return self.arriving is not None and param_name not in self.resized and self.arriving.wants(param_name)

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, **kwargs: Any
    ) -> None:
        """Take a weight, for transformers 4."""
        if self.arriving is not None:
            module, _, last = param_name.rpartition(".")
            model.get_submodule(module).load_state_dict(
                {last: param_value.to(target_device)}, strict=False, assign=True
            )
            self.advance()

    def get_quantize_ops(self) -> Any:
        """Take a weight, for transformers 5."""
        return _passing_class()(self)

    def advance(self) -> None:
        """Quantize what has arrived whole; an error waits until loading ends, where it is not caught."""
        if self.arriving is not None and self.failure is None:
            try:
                self.arriving.advance()
            except (TypeError, ValueError) as error:
                self.failure = error

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.failure is not None:
            raise self.failure
        if self.integers is not None:
            become(model, self.integers)
        elif self.arriving is not None:
            report = self.arriving.finish()
            logger.info("%s", report)
            config.description = checkpoint.description_of(model)
            config.description["information"] = {"bytes_before": report.bytes_before}
        else:
            for name, before in self.told.items():
                vars(model).pop(name) if before is None else setattr(model, name, before)
            checkpoint.fill(model, self.fit.contents, self.fit.names)
            _align(model)
            finish(model, config.engine)
            if self.fit.derived:
                known = self.fit.contents.description.get("information", {})
                config.description = checkpoint.description_of(model, of_parts(known))
        model.config.quantization_config = config
        self._leave(model)
        enable_save_pretrained(model)
        return model

    @staticmethod
    def _leave(model: nn.Module) -> None:
        for module in model.modules():
            for name in ("hf_quantizer", "quantization_method", "is_quantized", INITIALIZED):
                vars(module).pop(name, None)
            for name in ("_is_quantized", "_pre_quantization_dtype"):
                vars(getattr(module, "config", module)).pop(name, None)
        for part in parts_of_config(model.config):
            vars(part).pop("quantization_config", None)


def _files_of(config: Any) -> list[str]:
    """The files that transformers 4 found for a model, and tells no quantizer; they are on this machine by now."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    name, found = config.name_or_path, {"revision": getattr(config, "_commit_hash", None), "local_files_only": True}
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(name, "model.safetensors.index.json", **found, **missing)
    if index is not None:
        return list(get_checkpoint_shard_files(name, index, **found)[0])
    file = cached_file(name, "model.safetensors", **found, **missing)
    if file is None:
        raise ValueError(
            f"{name}: found no model.safetensors; a packed model is loaded from a folder or a repository, and with "
            "transformers 4 not by subfolder= or variant="
        )
    return [file]


def _check_complete(model: Any, found: Fit) -> None:
    """ValueError if files that do not say how many tensors they have lack one, of a model of their own class."""
    if "tensors" in found.contents.description:
        return
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        return
    packed = tuple(f"{name}." for name in (*found.names.values(), *(entry.name for entry in found.resized)))
    wanted = [name for name, _ in model.named_parameters() if not f"{name}.".startswith(packed)]
    for name, on_disk in names_on_disk(model, wanted).items():
        if on_disk not in found.contents.tensors:
            shape = tuple(model.get_parameter(name).shape)
            raise ValueError(f"{found.contents.files}: {on_disk} must be of shape {shape}; it is missing")


def _align(model: nn.Module) -> None:
    """Move float weights that lie anywhere in a mapped file to where memory of their own begins.

    oneDNN and MKL choose a kernel by the address, and each has another last bit. The Linears of a model that writes
    text, which are many and large, stay mapped.
    """
    writes = getattr(model, "can_generate", bool)()
    kinds = CONVOLUTIONS if writes else (*CONVOLUTIONS, nn.Linear)
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, kinds) else ():
            if parameter.device.type == "cpu" and parameter.data_ptr() % CACHE_LINE:
                parameter.data = parameter.data.clone()


@functools.cache
def _passing_class() -> Any:
    from transformers.core_model_loading import ConversionOps

    class Passing(ConversionOps):
        """Lets a weight pass on its way into a model, and sees to those that are there already."""

        def __init__(self, quantizer: FairseqViTQuantizer):
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
            for name, value in input_dict.items():
                value = value[0] if isinstance(value, list) else value
                if value.shape != model.get_parameter(name).shape:
                    self.quantizer.resized.add(name)
            self.quantizer.advance()
            return input_dict

    return Passing


def _register() -> None:
    if FORMAT not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        for method in (FORMAT, QUANT_METHOD):
            register_quantization_config(method)(FairseqViTConfig)
        register_quantizer(FORMAT)(FairseqViTQuantizer)


_register()
