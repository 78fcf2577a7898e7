"""The program as a whole: help, versions, exit codes, and what goes where."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from beside import python

import fairseq
from fairseq.cli import contents
from fairseq.cli.main import COMMANDS, app, main
from fairseq.cli.output import mistakes

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
    def stumble(*arguments):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            error = ZeroDivisionError("in the clean-up")
            raise error from error

    monkeypatch.setattr(contents, "read", stumble)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(models / "packed")])


def test_ctrl_c_is_130(cli, models, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(contents, "read", stop)
    assert cli("inspect", models / "packed") == (130, "", "stopped\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_whatever_became_of_it(cli, models, monkeypatch, number, code):
    class Noticed:
        def __set_name__(self, owner, name):
            signal.raise_signal(number)

    def stop(*arguments):
        with mistakes(ImportError):
            try:
                type("Named", (), {"name": Noticed()})  # as enumerations in transformers while they are imported
            except RuntimeError as error:
                raise ModuleNotFoundError("Could not import module 'PrinterCallback'") from error
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(contents, "read", stop)
    assert cli("inspect", models / "packed") == (code, "", "stopped\n")


def test_a_full_disk_is_one_line(cli, models, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contents, "read", full)
    result = cli("inspect", models / "packed")
    assert result == (2, "", "error: [Errno 28] No space left on device\n")


@pytest.fixture(scope="module", params=["--help", pytest.param("inspect", marks=pytest.mark.slow)])
def ran(request, models):
    """The program in a pipe, in a terminal, and read by who goes away; for help it imports no torch, which takes long.

    With the words that it was given, and the exit code and both streams in the pipe.
    """
    words = {"--help": ["--help"], "inspect": ["inspect", str(models / "packed"), "--layers"]}[request.param]
    command = [sys.executable, "-m", "fairseq.cli", *words]
    gone = shlex.join(command) + " | true"
    return {
        "words": words,
        "pipe": python(*command[1:]),
        "terminal": in_a_terminal(command) if hasattr(os, "openpty") else None,
        "gone": subprocess.run(["bash", "-c", gone], capture_output=True, text=True),
    }


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


def test_the_module_is_the_program(cli, ran):
    done = ran["pipe"]
    assert done.stdout.startswith(("Usage: fairseq-vit", "Model:       ViTForImageClassification"))
    assert (done.returncode, done.stdout, done.stderr) == cli(*ran["words"])


def test_the_exit_code_of_the_process(cli):
    done = python("-m", "fairseq.cli", "nothing")
    assert (done.returncode, done.stdout, done.stderr) == cli("nothing")
    assert done.returncode == 2


@pytest.mark.slow
def test_the_exit_code_of_a_check(models):
    done, said = python("-m", "fairseq.cli", "inspect", models / "vit"), f"{models / 'vit'} is not quantized\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, said, "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_a_terminal_and_a_pipe_get_the_same(ran):
    seen, code = ran["terminal"]
    assert code == 0
    assert seen.decode().replace("\r\n", "\n") == ran["pipe"].stdout
    assert b"\x1b" not in seen


def test_a_reader_that_goes_away_is_no_traceback(ran):
    assert "Traceback" not in ran["gone"].stderr
