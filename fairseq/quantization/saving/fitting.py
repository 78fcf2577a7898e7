"""Which packed parts of files have a place in a model: of the same class, with another head, of a part or a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fairseq.modules.quantization.packed.layout import earlier
from fairseq.quantization.saving.checkpoint import part_names, part_state, part_tensors
from fairseq.quantization.saving.contents import Contents
from fairseq.quantization.saving.description import packed_name
from fairseq.quantization.saving.names import names_on_disk


class Resized(NamedTuple):
    """A float weight of a model that stays, because the part in the files is of another size.

    Its name in the memory of the model; its name in the files, if it were there; the name and the shape of the integers
    that are there; and the name of the settings beside them, whose shape is that of no weight.
    """

    name: str
    on_disk: str
    codes: str
    shape: tuple[int, ...]
    settings: str


@dataclass(frozen=True)
class Fit:
    """What goes where.

    Attributes:
        contents: of the files, under the names of the model, with the parts that go there.
        names: of these in the memory of the model, by their names on disk.
        resized: what does not go there for its size.
        derived: whether the model is another one than the files'.
    """

    contents: Contents
    names: dict[str, str]
    resized: list[Resized]
    derived: bool


def fit(model: nn.Module, contents: Contents) -> Fit:
    """Find the places of packed parts, as transformers does for float weights.

    A base model finds its weights in the files of a model with a head, and the other way round; what the model has not
    at all, such as another head, is left out.

    Args:
        model: the float model; its weights may be on the meta device.
        contents: of the files.

    Raises:
        ValueError: no part has a place, or one within what the model has; a part is not whole or of another dtype.
    """
    known = set(names_on_disk(model, [n for n, _ in (*model.named_modules(), *model.named_parameters()) if n]).values())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    here = _under_its_names(contents, known, prefix)
    placed = here.only([name for name in here.parts if name in known or _belongs(name, known, prefix)])
    names = part_names(model, placed if placed.parts else contents)  # of none, the first says what is wrong
    names = {on_disk: name for on_disk, name in names.items() if _holds_weights(model, name)}
    found = {on_disk: _resized(model, here, on_disk, name) for on_disk, name in names.items()}
    names = {on_disk: name for on_disk, name in names.items() if found[on_disk] is None}
    fitting = here.only(names)
    part_tensors(model, fitting, names)
    resized = [entry for entry in found.values() if entry is not None]
    return Fit(fitting, names, resized, derived=fitting.parts != contents.parts)


def _under_its_names(contents: Contents, known: set[str], prefix: str) -> Contents:
    """Without or with the prefix of the base model, if only that gives names that the model has."""
    if prefix == "." or any(name in known for name in contents.parts):
        return contents
    if any(name.startswith(prefix) for name in contents.parts):
        return contents.below(prefix)
    return contents.above(prefix) if any(prefix + name in known for name in contents.parts) else contents


def _belongs(name: str, known: set[str], prefix: str) -> bool:
    """Whether the model, or its base model, has the child that a part without a place is in."""
    child = prefix * name.startswith(prefix) + name.removeprefix(prefix).partition(".")[0]
    return child in known or any(other.startswith(f"{child}.") for other in known)


def _holds_weights(model: nn.Module, name: str) -> bool:
    """Whether there is a layer, not nn.Identity in the place of a head that is not wanted, or a parameter."""
    if packed_name(model, name) != name:
        return True
    return next(model.get_submodule(name).parameters(), None) is not None


def _resized(model: nn.Module, contents: Contents, on_disk: str, name: str) -> Resized | None:
    """A part that is whole, of which a tensor has another shape than in the model."""
    try:
        shapes = {key: tuple(tensor.shape) for key, tensor in part_state(model, name, contents.parts[on_disk]).items()}
    except ValueError:
        return None  # whoever reads it says why
    there = {key: contents.tensors[key] for key in shapes if key in contents.tensors}
    if len(there) < len(shapes) or all(there[key].shape == shape for key, shape in shapes.items()):
        return None
    codes, settings = (next(key for key in shapes if key.endswith(end)) for end in (".weight_codes", ".settings"))
    if earlier(contents.parts[on_disk].get("bits", 8), there[codes].shape, shapes[codes]):
        return None
    memory = name if packed_name(model, name) != name else f"{name}.weight"
    weight = on_disk if memory == name else f"{on_disk}.weight"
    before = there[settings].key.removesuffix(settings)  # the files may have a prefix more, or less
    weight = weight.removeprefix(settings.removesuffix(there[settings].key)) if not before else before + weight
    return Resized(memory, weight, there[codes].key, there[codes].shape, there[settings].key)
