"""The C program: the integers of the model, without a warning or undefined behaviour, and a sentence for a bad file."""

import importlib.util
import math
import random
import shutil
import subprocess
import sys
import zlib

import pytest
import torch
from families import shortened
from integer_models import EACH, EXAMPLES, PICTURES, embedded, embedded_pictures, made

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export.integer_c import c_files

FOLDER = EXAMPLES / "integer_c"
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here: neither cc, gcc nor clang")


def compile_for(folder, *flags):
    """The program for the model.h in a folder; what the compiler says is an error."""
    command = [COMPILER, *STRICT, *flags, "-I", str(folder), "-o", str(folder / "program")]
    done = subprocess.run([*command, str(FOLDER / "integer_vit.c")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run(folder, *files):
    done = subprocess.run(
        [str(folder / "program"), *(str(folder / name) for name in files)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def sanitizers(folder):
    """The flags, if the compiler can link what they need."""
    (folder / "nothing.c").write_text("int main(void) { return 0; }\n")
    command = [COMPILER, *SANITIZERS, "-o", str(folder / "nothing"), str(folder / "nothing.c")]
    return SANITIZERS if subprocess.run(command, capture_output=True).returncode == 0 else []


def lines_of(integers):
    return "".join(" ".join(map(str, row)) + "\n" for row in integers.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_embedded_model(tmp_path, activations):
    model = embedded(activations)
    pixels = model.round_pixels(embedded_pictures()[:3])
    report = ViTQuantizer.export(model, tmp_path / "model.bin", "c", sample=pixels[:2])
    assert report.paths == (str(tmp_path / "model.bin"), str(tmp_path / "model.h"))
    pixels.numpy().tofile(tmp_path / "pictures.raw")
    compile_for(tmp_path, "-O2")
    assert run(tmp_path, "model.bin", "pictures.raw") == (0, lines_of(model.integer_logits(pixels)), "")
    assert run(tmp_path, "model.bin")[:2] == (0, "2 pictures in the model give the logits that it gave\n")


def test_what_the_program_does_not_compute_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pooler_output of this model is something else; export it as ONNX"):
        ViTQuantizer.export(made("attention pooling"), tmp_path / "model.bin", "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in EACH if kind != "attention pooling"])
def test_every_kind_of_model_has_defined_behaviour(tmp_path, kind):
    model = made(kind)
    ViTQuantizer.export(model, tmp_path / "model.bin", "c")  # with two pictures
    generator = torch.Generator().manual_seed(0)
    extremes = torch.randint(0, 2, (2, 3, 16, 16), generator=generator, dtype=torch.uint8) * 255
    pixels = torch.cat((model.round_pixels(PICTURES), extremes, 0 * extremes[:1], 0 * extremes[:1] + 255))
    pixels.numpy().tofile(tmp_path / "pictures.raw")
    compile_for(tmp_path, "-O1", "-funsigned-char", *sanitizers(tmp_path))
    expected = lines_of(model.integer_logits(pixels))
    assert run(tmp_path, "model.bin", "pictures.raw", "pictures.raw") == (0, 2 * expected, "")
    assert run(tmp_path, "model.bin") == (0, "2 pictures in the model give the logits that it gave\n", "")


def test_the_script_of_the_folder_makes_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("script_make_model", FOLDER / "make_model.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    loaded = script.load_embedded()
    script.load_embedded = lambda: loaded._replace(model=shortened(loaded.model))
    monkeypatch.setattr(sys, "argv", ["make_model.py", "--calibration", "8", "--output", str(tmp_path)])
    assert script.main() == 0
    compile_for(tmp_path, "-O2")
    expected = (tmp_path / "expected.txt").read_text()
    assert run(tmp_path, "model.bin", "pictures.raw") == (0, expected, "")
    assert len(expected.splitlines()) == 8
    (tmp_path / "model.bin").write_bytes(resealed(tmp_path / "model.bin", lambda body: body[:-1] + b"\x55"))
    assert run(tmp_path, "model.bin") == (1, "picture 1 of those in the model gives other logits\n", "")


FUNCTIONS = """
#define main program
#include "integer_vit.c"
#undef main

int main(void)
{
    int64_t a, b;
    while (scanf("%" SCNd64 " %" SCNd64, &a, &b) == 2) {
        int n = (int)(b % 62);
        unsigned char bytes[8];
        for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)a >> 8 * i);
        int32_t rows[3] = {(int32_t)(a % 32768), 0, -(int32_t)b};
        int16_t q[3], unsigned_q[3];
        int64_t m = to_bytes(rows, 1, 3, 0, 0, q), unsigned_m = to_bytes(rows, 1, 3, 0, 1, unsigned_q);
        printf("%" PRId64 " %" PRId64 " %" PRId64 " %" PRId64, shift_right(a, n), round_shift(a, n), floor_div(a, b),
               square_root(a < 0 ? -a : a));
        printf(" %d %d %d %" PRId64, q[0], q[1], q[2], m);
        printf(" %d %d %d %" PRId64 "\\n", unsigned_q[0], unsigned_q[1], unsigned_q[2], unsigned_m);
        if (int64_at(bytes, 0) != a || int32_at(bytes, 0) != (int32_t)(uint32_t)a) return 1;
    }
    return 0;
}
"""


def rows_by_hand(row, largest, shift):
    m = max(1, *map(abs, row))
    r = (largest << shift) // m
    return [*((x * r + (1 << shift - 1)) >> shift for x in row), m]


def test_functions_at_their_ends(tmp_path):
    """Squares and their neighbours, powers of two of either sign, rows of zeros; of numbers below 2**62."""
    (tmp_path / "model.h").write_text(c_files(made("dynamic"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[1])
    (tmp_path / "functions.c").write_text(FUNCTIONS)
    command = [COMPILER, *STRICT, "-Wno-unused-function", *sanitizers(tmp_path), "-I", str(tmp_path), "-I", str(FOLDER)]
    command += ["-o", str(tmp_path / "functions"), str(tmp_path / "functions.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rng = random.Random(0)
    roots = [1, 2, 3, 1000, 2**30, 2**31 - 1, *(rng.randrange(1, 2**31) for _ in range(300))]
    near = [x + d for x in (*(root * root for root in roots), *(2**k for k in range(61))) for d in (-1, 0, 1)]
    pairs = [(sign * x, rng.choice((1, 2, 61, 7, 2**15))) for x in (*near, 0) for sign in (1, -1)]
    given = "".join(f"{a} {b}\n" for a, b in pairs)
    done = subprocess.run([str(tmp_path / "functions")], input=given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for (a, b), line in zip(pairs, done.stdout.splitlines(), strict=True):
        n, row = b % 62, [abs(a) % 32768 * (1 if a > 0 else -1), 0, -b]
        expected = [a >> n, (a + (1 << n >> 1)) >> n, a // b, math.isqrt(abs(a))]
        expected += rows_by_hand(row, 127, 23) + rows_by_hand([max(x, 0) for x in row], 255, 22)
        assert list(map(int, line.split())) == expected, (a, b)


def resealed(path, change):
    """The file with another body, and the checksum of that."""
    content = path.read_bytes()
    body = change(content[16:])
    return content[:12] + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.fixture(scope="module", params=["spread", "dynamic"])
def program(request, tmp_path_factory):
    """A folder with a program and its model."""
    folder = tmp_path_factory.mktemp("program")
    ViTQuantizer.export(made(request.param), folder / "model.bin", "c")
    compile_for(folder, "-O1", *sanitizers(folder))
    return folder


def refused(folder, *files):
    """The sentence for files that cannot be."""
    code, out, error = run(folder, *files)
    assert (code, out) == (2, ""), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_bad_models_are_a_sentence(program):
    whole = (program / "model.bin").read_bytes()
    cases = {
        b"": "is no file that", whole[:15]: "is no file that", b"MIVT" + whole[4:]: "is no file that",
        whole[:4] + b"\x01" + whole[5:]: "another version", whole[:-1]: "not as long", whole + b"\x00": "not as long",
        whole[:9999]: "not as long", whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]: "is damaged: its checksum",
    }  # fmt: skip
    for content, sentence in cases.items():
        (program / "bad.bin").write_bytes(content)
        assert sentence in refused(program, "bad.bin")
    assert "cannot be opened" in refused(program, "none.bin")
    assert "usage" in refused(program)
    (program / "other.bin").write_bytes(c_files(made("static"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0])
    assert "not as long as model.h says" in refused(program, "other.bin")


def test_bad_pictures_are_a_sentence(program):
    for length in (0, 1, 767, 769):
        (program / "bad.raw").write_bytes(bytes(length))
        code, _, error = run(program, "model.bin", "bad.raw")
        assert (code, error.count("\n")) == (2, 1)
        assert "channels * height * width bytes" in error
    assert "cannot be opened" in refused(program, "model.bin", "none.raw")


def test_whatever_is_in_a_file_nothing_is_undefined(program):
    """Changed at random and sealed again: a sentence, or other logits."""
    rng, codes = random.Random(0), set()
    for _ in range(150):

        def change(body):
            body = bytearray(body)
            for _ in range(rng.choice((1, 3, 40))):
                body[rng.randrange(min(len(body), rng.choice((200, 3000, 10**9))))] = rng.choice((0, 1, 127, 128, 255))
            return bytes(body)

        (program / "bad.bin").write_bytes(resealed(program / "model.bin", change))
        code, _, error = run(program, "bad.bin")
        assert code in (0, 1, 2), error
        assert "runtime error" not in error
        assert "Sanitizer" not in error
        codes.add(code)
    assert codes >= {1, 2}


def test_only_integer_models_have_such_a_file(tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="format 'c' is for integer-only models"):
        ViTQuantizer.export(ViTQuantizer().quantize_model(tiny_vit), tmp_path / "model.bin", "c")
    with pytest.raises(ValueError, match="pixels must be one of 'uint8'; got 'float32'"):
        ViTQuantizer.export(made("dynamic"), tmp_path / "model.bin", "c", pixels="float32")
    assert not list(tmp_path.iterdir())
