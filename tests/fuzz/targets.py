"""What each loader does with bytes that nobody checked: targets for a fuzzer, with seeds that are made, not kept."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from families import build
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from transformers import ViTImageProcessor

from fairseq.cli import contents as cli_contents
from fairseq.cli import loading, pictures
from fairseq.cli.output import UserError
from fairseq.cli.saving import holds_packed_model
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.bit_allocation.assignment import BitAssignment
from fairseq.quantization.bit_allocation.pareto import Pareto
from fairseq.quantization.bit_allocation.point import Point
from fairseq.quantization.evaluation.report import QuantizationReport
from fairseq.quantization.files import check_stored
from fairseq.quantization.json_files import parse_json
from fairseq.quantization.saving.contents import inspect, write
from fairseq.quantization.saving.huggingface import FairseqViTConfig

DOCUMENTED = (ValueError, OSError, UserError)
"""What a loader may raise about a file."""
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    9,
    16,
    31,
    32,
    128,
    255,
    256,
    65536,
    2**31 - 1,
    2**31,
    2**63,
    10**18,
    10**30,
    0.5,
    -0.0,
)
VALUES = (*NUMBERS, None, True, False, "", "x", "classifier", "\0", "..", "a.b", [], [[]], {}, {"": 0}, [0, 1])


class Target(NamedTuple):
    """``seeds``: inputs that load; ``run``: loads one, and raises one of :data:`DOCUMENTED` or nothing."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], object]


TARGETS: dict[str, Target] = {}
_HELD = tempfile.TemporaryDirectory(prefix="fuzz-")
ROOM = Path(_HELD.name)
MODEL = build("vit")


