"""Calibration images, whatever they come as, to pixel values, checked."""

from __future__ import annotations

import importlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fairseq.quantization.architectures.families import takes_any_size
from fairseq.quantization.architectures.forward import vision_config
from fairseq.quantization.architectures.picture_forms import Form, pictures_of
from fairseq.quantization.calibration.pictures import Pictures
from fairseq.quantization.calibration.storage import Storage

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
RECOMMENDED, FEW = 128, 32
ACCEPTED = (
    "a float tensor (N, C, H, W), a list of float tensors (C, H, W), of PIL images or of paths, a folder of pictures, "
    "a processor's output, or a DataLoader or other iterable of batches"
)
WANTED = "calibration needs pictures such as the model will see"
Picture = tuple[str, Any]  # what messages call it; a Tensor (C, H, W), a PIL image or a Path


def pixel_values(
    images: Any,
    model: nn.Module,
    processor: Callable[..., Any] | None = None,
    limit: int | str = RECOMMENDED,
    seed: int = 0,
) -> Tensor:
    """:func:`pictures` as one tensor, float32 (N, C, H, W), on the CPU, a copy."""
    return pictures(images, model, processor, limit, seed)[:]


def pictures(
    images: Any,
    model: nn.Module,
    processor: Callable[..., Any] | None = None,
    limit: int | str = RECOMMENDED,
    seed: int = 0,
    augment: int = 1,
) -> Pictures:
    """At most ``limit`` pictures that ``model`` can be calibrated on, decoded once and checked.

    They are in memory if they are few, or where ``images`` is a tensor, else in a temporary file, see
    :class:`~fairseq.quantization.calibration.storage.Storage`.

    Args:
        images: a float tensor (N, C, H, W); a list of tensors, (C, H, W) or (1, C, H, W), of PIL images or of paths; a
            folder, searched recursively (hidden files apart) and sorted by name; a mapping with "pixel_values"; or a
            DataLoader, a dataset, or any iterable of such pictures or of batches: a tensor, a mapping with
            "pixel_values", or a tuple or list that starts with one, whose other items, the labels, are ignored.
        model: its ``config``, where it has one, says how many channels and which height and width are expected; that of
            the vision tower or encoder, where it has several. Families that resize their position embeddings to each
            picture take any height and width.
        processor: makes pixel values of PIL images and files, which are converted to RGB first; the default is the one
            in the local folder that the model was loaded from.
        limit: where there are more pictures, which of them is drawn without repetition, and only those are decoded;
            they keep their order. Whatever cannot be indexed is read from its start, and no further than needed. "all"
            takes all there are; an iterable without an end is then read forever. Files that a processor cuts into tiles
            count once, and tensors that are tiles already each.
        seed: of the drawing, and of torch's CPU generator while a DataLoader, dataset or processor runs. A DataLoader's
            dataset, sampler and collate_fn are used, its workers are not. All generators are restored afterwards.
        augment: how many views of each picture there are: itself, and random crops of it, half of them flipped.

    Raises:
        TypeError, ValueError: images are of no such kind, there are none, a file cannot be read, there is no processor,
            or the pictures are of the wrong shape, not finite, all equal or all constant. Other pictures than those
            that are returned are not looked at.
        OSError: the disk is full.

    Warns:
        UserWarning: there are fewer than 32 pictures.
    """
    if limit != "all" and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f'limit must be "all" or an int of at least 1, got {limit!r}')
    if isinstance(limit, int) and limit < 1:
        raise ValueError(f'limit must be "all" or an int of at least 1, got {limit}')
    if isinstance(augment, bool) or not isinstance(augment, int) or augment < 1:
        raise ValueError(f"augment must be an int of at least 1, the views of each picture; got {augment!r}")
    most = limit if isinstance(limit, int) else None
    form = Form.of(vision_config(model))
    if isinstance(images, Mapping):
        images = _pixels_of("images", images, form)
    checks = _Checks(model)
    source: Tensor | Storage
    rows: list[int] | None = None
    with _seeded(seed, images):
        if isinstance(images, Tensor):
            keys, _ = cast(Any, _indexed(images, form))
            source, rows = images, _drawn(len(keys), most, seed)
            for i in rows:
                checks.look(f"images[{i}]", images[i].detach().to("cpu", torch.float32))
        else:
            source = Storage("pixel values of the calibration images")
            for name, value in itertools.islice(_draw(images, most, seed, form), most):
                if isinstance(value, Path):
                    _check_file(name, value)
                if processor is None and not isinstance(value, Tensor):
                    processor = _processor_of(model)
                for tile in _processed(name, value, processor, form):
                    pixels = tile.detach().to("cpu", torch.float32)
                    checks.look(name, pixels)
                    source.append(pixels)
    if not checks.count:
        raise ValueError(f"there is no picture: got {_describe(images)}, empty or used up")
    checks.look_together()
    if checks.count < FEW:
        warnings.warn(
            f"calibrating on {checks.count} picture{'s' * (checks.count > 1)}; {RECOMMENDED} are recommended",
            UserWarning,
            stacklevel=3,
        )
    return Pictures(source, rows, augment, seed)


