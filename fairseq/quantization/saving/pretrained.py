"""save_pretrained of a packed HuggingFace model: a folder that from_pretrained loads, each file written whole."""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from torch import Tensor, nn

from fairseq.quantization.files import move_into
from fairseq.quantization.saving import checkpoint, contents
from fairseq.quantization.saving.model_card import model_card

LOAD_WITH = "import fairseq.models.vit_quantization before from_pretrained"
UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def config_entry(description: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a packed model."""
    return {"quant_method": contents.FORMAT, "load_with": LOAD_WITH, "description": dict(description)}


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


def warn_when_saving(model: nn.Module) -> None:
    """Let an emulated HuggingFace model say, when it saves itself, what ``from_pretrained`` will not know of."""
    if hasattr(type(model), "save_pretrained") and any(name.endswith(".input_factor") for name in model.state_dict()):
        vars(model)["save_pretrained"] = functools.partial(_save_emulated, model)


def _save_emulated(model: Any, *args: Any, **keywords: Any) -> Any:
    warnings.warn(
        "the layers of this emulated model multiply their input by input_factor, which from_pretrained does not know; "
        "to load the folder there, save ViTQuantizer.dequantize_model(model) instead",
        UserWarning,
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **keywords)


def disable_save_pretrained(model: Any) -> None:
    """Undo :func:`enable_save_pretrained`, of a model with float layers again."""
    for name in ("save_pretrained", "quantization_information"):
        vars(model).pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config


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
        state_dict: saved instead of the model's own; it must have the same keys.
        max_shard_size, variant: as for transformers' ``save_pretrained``.
        keywords: ``is_main_process``, and those for the upload.

    Raises:
        ValueError: nothing in the model is packed, or it is told to save something else.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory must be a folder; {folder} is a file")
    if state_dict is not None and set(state_dict) != set(model.state_dict()):
        raise ValueError("state_dict must have the keys of the packed model's own; leave it at None to save that")
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
        _save_whole(model, temporary, description, state_dict, max_shard_size, variant)
        if not (folder / "README.md").exists():
            (temporary / "README.md").write_text(model_card(model, description), encoding="utf-8")
        move_into(temporary, folder)
    if push_to_hub:
        _upload(folder, upload)


def _save_whole(
    model: Any,
    folder: Path,
    description: dict[str, Any],
    state: Mapping[str, Tensor] | None,
    size: Any,
    variant: str | None,
) -> None:
    """config.json, and tensors under their names on disk, with checksums."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = config_entry(description)
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tensors = checkpoint.tensors_on_disk(model, state)
    tensors[_guard(tensors, description)] = torch.empty(0, dtype=torch.uint8)
    _write_shards(tensors, folder, description, size, variant)


def _write_shards(
    tensors: dict[str, Tensor], folder: Path, description: dict[str, Any], size: Any, variant: str | None
) -> None:
    pattern = f"model{{suffix}}{f'.{variant}' if variant else ''}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=size)
    for file, names in split.filename_to_tensors.items():
        contents.write({name: tensors[name] for name in names}, folder / file, description)
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


def _upload(folder: Path, settings: dict[str, Any]) -> None:
    api = HfApi(token=settings.pop("token", None))
    private = settings.pop("private", None)
    name = settings.pop("repo_id", folder.name)
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=folder, **settings)
