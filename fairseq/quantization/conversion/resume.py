"""Resume: what is finished of a quantization, in a folder, from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import fairseq
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.architectures.plan import LayerPlan
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.output_moments import OutputMoments
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.conversion.quantize_layer import QuantizedLayer
from fairseq.quantization.files import write_file
from fairseq.quantization.json_files import parse_json, read_json

RUN = "run.json"
STAGES = "stage-*.safetensors"
WEIGHTS = "token-weights-*.safetensors"
CHUNK = 16
"""Pictures that are hashed at a time."""
METHODS = 4
"""Counted up when the same settings come to give other integers, which do not go with those of before."""
PARTS = ("integers", "scale", "zero_point", "bias", "factor")


@dataclass
class DoneStage:
    """What became of the layers of one stage.

    Attributes:
        parameters: what rescaling may have changed, by full name.
        layers: by name, the integers and what belongs to them, and the factor of the layer's input.
        weights: by name, what was rounded, (out, in), where it is kept; not saved.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, tuple[QuantizedLayer, Tensor | None]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Resume:
    """A folder with the stages of a run that are finished; of several processes the first reads and writes it.

    Args:
        folder: of an interrupted run, or one that does not exist or is empty; the one above it exists.
        model: the float model.
        config, pixel_values, reconstruct: as for :func:`~fairseq.quantization.conversion.convert.convert`.

    Raises:
        FileNotFoundError: the folder above it does not exist.
        ValueError: the folder holds something else, or a run of another model, other settings or other pictures.
    """

    def __init__(
        self,
        folder: Any,
        model: nn.Module,
        config: QuantizationConfig,
        pixel_values: Pixels | None,
        reconstruct: object = None,
    ):
        self.folder = Path(folder)
        failure = self._begin(_description(model, config, pixel_values, reconstruct)) if processes.rank() == 0 else None
        if failure := processes.first(failure):
            raise failure

    def _begin(self, wanted: dict[str, Any]) -> Exception | None:
        """Look at the folder, or make it; what speaks against it."""
        folder, run = self.folder, self.folder / RUN
        if not folder.parent.is_dir():
            return FileNotFoundError(f"resume={str(folder)!r}: the folder {folder.parent} does not exist")
        if folder.exists() and not run.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            return ValueError(f"resume={str(folder)!r} holds something else than an interrupted run (no {RUN} in it)")
        folder.mkdir(exist_ok=True)
        if not run.is_file():
            write_file(run, json.dumps(wanted, indent=2).encode())
            return None
        try:
            found = read_json(run)
            different = [key for key, value in wanted.items() if found[key] != value]
        except (ValueError, KeyError, TypeError):
            return ValueError(f"{run} is damaged: remove the folder to start from the beginning")
        if not different:
            return None
        what = ", ".join(f"{key} {found[key]!r}, now {wanted[key]!r}" for key in different)
        return ValueError(
            f"resume={str(folder)!r} holds a run of another kind: {what[:500]}; pass another folder, or remove this one"
        )

    def load(self, number: int, stage: Sequence[LayerPlan]) -> DoneStage | None:
        """A finished stage; None if it is not.

        Raises:
            ValueError: its file is damaged.
        """
        content = None
        path = self._path(number)
        if processes.rank() == 0 and path.is_file():
            content = path.read_bytes()
        content = processes.first(content)
        if content is None:
            return None
        try:
            tensors = load_tensors(content)
            said = parse_json(bytes(tensors.pop("said").tolist()).decode(), "what it says")
            done = DoneStage({key.removeprefix("="): x for key, x in tensors.items() if key.startswith("=")})
            for layer in stage:
                integers, scale, zero_point = (tensors[f"{layer.name}:{part}"] for part in PARTS[:3])
                bias, factor = (tensors.get(f"{layer.name}:{part}") for part in PARTS[3:])
                settings, span, record = said[layer.name]
                rounded = QuantizedLayer(
                    integers, scale, zero_point, bias, LayerConfig(**settings), span and tuple(span), record
                )
                done.layers[layer.name] = rounded, factor
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to round this block again") from error
        return done

    def save(self, number: int, done: DoneStage) -> None:
        """Write a finished stage."""
        if processes.rank() != 0:
            return
        tensors = {f"={name}": x for name, x in done.parameters.items()}
        said = {}
        for name, (layer, factor) in done.layers.items():
            values = (*layer[:4], factor)
            tensors |= {f"{name}:{part}": x for part, x in zip(PARTS, values) if x is not None}
            said[name] = asdict(layer.settings), layer.input_range, layer.record
        tensors["said"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        write_file(self._path(number), save_tensors({k: x.detach().cpu().contiguous() for k, x in tensors.items()}))

    def error_weights(self) -> tuple[dict[str, Tensor], OutputMoments] | None:
        """The token weights of this process's pictures and the moments of outputs, if each process has kept its own."""
        path = self._weights()
        kept = path.is_file()
        if not all(processes.gathered(kept)):
            return None
        try:
            tensors = load_tensors(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to weigh the tokens again") from error
        moments = OutputMoments(())
        moments.load({key[1:]: x for key, x in tensors.items() if key.startswith("=")})
        return {name: x for name, x in tensors.items() if not name.startswith("=")}, moments

    def keep_error_weights(self, weights: Mapping[str, Tensor], moments: OutputMoments) -> None:
        """Write them."""
        write_file(self._weights(), save_tensors({**weights, **{f"={key}": x for key, x in moments.tensors().items()}}))

    def remove(self) -> None:
        """Take away what was written here, and the folder if nothing else is in it."""
        processes.gathered(None)  # until all have read
        if processes.rank() == 0:
            for path in (*self.folder.glob(STAGES), *self.folder.glob(WEIGHTS), self.folder / RUN):
                path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / STAGES.replace("*", f"{number:03}")

    def _weights(self) -> Path:
        return self.folder / WEIGHTS.replace("*", f"{processes.rank()}-of-{processes.count()}")


def _description(
    model: nn.Module, config: QuantizationConfig, pixel_values: Pixels | None, reconstruct: object
) -> dict[str, Any]:
    """What a run depends on."""
    weights = hashlib.blake2b(digest_size=16)
    for name, x in model.state_dict().items():
        weights.update(f"{name} {tuple(x.shape)} {x.dtype};".encode())
        weights.update(_bytes(x))
    pictures = hashlib.blake2b(digest_size=16)
    for start in range(0, 0 if pixel_values is None else len(pixel_values), CHUNK):
        assert pixel_values is not None
        pictures.update(_bytes(pixel_values[slice(start, start + CHUNK)]))
    return {
        "version": f"{fairseq.__version__}, methods {METHODS}",
        "model": weights.hexdigest(),
        "pictures": f"{0 if pixel_values is None else len(pixel_values)}, {pictures.hexdigest()}",
        "settings": repr(config),
        "reconstruction": repr(reconstruct),
    }


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
