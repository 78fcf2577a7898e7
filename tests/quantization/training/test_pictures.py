"""Pictures of every kind as a dataset, and what is none."""

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from fairseq.quantization.training.pictures import Pictures, augmented, hold_back

PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{'abc'[i]}" / "deep").mkdir(parents=True)
        Image.new("RGB", (20, 24), (80 * i, 10, 200)).save(tmp_path / "abc"[i] / "deep" / "1.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_each_kind_is_the_same_pictures(folder):
    files = [folder / name / "deep" / "1.png" for name in "abc"]
    opened = [Image.open(file) for file in files]
    expected = torch.cat([PROCESSOR(images=[image], return_tensors="pt")["pixel_values"] for image in opened])
    kinds = [
        folder, str(folder), files, opened, expected, list(expected), [(x, 7) for x in expected],
        [{"pixel_values": x, "labels": 1} for x in expected], torch.utils.data.TensorDataset(expected),
    ]  # fmt: skip
    for kind in kinds:
        pictures = Pictures(kind, PROCESSOR)
        assert len(pictures) == 3
        for i in range(3):
            assert pictures[i].keys() == {"pixel_values"}
            assert torch.equal(pictures[i]["pixel_values"], expected[i])


def test_a_crop_is_one_of_the_picture_with_its_border_reflected():
    picture = torch.arange(3 * 16 * 24, dtype=torch.float32).view(3, 16, 24)
    padded = torch.nn.functional.pad(picture[None], (3, 3, 2, 2), mode="reflect")[0]
    possible = {
        (y, x, flip): (crop.flip(-1) if flip else crop)
        for y in range(5) for x in range(7) for flip in (False, True)
        for crop in [padded[:, y : y + 16, x : x + 24]]
    }  # fmt: skip
    torch.manual_seed(0)
    found = set()
    for _ in range(400):
        got = augmented(picture)
        found |= {place for place, crop in possible.items() if torch.equal(crop, got)}
    assert len(found) > 65  # of 70
    assert {y for y, _, _ in found} == set(range(5))
    assert {x for _, x, _ in found} == set(range(7))
    changing = Pictures(picture[None], augment=True)
    assert not all(torch.equal(changing[0]["pixel_values"], picture) for _ in range(5))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 4, 4), ValueError, r"no picture to train on in a float32 tensor of shape \(0, 3, 4, 4\)"),
        (torch.zeros(3, 4, 4), ValueError, r"of floats, \(N, C, H, W\); got a float32 tensor of shape \(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ValueError, "of floats"),
        ("/no/such/folder", ValueError, "/no/such/folder is no folder of pictures; accepted is a float tensor"),
        (3, TypeError, "pictures to train on must be a float tensor .* got a int"),
        ([3], TypeError, "picture 0 is a int; accepted is"),
        ([Image.new("RGB", (4, 4))], ValueError, "picture 0 is a Image, which needs the model's image processor"),
        ([torch.full((3, 4, 4), torch.nan)], ValueError, "picture 0 has NaN or infinite pixel values"),
    ],
    ids=range(8),
)
def test_what_is_no_picture(images, error, message):
    with pytest.raises(error, match=message):
        Pictures(images)


def test_a_damaged_file_is_named(folder):
    (folder / "a" / "deep" / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture 0 \('.*a/deep/1\.png'\) cannot be read as a picture"):
        Pictures(folder, PROCESSOR)


def test_those_held_back_are_drawn_by_the_seed():
    (rest, held), (_, others) = hold_back(40, 8, 0), hold_back(40, 8, 1)
    assert sorted([*rest, *held]) == list(range(40))
    assert rest == sorted(rest)
    assert len(held) == 8
    assert {*held} != {*others}
    assert hold_back(40, 8, 0) == (rest, held)