@contextmanager
def _seeded(seed: int, images: Any) -> Iterator[None]:
    """Inside, torch's CPU generator starts from ``seed``; after it, that one and a DataLoader's own are as before."""
    generators = [torch.default_generator]
    if isinstance(images, DataLoader):
        owned = (images.generator, getattr(images.sampler, "generator", None))
        generators += [generator for generator in owned if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _draw(images: Any, limit: int | None, seed: int, form: Form) -> Iterator[Picture]:
    """The pictures that are used, not decoded yet, in the order they have in ``images``; perhaps a few more."""
    indexed = _indexed(images, form)
    if indexed is not None:
        keys, fetch = indexed
        for i in _drawn(len(keys), limit, seed):
            yield from fetch(keys[i])
    elif isinstance(images, Iterable):
        for i, item in enumerate(images):
            yield from _split(f"images[{i}]", item, form)
    else:
        raise TypeError(f"images must be {ACCEPTED}; got {_describe(images)}")


def _drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """The numbers of ``limit`` of so many things, in order."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return cast(list[int], drawn.sort().values.tolist())


def _indexed(images: Any, form: Form) -> tuple[Sequence[Any], Callable[[Any], list[Picture]]] | None:
    """What can be drawn from, and what gives the pictures of one draw; None if images must be read from the start."""
    if isinstance(images, Tensor):
        _check_dtype("images", images)
        if images.ndim != 4:
            raise ValueError(f"images must be 4-D, (N, C, H, W), got {_describe(images)}")
        return range(len(images)), lambda i: [(f"images[{i}]", images[i])]
    if isinstance(images, str | os.PathLike):
        return _files(Path(images)), lambda path: [(str(path), path)]
    if isinstance(images, list | tuple):
        if [getattr(item, "ndim", None) for item in images[:3]] in ([4, 1], [4, 2]):
            images = images[:1]  # one batch of a DataLoader, and its labels
        found = [picture for i, item in enumerate(images) for picture in _split(f"images[{i}]", item, form)]
        return found, lambda x: [x]
    if isinstance(images, DataLoader):
        indices = _indices(images)
        if indices is None:
            return None
        dataset, collate = images.dataset, images.collate_fn
        return indices, lambda i: _split(f"dataset[{i}]", collate([dataset[i]]), form)
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return range(len(images)), lambda i: _split(f"images[{i}]", images[i], form)
    return None


def _indices(loader: DataLoader) -> list[Any] | None:
    """The indices that a DataLoader's sampler gives; None if it has none, or they may have no end."""
    batches: Any = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        return None
    try:
        len(batches)
    except (TypeError, NotImplementedError):
        return None
    return [index for batch in batches for index in batch]


def _files(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, sorted by their names relative to it."""
    if not os.path.isdir(folder):
        what = "is a file (pass a list of paths)" if os.path.isfile(folder) else "does not exist"
        raise ValueError(f"the folder of pictures {str(folder)!r} {what}; accepted are {ACCEPTED}")
    found = ((path.relative_to(folder), path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    kept = [(name.as_posix(), path) for name, path in found if not any(part.startswith(".") for part in name.parts)]
    return [path for _, path in sorted(kept) if path.is_file()]


def _split(name: str, item: Any, form: Form) -> list[Picture]:
    """The pictures of one item of a list, a dataset or an iterable: one, or a batch of them, with or without labels."""
    if isinstance(item, Mapping):
        return _split(name, _pixels_of(name, item, form), form)
    if isinstance(item, list | tuple) and item:
        kind, labels = _kind(item[0]), item[1:]
        pictures = [x for x in labels if not isinstance(x, Tensor) or (x.ndim > 2 and x.is_floating_point())]
        if kind and kind in map(_kind, pictures):
            raise ValueError(
                f"{name} holds {len(item)} items, more than one of them a picture; an item must be a picture, "
                "a batch (B, C, H, W), or (pictures, labels)"
            )
        return _split(name, item[0], form)
    kind = _kind(item)
    if kind == "tensor":
        _check_dtype(name, item)
        if item.ndim not in (3, 4):
            raise ValueError(f"{name} must be (C, H, W), or a batch (B, C, H, W), got {_describe(item)}")
        if item.ndim == 3 or len(item) == 1:
            return [(name, item.reshape(item.shape[-3:]))]
        return [(f"{name}[{i}]", row) for i, row in enumerate(item)]
    if kind == "file":
        return [(f"{name} ({item})", Path(item))]
    if kind == "picture":
        return [(name, item)]
    raise TypeError(f"images must be {ACCEPTED}; {name} is {_describe(item)}")


def _kind(item: Any) -> str | None:
    """Which kind of picture, or of holder of pictures, an item is."""
    from PIL import Image

    kinds: dict[str, Any] = {
        "tensor": Tensor, "file": (str, os.PathLike), "picture": Image.Image, "mapping": Mapping, "list": (list, tuple)
    }  # fmt: skip
    return next((kind for kind, types in kinds.items() if isinstance(item, types)), None)


def _pixels_of(name: str, mapping: Mapping[Any, Any], form: Form) -> Tensor | list[Any] | tuple[Any, ...]:
    """A processor's pixel values; pictures that are in another form than (N, C, H, W) as a list."""
    if "pixel_values" in mapping:
        pictures = pictures_of(mapping, form)
        if pictures is not None:
            return torch.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else pictures
        values = mapping["pixel_values"]
        if isinstance(values, Tensor | list | tuple):
            return values
        raise TypeError(
            f'the pixel_values of {name} must be a tensor, as with return_tensors="pt", got {_describe(values)}'
        )
    if mapping and all(isinstance(value, str) for value in mapping.values()):
        first = next(iter(mapping.items()))
        raise ValueError(f"calibration needs pictures, not names: {name} is a dict such as {first[0]!r}: {first[1]!r}")
    keys = ", ".join(repr(key) for key in list(mapping)[:8])
    raise ValueError(f'{name} must have the key "pixel_values", as a processor\'s output has; got the keys [{keys}]')


def _check_file(name: str, path: Path) -> None:
    """ValueError where a picture's path is no file, as where names of classes are passed."""
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder: pass a folder by itself, or a list of files")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is no file: calibration needs pictures, not names")


def _check_dtype(name: str, pixels: Tensor) -> None:
    """TypeError for anything but floating point."""
    if not pixels.is_floating_point():
        raise TypeError(
            f"{name} must be of a floating point dtype, got {_describe(pixels)}: "
            "normalise pictures with the model's image processor"
        )


def _processor_of(model: nn.Module) -> Callable[..., Any]:
    """The image processor in the local folder that the model was loaded from."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    reason = f"the model comes from {folder!r}, which is no local folder" if folder else "the model has no local folder"
    if folder and os.path.isdir(folder):
        transformers = importlib.import_module("transformers")  # here alone: tensors do without
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = f"there is none in {folder!r} ({str(error).splitlines()[0]})"
    raise ValueError(f"PIL images and files need an image processor, and {reason}: pass processor=")


def _processed(name: str, value: Any, processor: Callable[..., Any] | None, form: Form) -> Sequence[Tensor]:
    """The pixel values of one picture, (C, H, W); several where a processor cuts it into tiles."""
    if isinstance(value, Tensor):
        return [value]
    if not callable(processor):
        raise TypeError(f"processor must be a callable image processor, got {_describe(processor)}")
    made = processor(images=[_rgb(name, value)], return_tensors="pt")
    pixels = _pixels_of(f"what the processor makes of {name}", made, form)
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not (len(pixels) == 1 or made["pixel_values"].ndim == 5):
        raise ValueError(
            f'the processor must return {{"pixel_values": (1, C, H, W)}} for one picture, got {_describe(pixels)}'
        )
    _check_dtype(f"what the processor makes of {name}", pixels)
    return list(pixels)


def _rgb(name: str, picture: Any) -> Any:
    """A PIL image, or the one in a file, as RGB of 8 bits, the way up that its EXIF data say."""
    from PIL import Image, ImageOps

    try:
        with Image.open(picture) if isinstance(picture, Path) else nullcontext(picture) as opened:
            if opened.mode[0] in "IF":  # Pillow would clip these at 255: nearly white pictures
                raise ValueError(f"its mode is {opened.mode}; convert it to 8 bits a channel first")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


class _Checks:
    """Looks at each picture, and then at what they are together.

    Args:
        model: what it expects, by its config.
    """

    def __init__(self, model: nn.Module):
        config = vision_config(model)
        channels = getattr(config, "num_channels", None)
        size = None if takes_any_size(config) else getattr(config, "image_size", None)
        height, width = (size, size) if isinstance(size, int) or size is None else size
        self.wanted = (channels, height, width)
        self.known = channels is not None or size is not None
        self.count, self.differ, self.plain = 0, False, True
        self.first = torch.empty(0)

    def look(self, name: str, pixels: Tensor) -> None:
        """ValueError for a picture that is of another shape than the model's, or not finite."""
        if not self.count:
            self.first = pixels
        wanted = tuple(found if x is None else x for found, x in zip(self.first.shape, self.wanted))
        if tuple(pixels.shape) != wanted:
            whose = "as the model's config says" if self.known else "as the first picture is"
            raise ValueError(f"{name} must be {wanted}, (C, H, W), {whose}; got {tuple(pixels.shape)}")
        if not pixels.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite pixel values")
        self.differ = self.differ or not torch.equal(pixels, self.first)
        flat = pixels.flatten(1)  # (C, H * W)
        self.plain = self.plain and bool((flat == flat[:, :1]).all())  # by channel: black, normalised, is no one value
        self.count += 1

    def look_together(self) -> None:
        """ValueError where the pictures say nothing about what the model will see."""
        if self.count > 1 and not self.differ:
            raise ValueError(
                f"all {self.count} pictures are equal: calibration needs pictures such as the model will see"
            )
        if self.plain:
            raise ValueError("every picture is of one colour: calibration needs pictures such as the model will see")


def _describe(value: Any) -> str:
    """What came, for messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, str | int | float | Path) else type(value).__name__
