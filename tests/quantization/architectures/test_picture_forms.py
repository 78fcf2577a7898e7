"""Pictures in the forms that models take them in: what transformers' processors make of the same ones, and back."""

import other_heads
import pytest
import torch
import transformers

from fairseq.models.vit_quantization import ViTQuantizer, compare_embeddings
from fairseq.quantization.architectures.picture_forms import Form, in_a_row, in_batches, pictures_of
from fairseq.quantization.calibration.images import pixel_values

MEAN = [0.5, 0.5, 0.5]
QWEN = Form(channels=3, merge=2, frames=2)


def qwen_processor():
    return transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, do_rescale=False, image_mean=MEAN,
        image_std=MEAN,
    )  # fmt: skip


def test_patches_in_a_row_are_those_of_the_processor():
    pictures = torch.rand(2, 3, 24, 16)
    made = qwen_processor()(list(pictures), return_tensors="pt")
    found = in_a_row((pictures - 0.5) / 0.5, 4, QWEN)
    assert found["pixel_values"].shape == made["pixel_values"].shape
    assert torch.allclose(found["pixel_values"], made["pixel_values"], atol=1e-6)
    assert torch.equal(found["image_grid_thw"], made["image_grid_thw"])


def test_and_back():
    pictures = torch.randn(3, 3, 16, 24)
    back = pictures_of(in_a_row(pictures, 4, QWEN), QWEN)
    assert torch.equal(torch.stack(back), pictures)


def test_sides_are_shortened_to_squares_of_patches():
    pictures = torch.randn(1, 3, 19, 26)
    assert torch.equal(pictures_of(in_a_row(pictures, 4, QWEN), QWEN)[0], pictures[0, :, :16, :24])


def test_several_pictures_for_each_prompt_without_the_empty_ones():
    pictures = torch.randn(2, 2, 3, 8, 8)
    pictures[1, 1] = 0
    found = pictures_of({"pixel_values": pictures}, Form())
    assert [any(torch.equal(x, y) for y in pictures.flatten(0, 1)[:3]) for x in found] == [True] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_hold_whole_pictures(size):
    pictures = [torch.randn(1, 3, side, 16) for side in (8, 16, 24, 8, 32)]
    rows = [in_a_row(picture, 4, QWEN) for picture in pictures]
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    parts = list(in_batches(whole, size))
    assert [len(part["image_grid_thw"]) for part in parts] == [len(pictures[i : i + size]) for i in range(0, 5, size)]
    back = [picture for part in parts for picture in pictures_of(part, QWEN)]
    assert all(torch.equal(a, b[0]) for a, b in zip(back, pictures, strict=True))


def test_embeddings_and_widths_of_such_a_model():
    model = other_heads.build("qwen2-vl")
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(model)
    pictures = other_heads.pictures("qwen2-vl", 8)
    found = [compare_embeddings(model, quantized, pictures, 3, batch_size) for batch_size in (3, 8)]
    assert found[0].output == "image_embeds"
    assert found[0].cosine == pytest.approx(found[1].cosine, abs=1e-4)
    assert 0.8 < found[0].cosine < 0.9999
    with pytest.warns(UserWarning, match="calibrating on 2 pictures"):
        assignment = ViTQuantizer(method="channel").assign_bits(model, pictures[:2], average_bits=5)
    assert assignment.average_bits <= 5
    assert {name.split(".")[1] for name in assignment.bits} == {"visual"}


def test_patches_that_do_not_go_with_their_grid():
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match=r"pixel_values of shape \(12, 96\) are no patches of 3 channels"):
        pictures_of({"pixel_values": torch.randn(12, 96), "image_grid_thw": grid}, QWEN)
    with pytest.raises(ValueError, match="are no patches"):
        pictures_of({"pixel_values": torch.randn(16, 95), "image_grid_thw": grid}, QWEN)


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")
@pytest.mark.parametrize("name", ["qwen2-vl", "smolvlm"])
def test_calibration_takes_what_a_processor_returns(name, tmp_path):
    model = other_heads.build(name)
    pictures = other_heads.pictures(name, 4)
    if name == "qwen2-vl":
        given = in_a_row(pictures, 4, QWEN)
    else:
        given = {"pixel_values": pictures.view(2, 2, *pictures.shape[1:])}
    assert torch.equal(pixel_values(given, model), pictures)
    first, second = (
        ViTQuantizer(bits=4, method="channel").quantize_model(model, calibration=x).state_dict()
        for x in (given, pictures)
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")
def test_calibration_reads_files_with_such_a_processor(tmp_path):
    from PIL import Image

    model = other_heads.build("qwen2-vl")
    values = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    for i, picture in enumerate(values):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{i}.png")
    processor = qwen_processor()
    processor.do_rescale = True
    found = pixel_values(tmp_path, model, processor)
    assert torch.allclose(found, (values.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, atol=1e-5)
