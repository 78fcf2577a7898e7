"""Models and their image processors from a folder or the hub, with short answers where that cannot be done."""

from __future__ import annotations

import copy
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn

import fairseq.models.vit_quantization  # noqa: F401  # registers the format of packed models
from fairseq.cli.output import HOUSE, UserError, first_line, mistakes
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.saving.contents import names_format
from fairseq.quantization.saving.description import packed_parts
from fairseq.quantization.saving.folder import check_folder, check_size, read_config

SECONDS_TO_REACH_HUB = 3.0
FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
WEIGHTS = (".safetensors", ".bin")


class Loaded(NamedTuple):
    """A model in eval mode, its image processor if it has one, and what it is called."""

    model: nn.Module
    processor: Any
    name: str

    @property
    def packed(self) -> bool:
        """Whether anything in it is quantized."""
        return self.integer or bool(packed_parts(self.model))

    @property
    def integer(self) -> bool:
        """Whether it is an integer-only model."""
        return isinstance(self.model, IntegerViT)


def load(source: str, device: str = "cpu") -> Loaded:
    """The model in a folder or of a hub id, float or packed, in the class that it was saved as.

    Raises:
        UserError: there is none, or it is damaged or not whole.
    """
    transformers = quiet_transformers()
    check_source(source)
    place = device_of(device)
    with failures(source):
        read_config(_folder_of(source, transformers))
        config = transformers.AutoConfig.from_pretrained(source)
    packed = is_packed(config)
    with failures(source):
        kind = _class_of(config, transformers)
        if Path(source).is_dir():
            _check_size(source, kind, config)
        model, loading = kind.from_pretrained(
            source, dtype="auto" if packed else torch.float32, output_loading_info=True
        )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{source} is not a whole {type(model).__name__}: it has no weights for {missing}")
    return Loaded(model.eval().to(place), _processor_of(source, transformers), source)


@contextmanager
def failures(source: str) -> Iterator[None]:
    """Inside, an error is one of what ``source`` holds: transformers raises nearly any, this library a few."""
    with mistakes(*FAILURES, prefix=f"cannot load {source}: "):
        try:
            yield
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if isinstance(error, FAILURES) or Path(frames[-1].filename).is_relative_to(HOUSE):
                raise
            raise ValueError(f"transformers cannot read it ({type(error).__name__}: {first_line(error)})") from error


def _folder_of(source: str, transformers: Any) -> Path:
    """The folder with config.json: the local one, looked at, or the hub's in the cache."""
    if Path(source).is_dir():
        check_folder(Path(source))
        return Path(source)
    return Path(transformers.utils.cached_file(source, "config.json")).parent


def _check_size(source: str, kind: Any, config: Any) -> None:
    """ValueError if a model of this config is far larger than its files: what is missing would be made up."""
    files = [file for file in Path(source).iterdir() if file.suffix in WEIGHTS]
    build = getattr(kind, "_from_config", None) or kind.from_config
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    with torch.device("meta"):
        model = build(plain)
    check_size(model, files, source)


def quiet_transformers() -> Any:
    """transformers, its reports and bars off."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def is_packed(config: Any) -> bool:
    """Whether a config is that of a model which this library quantized."""
    return names_format(getattr(config, "quantization_config", None))


def device_of(name: str) -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        UserError: no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: must be one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_source(source: str) -> None:
    """UserError unless ``source`` is a folder, or a hub id that can be loaded."""
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise UserError(f"{source}: no model in this folder: it has no config.json")
        return
    if Path(source).is_file():
        raise UserError(f"{source} is a file: pass the folder that save_pretrained wrote, or a hub id")
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or not source:
        raise UserError(f"{source or 'an empty name'}: no such folder")
    if reason := hub_problem(source):
        raise UserError(f"{source}: no such folder, and as a hub id it cannot be loaded: {reason}")


def hub_problem(model_id: str) -> str | None:
    """Why a hub id cannot be loaded, found out within seconds; None if it can (or is in the local cache)."""
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        if isinstance(hub.try_to_load_from_cache(model_id, "config.json"), str):
            return None
    except errors.HFValidationError as error:
        return first_line(error)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    try:
        hub.HfApi().model_info(model_id, timeout=SECONDS_TO_REACH_HUB)
    except errors.HfHubHTTPError as error:
        return f"the HuggingFace hub refused: {first_line(error)}"
    except Exception as error:  # the hub client's transport errors have no common base across its versions
        return f"the HuggingFace hub did not answer: {first_line(error)}"
    return None


def tokenizer_of(loaded: Loaded) -> Any:
    """The tokenizer of a model with a text tower; None if it has none."""
    if not hasattr(loaded.model, "get_text_features"):
        return None
    try:
        return importlib.import_module("transformers").AutoTokenizer.from_pretrained(loaded.name)
    except (*FAILURES, TypeError):  # transformers 4, without a vocabulary
        return None


def needs_processor(loaded: Loaded, option: str) -> Any:
    """The image processor of a model; UserError without one."""
    if loaded.processor is None:
        raise UserError(f"{option}: {loaded.name} has no image processor (preprocessor_config.json) to read them with")
    return loaded.processor


def _class_of(config: Any, transformers: Any) -> Any:
    """The class that a model was saved as; without a word of it, an image classifier."""
    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModelForImageClassification
    found = getattr(transformers, names[0], None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def _processor_of(source: str, transformers: Any) -> Any:
    try:
        with failures(source):
            return cast(Any, transformers.AutoImageProcessor.from_pretrained(source))
    except UserError:
        return None
