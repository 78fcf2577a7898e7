"""The picture of a report: what is drawn, and that nothing else changes."""

import importlib
import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from PIL import Image

from fairseq.quantization.evaluation import report_plot
from fairseq.quantization.evaluation.report import LayerReport, QuantizationReport


def make_report(blocks=12, measured=True):
    """Six layers a block and a classifier in float; the bits go around 2 to 8, one SQNR is infinite."""
    names = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    layers = []
    for i in range(6 * blocks):
        block = f"vit.layers.{i // 6}"
        layer = LayerReport(f"{block}.{names[i % 6]}", "mlp", (8, 8), 256, 10 + i, 2 + i % 7, "channel", block=block)
        if measured:
            layer = replace(layer, weight_sqnr=math.inf if i == 3 else 10.0 + i % 5, output_sqnr=20.0 + i % 3)
        layers.append(layer)
    layers.append(LayerReport("classifier", "classifier", (8, 8), 256, 256, skipped="quantize_classifier=False"))
    return QuantizationReport(tuple(layers), 20_000, sum(layer.bytes_after for layer in layers) + 500)


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn last."""
    module = pytest.importorskip("matplotlib.figure")
    made = []

    class Recorded(module.Figure):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr(module, "Figure", Recorded)
    return lambda: made[-1]


def colors(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("measured", [True, False])
def test_png_shows_each_width_in_its_colour(tmp_path, measured):
    pytest.importorskip("matplotlib")
    make_report(2, measured).plot(tmp_path / "report.png")
    assert {rgb(color) for color in report_plot.COLORS.values()} <= colors(tmp_path / "report.png")
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]


def test_colour_of_a_width_that_is_not_there_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report = make_report(2)
    report = replace(report, layers=tuple(replace(layer, bits=4) for layer in report.layers if layer.bits))
    report.plot(tmp_path / "report.png")
    absent = {rgb(color) for bits, color in report_plot.COLORS.items() if bits not in (4, None)}  # text has greys
    assert not absent & colors(tmp_path / "report.png")


@pytest.mark.parametrize("blocks", [1, 12])
def test_rows_keep_their_order_and_names_do_not_overlap(tmp_path, figure, blocks):
    report = make_report(blocks)
    report.plot(tmp_path / "report.png")
    sqnr, share = figure().axes
    labels = sqnr.get_yticklabels()
    assert [label.get_text() for label in labels] == [layer.name for layer in report.layers]
    boxes = [label.get_window_extent() for label in labels]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))  # top to bottom, apart
    assert min(box.x0 for box in boxes) >= 0
    bars = [bar.get_width() / 100 for bar in share.patches if bar.get_height() == 0.7]
    assert bars == pytest.approx([report.share(layer) for layer in report.layers])
    (legend,) = figure().legends
    assert legend.get_title().get_text() == report.size()
    assert legend.get_window_extent().y0 >= sqnr.get_tightbbox().y1
    assert legend.get_window_extent().x0 >= 0


def test_markers_stand_at_the_ratios(tmp_path, figure):
    report = make_report(1)
    report.plot(tmp_path / "report.png")
    sqnr = figure().axes[0]
    drawn = {(line.get_marker(), float(line.get_xdata()[0]), int(line.get_ydata()[0]))
             for line in sqnr.lines if line.get_marker() != "None"}  # fmt: skip
    expected = {("o", layer.weight_sqnr, i) for i, layer in enumerate(report.quantized) if i != 3}
    expected |= {("D", layer.output_sqnr, i) for i, layer in enumerate(report.quantized)}
    assert drawn == expected | {(">", 1.0, 3)}  # infinite: at the right edge
    texts = [text.get_text() for text in figure().legends[0].get_texts()]
    assert texts[-4:] == ["float", "weight", "output", "no error"]


def bands(axes):
    """The rows behind which every other block's band lies."""
    areas = [patch for patch in axes.patches if patch.get_height() == 1]
    return {round(area.get_y() + 0.5) for area in areas}


def test_bands_follow_the_blocks_and_not_the_names(tmp_path, figure):
    report = make_report(3)
    report.plot(tmp_path / "report.png")
    assert bands(figure().axes[0]) == {*range(6), *range(12, 18)}  # the first and the third block; then the classifier
    blocks = ["one", "one", "two", "two", "two", None]
    layers = tuple(replace(report.layers[0], name=f"layer.0.{i}", block=block) for i, block in enumerate(blocks))
    replace(report, layers=layers).plot(tmp_path / "report.png")
    assert bands(figure().axes[0]) == {0, 1, 5}


def test_without_measures_only_the_sizes_are_drawn(tmp_path, figure):
    make_report(1, measured=False).plot(tmp_path / "report.png")
    assert len(figure().axes) == 1
    assert [text.get_text() for text in figure().legends[0].get_texts()][-1] == "float"


def test_suffix_is_the_format(tmp_path):
    pytest.importorskip("matplotlib")
    make_report(1).plot(tmp_path / "report.svg")
    assert "<svg" in (tmp_path / "report.svg").read_text(encoding="utf-8")
    make_report(1).plot(tmp_path / "report")
    assert (tmp_path / "report").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="xyz"):
        make_report(1).plot(tmp_path / "report.xyz")
    assert not (tmp_path / "report.xyz").exists()


def test_pyplot_and_the_settings_stay_untouched(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    make_report(1).plot(tmp_path / "report.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_without_matplotlib(tmp_path, monkeypatch):
    load = importlib.import_module

    def missing(name, *args):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[plot\]"'):
        make_report(1).plot(tmp_path / "report.png")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no layers"):
        QuantizationReport((), 10, 10).plot(tmp_path / "report.png")
