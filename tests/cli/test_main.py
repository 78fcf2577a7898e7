"""The program as a whole: help, versions, exit codes, and what goes where."""

import os
import shlex
import subprocess
import sys

import pytest
import typer
from beside import Beside, new_folder, python
from families import build

import fairseq
from fairseq.cli import contents
from fairseq.cli.main import COMMANDS, app, main
from fairseq.models.vit_quantization import ViTQuantizer

NAMES = [command.__name__ for command in COMMANDS]


def test_there_are_the_commands_that_were_promised():
    assert set(NAMES) == {
        "quantize",
        "compare",
        "evaluate",
        "benchmark",
        "export",
        "inspect",
        "distill",
        "pareto",
        "doctor",
        "report",
    }


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=lambda words: " ".join(words) or "top")
def test_help_has_examples_that_parse(cli, words):
    result = cli(*words, "--help")
    assert (result.code, result.err) == (0, "")
    examples = [line.strip() for line in result.out.splitlines() if line.strip().startswith("fairseq-vit ")]
    assert 1 <= len(examples) <= 3
    commands = typer.main.get_command(app).commands
    for example in examples:
        _, name, *arguments = shlex.split(example)
        assert not words or name == words[0]
        context = commands[name].make_context(name, arguments)
        assert context.params


def test_help_and_version_load_no_torch():
    code = (
        "import sys\nfrom fairseq.cli.main import main\n"
        f"for words in [['--help'], ['--version'], *([name, '--help'] for name in {NAMES})]:\n"
        "    assert main(words) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(cli):
    assert cli("--version") == (0, f"fairseq-vit {fairseq.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing command"),
        (["nothing"], "nothing"),
        (["quantize"], "Missing argument"),
        (["quantize", "x"], "--output"),
        (["quantize", "x", "-o", "y", "--bits", "many"], "--bits"),
        (["inspect", "x", "--unknown"], "--unknown"),
    ],
)
def test_mistakes_in_the_call_are_one_line(cli, words, said):
    result = cli(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err
    assert "fairseq-vit" in result.err


def test_bugs_keep_their_traceback(models, monkeypatch):
    monkeypatch.setattr(contents, "read", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(models / "packed")])


def test_ctrl_c_is_130(cli, models, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(contents, "read", stop)
    assert cli("inspect", models / "packed") == (130, "", "stopped\n")


def test_a_full_disk_is_one_line(cli, models, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contents, "read", full)
    result = cli("inspect", models / "packed")
    assert result == (2, "", "error: [Errno 28] No space left on device\n")


@Beside
def inspected():
    """The program as a float model and a packed one are inspected: in a pipe, in a terminal, by who goes away."""
    plain, packed, model = new_folder("float"), new_folder("packed"), build("vit")
    model.save_pretrained(plain)
    ViTQuantizer(bits=4).quantize_model(model).save_pretrained(packed)
    words = ["-m", "fairseq.cli", "inspect", str(packed), "--layers"]
    gone = shlex.join([sys.executable, *words]) + " | true"

    def run():
        return {
            "folder": plain,
            "float": python(*words[:3], plain),
            "pipe": python(*words),
            "terminal": in_a_terminal([sys.executable, *words]) if hasattr(os, "openpty") else None,
            "gone": subprocess.run(["bash", "-c", gone], capture_output=True, text=True),
        }

    return run


def in_a_terminal(words):
    """What a terminal gets, and the exit code."""
    here, there = os.openpty()
    with subprocess.Popen(words, stdout=there, stderr=subprocess.DEVNULL) as child:
        os.close(there)
        seen = b""
        while chunk := _read(here):
            seen += chunk
    os.close(here)
    return seen, child.returncode


def _read(file):
    try:
        return os.read(file, 1024)
    except OSError:  # Linux, at the end
        return b""


@inspected
def test_the_module_is_the_program():
    found = inspected.result()
    done, said = found["float"], f"{found['folder']} is not quantized\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, said, "")


@inspected
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_a_terminal_and_a_pipe_get_the_same():
    seen, code = inspected.result()["terminal"]
    assert code == 0
    assert seen.decode().replace("\r\n", "\n") == inspected.result()["pipe"].stdout
    assert b"\x1b" not in seen


@inspected
def test_a_reader_that_goes_away_is_no_traceback():
    assert "Traceback" not in inspected.result()["gone"].stderr