def target(seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    """Make a function of bytes a target, by its name."""

    def add(run: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[run.__name__] = Target(seeds, run)
        return run

    return add


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: of bytes, or of the tree if it is JSON or has a header in JSON."""
    for _ in range(rng.randrange(1, 5)):
        data = rng.choice((_in_bytes, _in_tree, _in_tree, _in_header))(data, rng)
    return data


def _in_bytes(data: bytes, rng: random.Random) -> bytes:
    changed, place = bytearray(data), rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 4, 8, 64))
    kind = rng.randrange(6)
    if kind == 0 and place < len(data):
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[place : place + length]
    elif kind == 2:
        changed[place:place] = rng.randbytes(length)
    elif kind == 3:
        changed[place : place + length] = bytes([rng.choice((0, 255, 34, 91, 123))]) * length
    elif kind == 4:
        changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 1000))
    elif kind == 5:
        del changed[place:]
    return bytes(changed)


def _in_tree(data: bytes, rng: random.Random) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _in_bytes(data, rng)
    return json.dumps(_changed(tree, rng)).encode()


def _in_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return _in_bytes(data, rng)
    header = _in_tree(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _changed(tree: object, rng: random.Random) -> object:
    """The tree with another value somewhere; a text that is JSON itself is one, too."""
    if isinstance(tree, str) and tree[:1] == "{" and rng.random() < 0.9:
        try:
            return json.dumps(_changed(json.loads(tree), rng))
        except ValueError:
            return rng.choice(VALUES)
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return rng.choice(VALUES)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = rng.choice(keys)
    what = rng.randrange(8)
    if what == 0:
        del tree[key]
    elif what == 1 and isinstance(tree, dict):
        tree[rng.choice(("", "x", "bits", "\0", str(key) + ".0"))] = tree[key]
    elif what == 2 and isinstance(tree, list):
        tree.append(tree[key])
    else:
        tree[key] = _changed(tree[key], rng)
    return tree


def _file(name: str, data: bytes) -> Path:
    path = ROOM / name
    path.write_bytes(data)
    return path


@functools.cache
def _folder(kind: str) -> Path:
    """A folder with a tiny model that was saved: "packed", "sharded", "integer" or "float"."""
    folder, model = ROOM / kind, MODEL
    if kind == "integer":
        images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        model = ViTQuantizer(bits=8, method="channel", arithmetic="integer").quantize_model(MODEL, images)
    elif kind != "float":
        model = ViTQuantizer(bits=4, method="channel").quantize_model(MODEL)
    model.save_pretrained(folder, max_shard_size="5KB" if kind == "sharded" else "5GB")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def _read(kind: str, name: str) -> Callable[[], list[bytes]]:
    return lambda: [(_folder(kind) / name).read_bytes()]


def _with(kind: str, name: str, data: bytes) -> Path:
    """The folder with other bytes in one of its files."""
    (_folder(kind) / name).write_bytes(data)
    return _folder(kind)


@target(_read("packed", "model.safetensors"))
def packed_file(data: bytes) -> object:
    return ViTQuantizer.load(_file("packed.safetensors", data), MODEL)


@target(_read("integer", "model.safetensors"))
def integer_file(data: bytes) -> object:
    return ViTQuantizer.load(_file("integer.safetensors", data))


def _description(kind: str) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(inspect([_folder(kind) / "model.safetensors"]).description).encode()]


def _resealed(kind: str, data: bytes) -> Path:
    """A file that says what ``data`` says, all of its checksums right, as an attacker would write it."""
    path = ROOM / f"resealed-{kind}.safetensors"
    write(dict(_tensors(kind)), path, parse_json(data.decode(), "the description"))
    return path


@functools.cache
def _tensors(kind: str) -> dict[str, torch.Tensor]:
    return load_file(_folder(kind) / "model.safetensors")


@target(_description("packed"))
def packed_description(data: bytes) -> object:
    path = _resealed("packed", data)
    found = cli_contents.read(path)
    cli_contents.text(found, True)
    return ViTQuantizer.load(path, MODEL)


@target(_description("integer"))
def integer_description(data: bytes) -> object:
    path = _resealed("integer", data)
    found = cli_contents.read(path)
    cli_contents.text(found, True)
    return ViTQuantizer.load(path)


def _loaded_tensors(kind: str, data: bytes) -> Path:
    """A file with the tensors in ``data``, all of its checksums right."""
    try:
        tensors = load_tensors(data)
    except Exception as error:  # this is not what is tested
        raise ValueError("no tensors") from error
    path = ROOM / f"tensors-{kind}.safetensors"
    write(tensors, path, inspect([_folder(kind) / "model.safetensors"], verify=False).description)
    return path


@target(lambda: [save_tensors(_tensors("packed"))])
def packed_tensors(data: bytes) -> object:
    return ViTQuantizer.load(_loaded_tensors("packed", data), MODEL)


@target(lambda: [save_tensors(_tensors("integer"))])
def integer_tensors(data: bytes) -> object:
    return ViTQuantizer.load(_loaded_tensors("integer", data))


def _load(folder: Path) -> object:
    """As the command line does, weights and all."""
    holds_packed_model(folder)
    found = cli_contents.read(folder)
    if found is not None:
        cli_contents.text(found, True)
    return loading.load(str(folder))


@target(_read("packed", "config.json"))
def packed_config(data: bytes) -> object:
    return _load(_with("packed", "config.json", data))


@target(_read("float", "config.json"))
def float_config(data: bytes) -> object:
    return _load(_with("float", "config.json", data))


@target(_read("sharded", "model.safetensors.index.json"))
def index(data: bytes) -> object:
    return _load(_with("sharded", "model.safetensors.index.json", data))


@target(_read("float", "preprocessor_config.json"))
def processor_config(data: bytes) -> object:
    folder = _folder("processor") if (ROOM / "processor").is_dir() else _new_processor()
    (folder / "preprocessor_config.json").write_bytes(data)
    processor = loading.load(str(folder)).processor
    if processor is None:
        return None
    with loading.failures(str(folder)):
        return processor(images=Image.new("RGB", (20, 20)), return_tensors="pt")


def _new_processor() -> Path:
    MODEL.save_pretrained(ROOM / "processor")
    return ROOM / "processor"


@target(lambda: [b'{"quant_method": "fairseq_vit", "bits": 4, "method": "channel", "overrides": {"*": {"bits": 8}}}'])
def quantization_config(data: bytes) -> object:
    values = parse_json(data.decode(), "quantization_config")
    if not isinstance(values, dict):
        raise ValueError("transformers takes objects alone")
    return FairseqViTConfig.from_dict(values)


@functools.cache
def _report() -> QuantizationReport:
    quantizer = ViTQuantizer(bits=4, method="channel")
    quantizer.quantize_model(MODEL)
    assert quantizer.report is not None
    return quantizer.report


def _written(save: Callable[[Path], object]) -> list[bytes]:
    save(ROOM / "seed")
    return [(ROOM / "seed").read_bytes()]


@target(lambda: _written(lambda path: _report().to_json(path)))
def report(data: bytes) -> object:
    found = QuantizationReport.from_json(_file("report.json", data))
    found.to_csv(ROOM / "report.csv")
    return str(found), found.table()


@target(lambda: _written(BitAssignment({"a": 4, "b": 8}, {"a": 10, "b": 20}, {"a": {4: 0.5}}).save))
def bit_assignment(data: bytes) -> object:
    return str(BitAssignment.load(_file("assignment.json", data)))


@target(lambda: _written(Pareto("ViT", 10, 3, 2, (Point(4.0, 10, 0.5, 0.1, {"a": {"bits": 4}}),)).save))
def pareto(data: bytes) -> object:
    return str(Pareto.load(_file("pareto.json", data)))


def _checkpoint() -> list[bytes]:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, file)
    return [file.getvalue()]


@target(_checkpoint)
def checkpoint(data: bytes) -> object:
    path = _file("pytorch_model.bin", data)
    check_stored(path)
    return path


def _picture() -> list[bytes]:
    files = [io.BytesIO() for _ in range(3)]
    for file, kind in zip(files, ("PNG", "JPEG", "WEBP")):
        Image.effect_noise((20, 20), 60).convert("RGB").save(file, kind)
    return [file.getvalue() for file in files]


@target(_picture)
def picture(data: bytes) -> object:
    return pictures.read_image(_file("picture.png", data), "picture.png").size


@target(lambda: [b"file,class_index\na.png,3\n"])
def labels(data: bytes) -> object:
    folder = ROOM / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(b"")
    return pictures.labelled_images(folder, _file("labels.csv", data), 7)[1].tolist()
