"""The page: what it holds, in the file and in a real browser."""

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.layer_report import LayerReport
from fairseq.quantization.evaluation.page import Change, Page, summary

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
LAYERS = [
    LayerReport("blocks.0.q", "attention", (8, 16), 512, 80, 4, "channel", block="blocks.0", weight_sqnr=9.5),
    LayerReport("blocks.0.fc", "mlp", (100, 16), 6400, 900, 3, "channel", block="blocks.0", weight_sqnr=20.25),
    LayerReport("blocks.10.fc", "mlp", (8, 16), 512, 90, 8, "tensor", block="blocks.10", weight_sqnr=math.inf),
    LayerReport("<head>", "classifier", (3, 16), 192, 192, skipped="kept & left"),
]
PAGE = Page(
    title="A <model>",
    summary=["It keeps 90% of the classes.", "And more."],
    figures=[("memory", "1.0 MB")],
    layers=LAYERS,
    shares=[0.1, 0.5, 0.1, 0.3],
    alone={"blocks.0": 0.2, "blocks.10": 0.05},
    outputs=[("logits", "0.1", "top-1 match", "0.9000")],
    pictures=10,
    changes=[Change(PIXEL, "cat & dog.png", [("cat", 0.625), ("dog", 0.25)], [("dog", 0.5), ("cat", 0.375)])],
    changed=1,
    maps=[(PIXEL, PIXEL, PIXEL)],
    scatter=PIXEL,
    others=[("float", "4.0 MB", "100.0%", "9.0 ms")],
    kept_in_float={"kept & left": ["<head>"]},
    facts=[("command", "fairseq-vit report a b")],
)


class Reader(HTMLParser):
    """The text of a page, its addresses, and the elements that are open at its end."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_all_is_there_and_escaped_and_nothing_comes_from_elsewhere():
    text = PAGE.html()
    read = Reader(text)
    words = " ".join(" ".join(read.words).split())
    assert read.open == []
    assert all(address.startswith("data:") for address in read.addresses)
    assert "http" not in text
    for expected in (
        "A <model>", "It keeps 90% of the classes. And more.", "memory", "blocks.10", "20.00%", "1 of 10.",
        "cat & dog.png", "62%", "kept & left", "<head>", "no error", "50.0%", "fairseq-vit report a b", "100.0%",
    ):  # fmt: skip
        assert expected in words, expected


def test_parts_that_are_not_there_leave_no_title():
    text = Page(title="Little", summary=["That is all."]).html()
    assert re.findall(r"<h[12][^>]*>([^<]*)", text) == ["Little"]
    assert "<script>" not in text


def test_columns_that_hold_nothing_are_left_out():
    text = PAGE.html()
    assert re.findall(r'<button type="button" title="[^"]*">([^<]*)', text) == [
        "layer", "part", "shape", "bits", "scales", "weight SQNR", "block alone", "size", "note",
    ]  # fmt: skip


def test_a_report_writes_one(tiny_vit, tmp_path):
    quantizer = ViTQuantizer(bits=4, method="channel", exclude=["*classifier"])
    quantizer.quantize_model(tiny_vit)
    quantizer.report.html(tmp_path / "page.html")
    words = " ".join(Reader((tmp_path / "page.html").read_text(encoding="utf-8")).words)
    for layer in quantizer.report.layers:
        assert layer.name in words
    assert "in float, excluded" not in words
    assert quantizer.report.skipped[0].skipped in words
    assert quantizer.report.size() in words
    with pytest.raises(FileNotFoundError):
        quantizer.report.html(tmp_path / "missing" / "page.html")


@pytest.mark.parametrize(
    ("size", "speed", "expected"),
    [
        (0.135, 2.12, ["It keeps 9 of 10, takes 13.5% of the memory and is 2.1x faster here."]),
        (0.2, 0.97, ["It keeps 9 of 10, takes 20.0% of the memory and is not faster here (0.97x)."]),
        (0.2, None, ["It keeps 9 of 10 and takes 20.0% of the memory."]),
        (
            0.99,
            0.97,
            [
                "It keeps 9 of 10, takes 99.0% of the memory and is not faster here (0.97x).",
                "It will not help here: it is neither smaller nor faster.",
            ],
        ),
    ],
)
def test_the_summary_is_honest(size, speed, expected):
    assert summary("9 of 10", size, speed, "here", {}) == expected


def test_the_summary_names_the_worst():
    alone = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.25}
    assert summary(None, 0.5, None, "", alone)[1] == "By themselves, b, d and c change the output most."
    assert len(summary(None, 0.5, None, "", {"a": 0.1})) == 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<script>
window.addEventListener('load', function () {
  var found = {}, table = document.getElementById('table'), buttons = {};
  table.querySelectorAll('th button').forEach(function (b) { buttons[b.textContent] = b; });
  function first(row) { return row.cells[0].textContent; }
  function names() { return Array.from(table.tBodies[0].rows).map(first); }
  function sorted(title) { buttons[title].click(); return names(); }
  found.size = sorted('size'); found.down = sorted('size');
  found.sqnr = sorted('weight SQNR'); found.layer = sorted('layer'); found.shape = sorted('shape');
  found.sort = Array.from(table.querySelectorAll('th')).map(function (th) { return th.getAttribute('aria-sort'); });
  buttons['bits'].focus(); found.focus = document.activeElement.textContent;
  found.dark = matchMedia('(prefers-color-scheme: dark)').matches;
  found.text = getComputedStyle(document.body).color; found.ground = getComputedStyle(document.body).backgroundColor;
  found.wide = document.documentElement.scrollWidth <= window.innerWidth;
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def chromium(*arguments):
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (400, True), (1200, False),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in ((400, False), (1200, True))),
    ],
)  # fmt: skip
def test_in_a_browser(tmp_path, dark, width):
    page = tmp_path / "page.html"
    page.write_text(PAGE.html() + PROBE, encoding="utf-8")
    colours = "--blink-settings=preferredColorScheme=0" if dark else "--blink-settings=preferredColorScheme=1"
    result = chromium(colours, f"--window-size={width},900", "--dump-dom", page.as_uri())
    assert "CONSOLE" not in result.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', result.stdout)[1]))
    q, fc, last, head = (layer.name for layer in LAYERS)
    assert found["size"] == [q, last, head, fc]
    assert found["down"] == [fc, head, q, last]
    assert found["sqnr"] == [head, q, fc, last]  # none, 9.5, 20.25, no error
    assert found["layer"] == [head, fc, q, last]  # blocks.10 behind blocks.0
    assert found["shape"] == [head, q, last, fc] or found["shape"] == [head, last, q, fc]
    assert found["sort"].count("ascending") == 1
    assert found["sort"].count("none") == len(found["sort"]) - 1
    assert found["focus"] == "bits"
    assert found["dark"] == dark
    light = [sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("text", "ground")]
    assert (light[0] > light[1]) == dark
    assert found["wide"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_prints(tmp_path):
    (tmp_path / "page.html").write_text(PAGE.html(), encoding="utf-8")
    chromium(f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(content) > 5000
