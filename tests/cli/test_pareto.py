"""fairseq-vit pareto: a table, a file and a picture of the sizes that a model can have."""

import pytest

from fairseq.models.vit_quantization import Pareto


def test_a_table_a_file_and_a_picture(cli, models, pictures, tmp_path):
    save, plot = tmp_path / "sizes.json", tmp_path / "sizes.png"
    options = ["--calibration", pictures, "--images", "all", "--average-bits", "4.5"]
    options += ["--exclude", "*classifier", "--exclude", "*attention*"]
    result = cli("pareto", models / "short", *options, "--save", save, "--plot", plot)
    assert result.code == 0, result.err
    found = Pareto.load(save)
    assert [round(point.bits, 6) for point in found.points if not point.mixed] == [2, 3, 4, 5, 6, 8]
    assert [point.bits <= 4.5 and point.mixed for point in found.points[6:]] == [True]
    assert result.out.strip() == str(found)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--average-bits", "3;4"], "must be numbers with commas"),
        (["--average-bits", "9"], "average_bits must be from 2 to 8, got 9"),
        (["--images", "0"], "must be a whole number of at least 1, or all"),
        (["--images", "4"], "at least 8 pictures"),
        (["--save", "no/such/file.json"], "the folder no/such does not exist"),
        (["--plot", "sizes.xyz"], "xyz"),
    ],
)
def test_mistakes(cli, models, pictures, options, said):
    result = cli("pareto", models / "vit", "--calibration", pictures, *options)
    assert (result.code, said in result.err) == (2, True), result.err
