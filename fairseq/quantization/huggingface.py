"""HuggingFace, both directions: save_pretrained of a packed model, and from_pretrained that loads or makes one.

Importing this registers ``quant_method`` "fairseq_vit" with transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections.abc import Mapping
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

from fairseq.quantization import checkpoint
from fairseq.quantization.checkpoint import FORMAT
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.convert import finish
from fairseq.quantization.description import Placeholder, empty_part, put
from fairseq.quantization.engine import check_engine
from fairseq.quantization.incremental import WhileLoading
from fairseq.quantization.model_card import model_card
from fairseq.quantization.names import names_on_disk

logger = logging.getLogger(__name__)

VERSION_5 = hasattr(HfQuantizer, "get_quantize_ops")
EVERY_KEY: Any = {r".*"} if VERSION_5 else [r".*"]
LOAD_WITH = "import fairseq.models.vit_quantization before from_pretrained"


class FairseqViTConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of from_pretrained, and of a config.json that save_pretrained wrote.

    To quantize while loading, give it what :class:`~fairseq.models.vit_quantization.ViTQuantizer` takes:
    ``FairseqViTConfig(bits=4, method="channel")``. What needs pictures is refused.

    Args:
        engine: as for ``quantize_model``.
        description: of a saved model; from its config.json.
        settings: of a :class:`~fairseq.quantization.config.QuantizationConfig`.

    Raises:
        TypeError, ValueError: a setting that is none; the message says what is accepted.
    """

    def __init__(self, engine: str = "auto", description: Mapping[str, Any] | None = None, **settings: Any):
        self.quant_method = FORMAT
        check_engine(engine)
        self.engine = engine
        settings = {key: value for key, value in settings.items() if key not in ("quant_method", "load_with")}
        self.description = None if description is None else checkpoint.check_description(description, "config.json")
        accepted = {field.name for field in dataclasses.fields(QuantizationConfig)}
        if unknown := set(settings) - accepted:
            raise TypeError(f"unknown setting {min(unknown)!r}; accepted are engine, {', '.join(sorted(accepted))}")
        self.settings = QuantizationConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What goes to config.json."""
        if self.description is not None:
            return {"quant_method": FORMAT, "load_with": LOAD_WITH, "description": self.description}
        settings = dataclasses.asdict(self.settings)
        return {"quant_method": FORMAT, "engine": self.engine, **settings}

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"FairseqViTConfig({json.dumps(self.to_dict())})"


class FairseqViTQuantizer(HfQuantizer):  # type: ignore[misc]
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

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    def adjust_target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def get_special_dtypes_update(self, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            self.arriving = WhileLoading(model, config.settings, config.engine)
            return model
        files = checkpoint_files or _files_of(model.config)
        contents = checkpoint.inspect(files)
        if json.loads(json.dumps(config.description)) != contents.description:
            raise ValueError(
                f"{files[0]}: config.json describes another model than the weights do; they were not saved "
                "together, or one of them was changed"
            )
        contents = _of_this_model(model, contents)
        names = checkpoint.part_names(model, contents)
        checkpoint.part_tensors(model, contents, names)
        _check_complete(model, contents, names)
        self.contents, self.names = contents, names
        with torch.device("cpu"):  # transformers builds the model on the meta device
            for on_disk, name in names.items():
                owner, _, last = name.rpartition(".")
                part = model.get_submodule(owner)._modules.get(last)
                # a table in place of a parameter is small, and read by code that initializes weights
                table = None if part is not None else empty_part(model, name, contents.parts[on_disk], "cpu")
                put(model, name, table or Placeholder(part).train(part.training))
        model._keys_to_ignore_on_load_unexpected = EVERY_KEY  # type: ignore[assignment]
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return ".packed_" in f".{param_name}"
        return self.arriving is not None and self.arriving.wants(param_name)

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

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if self.failure is not None:
            raise self.failure
        if self.arriving is not None:
            report = self.arriving.finish()
            logger.info("%s", report)
            config.description = checkpoint.description_of(model)
            config.description["information"] = {"bytes_before": report.bytes_before}
        else:
            checkpoint.fill(model, self.contents, self.names)
            vars(model).pop("_keys_to_ignore_on_load_unexpected")
            finish(model, config.engine)
        model.config.quantization_config = config  # type: ignore[union-attr]
        self._leave(model)
        enable_save_pretrained(model)
        return model

    @staticmethod
    def _leave(model: nn.Module) -> None:
        for module in model.modules():
            for name in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(module).pop(name, None)
            for name in ("_is_quantized", "_pre_quantization_dtype"):
                vars(getattr(module, "config", module)).pop(name, None)


def enable_save_pretrained(model: nn.Module, information: Mapping[str, Any] | None = None) -> None:
    """Let a packed HuggingFace model save itself; other modules stay as they are.

    Args:
        model: a packed model.
        information: see :func:`checkpoint.save`; kept in ``model.quantization_information``.
    """
    if not hasattr(type(model), "save_pretrained") or not hasattr(model, "config"):
        return
    if information is not None:
        vars(model)["quantization_information"] = dict(information)
    vars(model)["save_pretrained"] = functools.partial(save_pretrained, model)


def disable_save_pretrained(model: nn.Module) -> None:
    """Undo :func:`enable_save_pretrained`, of a model with float layers again."""
    for name in ("save_pretrained", "quantization_information"):
        vars(model).pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config  # type: ignore[union-attr, operator]


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **keywords: Any,
) -> None:
    """Write a folder that ``from_pretrained`` loads: config.json, safetensors, and a model card if there is none.

    Each file is written beside and renamed, config.json last.

    Args:
        model: a packed HuggingFace model.
        save_directory: it is created if it does not exist.
        metrics: measured figures for the model card, such as ``{"top-1 accuracy": 0.764}``; kept with the model.
        push_to_hub: also upload the folder; ``repo_id``, ``commit_message``, ``private``, ``token``, ``revision`` and
            ``create_pr`` are for that.
        state_dict: not accepted other than None: what is saved is the model.
        max_shard_size, variant: as for transformers' ``save_pretrained``.
        keywords: ``is_main_process``, and those for the upload.

    Raises:
        ValueError: nothing in the model is packed, or it is told to save something else.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory must be a folder; {folder} is a file")
    if state_dict is not None and set(state_dict) != set(model.state_dict()):
        raise ValueError("a packed model saves its own state dict; leave state_dict at None")
    if keywords.pop("safe_serialization", True) is False:
        raise ValueError("a packed model is saved as safetensors only; leave safe_serialization at True")
    upload = {key: keywords.pop(key) for key in UPLOAD if key in keywords}
    if unknown := set(keywords) - {"is_main_process"}:
        raise TypeError(f"save_pretrained of a packed model takes no {min(unknown)!r}")
    if not keywords.get("is_main_process", True):
        return
    information = {**_information(model), **({"metrics": dict(metrics)} if metrics else {})}
    description = json.loads(json.dumps(checkpoint.description_of(model, information)))
    vars(model)["quantization_information"] = information
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        _save_whole(model, temporary, description, max_shard_size, variant)
        if not (folder / "README.md").exists():
            (temporary / "README.md").write_text(model_card(model, description), encoding="utf-8")
        _move(temporary, folder)
    if push_to_hub:
        _upload(folder, upload)


UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def _save_whole(model: nn.Module, folder: Path, description: dict[str, Any], size: Any, variant: str | None) -> None:
    """config.json, and tensors under their names on disk, with checksums."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    config.dtype = str(model.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    config.quantization_config = FairseqViTConfig(description=description)  # type: ignore[union-attr]
    config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if model.can_generate() and getattr(model, "generation_config", None) is not None:  # type: ignore[operator]
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    tensors = checkpoint.tensors_on_disk(model)
    tensors[_guard(tensors, description)] = torch.empty(0, dtype=torch.uint8)
    _write_shards(tensors, folder, description, size, variant)


def _write_shards(
    tensors: dict[str, Tensor], folder: Path, description: dict[str, Any], size: Any, variant: str | None
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = f"model{{suffix}}{f'.{variant}' if variant else ''}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=size)
    for file, names in split.filename_to_tensors.items():
        checkpoint.write({name: tensors[name] for name in names}, folder / file, description)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        name = f"{pattern.format(suffix='')}.index.json"
        (folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _guard(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """The name on disk of a float weight that the file has no numbers for.

    A loader that does not know packed integers stops at its shape, instead of leaving random weights in the layers.
    """
    return next(f"{name}.weight" for name in description["layers"] if f"{name}.weight_codes" in tensors)


def _information(model: nn.Module) -> dict[str, Any]:
    known = vars(model).get("quantization_information")
    if known is None:
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        description = getattr(config, "description", None) or {}
        known = description.get("information", {})
    return dict(known)


def _move(source: Path, folder: Path) -> None:
    """Put the files of ``source`` into ``folder``, config.json last, and take away shards of an earlier save."""
    files = sorted(source.iterdir(), key=lambda path: path.name == "config.json")
    weights = {path.name for path in files}
    for file in files:
        os.replace(file, folder / file.name)
    for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
        if old.name not in weights:
            old.unlink()


def _upload(folder: Path, settings: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=settings.pop("token", None))
    private = settings.pop("private", None)
    name = settings.pop("repo_id", folder.name)
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=folder, **settings)


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


def _of_this_model(model: nn.Module, contents: checkpoint.Contents) -> checkpoint.Contents:
    """Without the prefix of the base model and what has none, if a bare model is loaded from one with a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = set(names_on_disk(model, [name for name, _ in (*model.named_modules(), *model.named_parameters())]).values())
    bare = prefix != "." and not any(name in known for name in contents.parts)
    return contents.below(prefix) if bare and any(n.startswith(prefix) for n in contents.parts) else contents


def _check_complete(model: nn.Module, contents: checkpoint.Contents, names: Mapping[str, str]) -> None:
    """ValueError if a file of a model of this class lacks a weight; of another class transformers makes up the rest."""
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        return
    packed = tuple(f"{name}." for name in names.values())
    wanted = [name for name, _ in model.named_parameters() if not f"{name}.".startswith(packed)]
    for name, on_disk in names_on_disk(model, wanted).items():
        entry = contents.tensors.get(on_disk)
        shape = tuple(model.get_parameter(name).shape)
        if entry is None or entry.shape != shape:
            got = "it is missing" if entry is None else f"got {entry.shape}"
            raise ValueError(f"{contents.files}: {on_disk} must be of shape {shape}; {got}")


@functools.cache
def _passing_class() -> Any:
    from transformers.core_model_loading import ConversionOps

    class Passing(ConversionOps):  # type: ignore[misc]
        """Lets a weight pass on its way into a model, and sees to those that are there already."""

        def __init__(self, quantizer: FairseqViTQuantizer):
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
            for name, value in input_dict.items():
                value = value[0] if isinstance(value, list) else value
                wanted = tuple(model.get_parameter(name).shape)
                if tuple(value.shape) != wanted and self.quantizer.failure is None:
                    got = tuple(value.shape)
                    self.quantizer.failure = ValueError(
                        f"{name}: the files hold the shape {got}, the model has {wanted}"
                    )
            self.quantizer.advance()
            return input_dict

    return Passing


def _register() -> None:
    if FORMAT not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(FORMAT)(FairseqViTConfig)
        register_quantizer(FORMAT)(FairseqViTQuantizer)


_register()
