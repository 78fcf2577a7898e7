"""The guide: every python block of every page runs, in order, as it is written but for the hub id.

The model has one block, and synthetic pictures are as small as its own, and fewer: 128 of 224 by 224 pixels take ten
seconds.
"""

import ast
import csv
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from families import shortened
from PIL import Image
from transformers import ViTImageProcessor

from fairseq.cli import machine_speed
from fairseq.cli.main import app, main
from fairseq.models import vit_quantization
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.calibration.synthetic import synthetic_images
from fairseq.quantization.utils import quant_modules, quant_utils

ROOT = Path(__file__).parent.parent
HUB_ID = "google/vit-base-patch16-224"
PAGES = [
    p for p in [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))] if "code-block:: python" in p.read_text()
]


def python_blocks(text):
    """The bodies of `.. code-block:: python`, dedented."""
    for match in re.finditer(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text, re.MULTILINE):
        yield re.sub(r"^   ", "", match[1], flags=re.MULTILINE)


@pytest.fixture
def model_folder(tiny_vit, tmp_path):
    folder = tmp_path / "vit"
    shortened(tiny_vit).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    shutil.copy(ROOT / "examples" / "vision_transformer" / "assets" / "chelsea.jpg", tmp_path / "cat.jpg")
    (tmp_path / "pictures").mkdir()
    with Image.open(tmp_path / "cat.jpg") as photo:
        for i in range(36):
            photo.crop((3 * i, 2 * i, 3 * i + 120, 2 * i + 120)).save(tmp_path / "pictures" / f"{i}.png")
    return folder


def test_there_are_pages_with_code():
    assert {p.name for p in PAGES} >= {"README.rst", "index.rst", "usage.rst", "saving.rst", "export.rst"}


LONG = ("calibration.rst", "export.rst")
"""Half a minute each."""


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p.name in LONG), id=p.name) for p in PAGES]
)
def test_every_block_runs(page, model_folder, tmp_path, monkeypatch, verified_here):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic_images, "__defaults__", (32, 16, 0))
    torch.manual_seed(0)
    namespace = {}
    blocks = list(python_blocks(page.read_text()))
    assert len(blocks) == page.read_text().count("code-block:: python\n")
    for block in blocks:
        code = block.replace(f'"{HUB_ID}"', repr(str(model_folder)))
        exec(compile(code, str(page), "exec"), namespace)


def names_of_the_reference():
    """(Whether it is a member, the last name) of every function, class and member that api.rst documents."""
    text = (ROOT / "docs" / "api.rst").read_text()
    directive = r"^\.\. auto(class|function|module):: (\S+)\n((?:   .*\n)*)"
    for kind, path, options in re.findall(directive, text, re.MULTILINE):
        module, _, name = path.rpartition(".")
        members = re.search(r":members:(.*)", options)
        if kind != "module":
            yield False, name
        if members and members[1].strip():
            yield from ((kind != "module", member) for member in members[1].strip().split(", "))
        elif members:
            documented = vars(getattr(importlib.import_module(module), name))
            yield from ((True, key) for key, value in documented.items() if callable(value) and not key.startswith("_"))
    yield from ((True, name) for name in re.findall(r"scalar\.ops\.(emulate_int\d_\w+)\(", text))


def test_every_public_name_has_an_example():
    """By last names, so that one of two classes with a method of one name can hide the other's."""
    nodes = [x for page in PAGES for block in python_blocks(page.read_text()) for x in ast.walk(ast.parse(block))]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used = attributes | {node.id for node in nodes if isinstance(node, ast.Name)}  # an import alone is no use of a name
    names = set(names_of_the_reference()) - {(True, "forward")}  # which a call of the layer is
    assert len(names) > 100
    assert [name for member, name in names if name not in (attributes if member else used)] == []
    exported = {*vit_quantization.__all__, *quant_modules.__all__, *quant_utils.__all__}
    assert exported <= {name for _, name in names}


def commands_of_the_command_line_page():
    text = (ROOT / "docs" / "command_line.rst").read_text()
    blocks = re.findall(r"^\.\. code-block:: bash\n\n((?:   .*\n|\n)+)", text, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines() if "fairseq-vit " in line]


def test_every_command_of_the_command_line_page_parses():
    commands, used = typer.main.get_command(app).commands, set()
    for command in commands_of_the_command_line_page():
        program, name, *words = shlex.split(command)
        assert program == "fairseq-vit"
        used.add(name)
        assert commands[name].make_context(name, words).params, command
    assert used >= {"quantize", "compare", "evaluate", "benchmark", "export", "inspect", "doctor"}


@pytest.mark.slow
def test_every_command_of_the_command_line_page_runs(model_folder, tmp_path, monkeypatch, verified_here):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(machine_speed, "SECONDS", 0)
    torch.set_num_threads(1)  # another test may have left more than there are cores, of which doctor complains
    with open("labels.csv", "w", newline="") as opened:
        csv.writer(opened).writerows([("file", "class_index"), *((f"{i}.png", i % 7) for i in range(36))])
    for command in commands_of_the_command_line_page():
        words = shlex.split(command.replace(HUB_ID, str(model_folder)))[1:]
        assert main(words) == (words[0] == "doctor" and not native.levels()), command


FOREIGN = {
    "... size mismatch",
    "operator torchvision::nms does not exist",
    "'PackedLinear' object has no attribute 'weight'",
    "symbolically traced variables cannot be used as inputs to control flow",
}
"""What PyTorch says."""


def strings_of_the_source():
    """Every string in the library's code, the constant pieces of f-strings one by one."""
    for path in (ROOT / "fairseq").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_messages_that_the_guide_explains_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.rst").read_text()
    titles = [line for line in text.splitlines() if re.match(r"``[^`]* [^`]*``", line)]
    quoted = [re.match(r"``(?:\w+Error: )?(.*?)``", line)[1] for line in titles]
    messages = [message for message in quoted if message not in FOREIGN and "pip" not in message]
    assert len(messages) >= 8
    strings = set(strings_of_the_source())
    for message in messages:
        for piece in filter(None, (piece.strip() for piece in message.split("..."))):
            assert any(piece in string for string in strings), (message, piece)
