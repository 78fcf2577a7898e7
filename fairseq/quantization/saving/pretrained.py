"""save_pretrained of a packed HuggingFace model: a folder that from_pretrained loads, each file written whole."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from torch import Tensor, nn

from fairseq.quantization.files import folder_beside, move_into
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.saving import checkpoint, contents, integer
from fairseq.quantization.saving.description import packed_parts
from fairseq.quantization.saving.model_card import model_card

UPLOAD = ("repo_id", "commit_message", "private", "token", "use_auth_token", "revision", "create_pr")
NO_DIFFERENCE = ("save_function", "save_peft_format", "ignore_metadata_errors")
"""Keywords of transformers for what a packed model is not: a pickle, adapters, a card made there."""
FIXED: dict[str, tuple[bool, str]] = {
    "safe_serialization": (True, "as safetensors only"),
    "save_original_format": (True, "under the names that every version of transformers reads"),
    "distributed_checkpoint": (False, "whole, by one process"),
}
"""Keywords of transformers that have one value for a packed model, and why."""


def config_entry(description: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a packed model."""
    return {"quant_method": contents.QUANT_METHOD, "load_with": contents.LOAD_WITH, "description": dict(description)}


def parts_of_config(config: Any) -> list[Any]:
    """The configs in one that ``from_pretrained`` of a part's class reads in its stead, such as of CLIP's towers."""
    return [part for part in vars(config).values() if getattr(type(part), "base_config_key", "")]


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    metrics: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    **keywords: Any,
) -> None:
    """Write a folder that ``from_pretrained`` loads: config.json, safetensors, and a model card if there is none.

    Each file is written beside and renamed, config.json last.

    Args:
        model: a packed HuggingFace model, or one in or around such a model.
        save_directory: it is created if it does not exist.
        is_main_process: others write nothing.
        state_dict: saved instead of the model's own; it may lack float tensors, which loading then makes up.
        metrics: measured figures for the model card, such as ``{"top-1 accuracy": 0.764}``; kept with the model.
        push_to_hub: also upload the folder; ``repo_id``, ``commit_message``, ``private``, ``token``, ``revision`` and
            ``create_pr`` are for that.
        max_shard_size, variant: as for transformers' ``save_pretrained``.
        keywords: those for the upload, and the others that transformers takes: ``save_function`` and
            ``save_peft_format`` make no difference to safetensors without adapters, as there.

    Raises:
        TypeError: a keyword that transformers does not take, either.
        ValueError: nothing in the model is packed, or it is told to save something else, or in another format.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory must be a folder; {folder} is a file")
    for key, (wanted, why) in FIXED.items():
        if keywords.pop(key, wanted) is not wanted:
            raise ValueError(f"a packed model is saved {why}; leave {key} at {wanted}")
    is_main_process = keywords.pop("save_config", is_main_process)  # its name before
    upload = {key: keywords.pop(key) for key in UPLOAD if key in keywords}
    if unknown := set(keywords) - set(NO_DIFFERENCE):
        raise TypeError(f"save_pretrained of a packed model takes no {min(unknown)!r}")
    if not is_main_process:
        return
    information = {**information_of(model), **({"metrics": dict(metrics)} if metrics else {})}
    description = json.loads(json.dumps(checkpoint.description_of(model, information)))
    state = model.state_dict() if state_dict is None else dict(state_dict)
    _check_state(model, state)
    vars(model)["quantization_information"] = information
    folder.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder / "model") as temporary:  # in it, as the folder above need not be ours to write to
        _save_whole(model, temporary, description, state, max_shard_size, variant)
        if not (folder / "README.md").exists():
            (temporary / "README.md").write_text(model_card(model, description), encoding="utf-8")
        move_into(temporary, folder)
    if push_to_hub:
        _upload(folder, upload)


def information_of(model: nn.Module) -> dict[str, Any]:
    """What is known of a packed model beside its settings: from when it was made, or from the file it came in."""
    known = vars(model).get("quantization_information")
    if known is None:
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        description = getattr(config, "description", None) or {}
        known = description.get("information", {})
    return dict(known)


def _check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """ValueError unless the tensors are those of the model, each packed part's all there."""
    own = model.state_dict()
    if unknown := state.keys() - own.keys():
        raise ValueError(
            f"state_dict must have the keys of the packed model's own, and {min(unknown)} is none; leave it at None to "
            "save that"
        )
    parts = packed_parts(model).values()
    packed = tuple(f"{name}." for name, part in model.named_modules() if part in parts)
    packed = ("",) if isinstance(model, IntegerViT) else packed
    for name, tensor in own.items():
        if name not in state and name.startswith(packed):
            raise ValueError(f"state_dict must have the keys of the packed model's own; {name} is missing")
        if name in state and state[name].shape != tensor.shape:
            raise ValueError(
                f"state_dict: {name} must be of shape {tuple(tensor.shape)}, as in the model; "
                f"got {tuple(state[name].shape)}"
            )


def _save_whole(
    model: Any,
    folder: Path,
    description: dict[str, Any],
    state: Mapping[str, Tensor],
    size: Any,
    variant: str | None,
) -> None:
    """config.json, and tensors under their names on disk, with checksums."""
    tensors = checkpoint.tensors_on_disk(model, state)
    for guard in guards_of(tensors, description):
        tensors[guard] = torch.empty(0, dtype=torch.uint8)
    split = _shards(tensors, size, variant)
    description = {**description, "tensors": len(tensors)}
    if split.is_sharded:  # shards of another save of the same settings have another one
        description["weights"] = contents.digest_of(tensors)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    for part in (config, *parts_of_config(config)):
        part.quantization_config = config_entry(description)
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    for file, names in split.filename_to_tensors.items():
        contents.write({name: tensors[name] for name in names}, folder / file, description)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        name = f"{_pattern(variant).format(suffix='')}.index.json"
        (folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pattern(variant: str | None) -> str:
    return f"model{{suffix}}{f'.{variant}' if variant else ''}.safetensors"


def _shards(tensors: dict[str, Tensor], size: Any, variant: str | None) -> Any:
    return split_torch_state_dict_into_shards(tensors, filename_pattern=_pattern(variant), max_shard_size=size)


def guards_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> tuple[str, ...]:
    """The name on disk of a float weight that the file has no numbers for; or several, one of which the model has.

    A loader that does not know packed integers stops at its shape, instead of leaving random weights in the layers.
    """
    if "integer" in description:
        return integer.guards_of(description)
    return (next(f"{name}.weight" for name in description["layers"] if f"{name}.weight_codes" in tensors),)


def _upload(folder: Path, settings: dict[str, Any]) -> None:
    former = settings.pop("use_auth_token", None)
    api = HfApi(token=settings.pop("token", None) or former)
    private = settings.pop("private", None)
    name = settings.pop("repo_id", folder.name)
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=folder, **settings)
