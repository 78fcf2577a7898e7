"""pixel_values: every kind of images gives the same tensor, which are drawn, and what is refused."""

import random
import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler
from transformers import BatchFeature, ViTImageProcessor

from fairseq.quantization.calibration.images import pictures as pictures_of
from fairseq.quantization.calibration.images import pixel_values
from fairseq.quantization.calibration.pictures import random_view

N = 40


class Processor:
    """(pixel - 128) / 64 of RGB pictures of any size; counts what it decodes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        assert all(image.mode == "RGB" for image in images)
        self.calls += len(images)
        return {"pixel_values": torch.stack([to_pixels(image) for image in images])}


def to_pixels(image):
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return (values.view(image.height, image.width, 3).permute(2, 0, 1).float() - 128) / 64


def noise(seed, size=(16, 16)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


@pytest.fixture(scope="module")
def pictures():
    return [noise(i) for i in range(N)]


@pytest.fixture(scope="module")
def expected(pictures):
    """(40, 3, 16, 16), the pictures of every kind of images below."""
    return torch.stack([to_pixels(picture) for picture in pictures])


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """The pictures, in an order of names that is not the order of writing, with other files among them."""
    root = tmp_path_factory.mktemp("pictures")
    suffixes = (".png", ".PNG", ".Bmp", ".tiff")
    for i in reversed(range(N)):
        path = root / "ab"[i >= 25] / f"{i:03}{suffixes[i % 4]}"
        path.parent.mkdir(exist_ok=True)
        pictures[i].save(path, format={".bmp": "BMP", ".tiff": "TIFF"}.get(path.suffix.lower(), "PNG"))
    (root / "a" / "labels.txt").write_text("no picture")
    (root / "a" / "._000.png").write_bytes(b"another system's notes")
    (root / "folder.png").mkdir()
    return root


class Pairs(Dataset):
    """(pictures[i], i), and a record of which were asked for."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.items[i], i


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def as_dict(items):
    return {"labels": torch.tensor([i for _, i in items]), "pixel_values": torch.stack([x for x, _ in items])}


KINDS = {
    "tensor": lambda x: x,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "list": lambda x: list(x),
    "tuple": lambda x: tuple(x),
    "list of batches of one": lambda x: list(x.split(1)),
    "list of batches": lambda x: list(x.split(16)),
    "list of labelled batches": lambda x: [(batch, torch.zeros(len(batch))) for batch in x.split(20)],
    "a batch and its labels": lambda x: [x, torch.arange(N)],
    "a batch and soft labels": lambda x: (x, torch.rand(N, 7)),
    "processor's output": lambda x: BatchFeature({"pixel_values": x}),
    "dict of a list": lambda x: {"pixel_values": list(x)},
    "dataset": Pairs,
    "loader": lambda x: DataLoader(Pairs(x), batch_size=16),
    "loader of dicts": lambda x: DataLoader(Pairs(x), batch_size=16, collate_fn=as_dict),
    "loader of a stream": lambda x: DataLoader(Stream(x), batch_size=16),
    "loader of batches": lambda x: DataLoader(Pairs(x.split(8)), batch_size=None),
    "generator of pictures": lambda x: (row for row in x),
    "generator of batches": lambda x: (batch for batch in x.split(7)),
    "generator of labelled pictures": lambda x: ((row, i) for i, row in enumerate(x)),
    "generator of labelled batches": lambda x: (
        (batch, torch.zeros(len(batch), 16, 16).long()) for batch in x.split(7)
    ),
    "generator of lists without labels": lambda x: ([batch] for batch in x.split(7)),
    "generator of dicts": lambda x: ({"pixel_values": batch, "labels": 0} for batch in x.split(7)),
}
INDEXED = [
    kind for kind in KINDS if "generator" not in kind and kind not in ("loader of a stream", "loader of batches")
]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind(kind, tiny_vit, expected):
    got = pixel_values(KINDS[kind](expected), tiny_vit)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", INDEXED)
def test_tensors_of_every_kind_are_drawn_alike(kind, tiny_vit, expected):
    torch.manual_seed(3)  # not what the drawing depends on
    assert torch.equal(
        pixel_values(KINDS[kind](expected), tiny_vit, limit=33, seed=5),
        pixel_values(expected, tiny_vit, limit=33, seed=5),
    )


@pytest.mark.parametrize("limit", [33, 128])
def test_pictures_of_every_kind(limit, tiny_vit, pictures, folder, expected):
    files = [folder / "ab"[i >= 25] / f"{i:03}{('.png', '.PNG', '.Bmp', '.tiff')[i % 4]}" for i in range(N)]
    expected = pixel_values(expected, tiny_vit, limit=limit)
    kinds = [pictures, tuple(pictures), folder, str(folder), files, [str(path) for path in files], Pairs(pictures)]
    kinds.append(list(zip(files, range(N))))
    for images in kinds:
        processor = Processor()
        assert torch.equal(pixel_values(images, tiny_vit, processor, limit=limit), expected)
        assert processor.calls == len(expected)  # only what was drawn is decoded


def test_drawing(tiny_vit, expected):
    def indices(**settings):
        rows = pixel_values(expected, tiny_vit, limit=32, **settings)
        return [next(i for i in range(N) if torch.equal(expected[i], row)) for row in rows]

    drawn = indices(seed=0)
    assert drawn == indices() == sorted(set(drawn))  # none twice, in order
    assert len(drawn) == 32
    assert drawn != list(range(32))
    assert drawn != indices(seed=1)


def test_only_what_is_drawn_is_loaded(tiny_vit, expected):
    for wrap in (lambda x: x, lambda x: DataLoader(x, batch_size=16)):
        dataset = Pairs(expected)
        pixel_values(wrap(dataset), tiny_vit, limit=35)
        assert len(dataset.asked) == 35


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_shuffled_loader_gives_the_same_pictures_twice(generator, tiny_vit, expected):
    loader = DataLoader(Pairs(expected), batch_size=4, shuffle=True, generator=generator)
    states = [g.get_state() for g in (torch.default_generator, *([generator] if generator else []))]
    first = pixel_values(loader, tiny_vit, limit=33)
    for g, state in zip((torch.default_generator, generator), states):
        assert torch.equal(g.get_state(), state)
    torch.rand(1)
    assert torch.equal(pixel_values(loader, tiny_vit, limit=33), first)
    assert not torch.equal(pixel_values(loader, tiny_vit, limit=33, seed=1), first)


def test_augmentation_is_seeded(tiny_vit, expected):
    class Noisy(Pairs):
        def __getitem__(self, i):
            return self.items[i] + torch.randn(3, 16, 16)

    torch.rand(1)
    first = pixel_values(Noisy(expected), tiny_vit)
    torch.rand(1)
    assert torch.equal(pixel_values(Noisy(expected), tiny_vit), first)
    assert not torch.equal(first, expected)


def test_a_loader_is_drawn_from_by_its_sampler(tiny_vit, expected):
    loader = DataLoader(Pairs(expected), batch_size=8, sampler=SubsetRandomSampler(range(35)))
    got = pixel_values(loader, tiny_vit)
    assert len(got) == 35
    assert torch.equal(got.flatten().sort().values, expected[:35].flatten().sort().values)


@pytest.mark.parametrize(("limit", "taken"), [(32, 4), (33, 5), (40, 5)])
def test_an_iterable_is_read_no_further_than_needed(limit, taken, tiny_vit, expected):
    count = 0

    def batches():
        nonlocal count
        while True:  # without end
            count += 1
            yield expected.split(8)[(count - 1) % 5]

    assert torch.equal(pixel_values(batches(), tiny_vit, limit=limit), expected[:limit])
    assert count == taken


def test_the_result_is_a_copy(tiny_vit, expected):
    for images in (expected.clone(), list(expected.clone()), [expected.clone()]):
        pixel_values(images, tiny_vit).zero_()
        assert torch.equal(
            images if isinstance(images, torch.Tensor) else torch.stack(images).view(N, 3, 16, 16), expected
        )


def test_modes_and_orientation(tiny_vit, tmp_path):
    upright = noise(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    noise(2).convert("L").save(tmp_path / "grey.png")
    noise(3).convert("RGBA").save(tmp_path / "rgba.png")
    with pytest.warns(UserWarning, match="3 pictures"):
        got = pixel_values([tmp_path / f"{name}.png" for name in ("turned", "grey", "rgba")], tiny_vit, Processor())
    assert torch.equal(got[0], to_pixels(upright))
    assert torch.equal(got[1], to_pixels(noise(2).convert("L").convert("RGB")))
    assert torch.equal(got[2], to_pixels(noise(3)))
    with Image.open(tmp_path / "turned.png") as opened, pytest.warns(UserWarning, match="2 pictures"):
        assert torch.equal(pixel_values([opened, noise(4)], tiny_vit, Processor())[0], to_pixels(upright))


def test_the_processor_of_the_models_folder(tiny_vit, pictures, tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path)
    tiny_vit.save_pretrained(tmp_path)
    model = type(tiny_vit).from_pretrained(tmp_path)
    wide = [noise(i, (20, 18)) for i in range(N)]
    expected = processor(images=wide, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values(wide, model), expected)
    assert torch.equal(pixel_values(pictures, model, Processor())[0], to_pixels(pictures[0]))  # the given one first


def test_without_a_processor(tiny_vit, pictures, folder, tmp_path):
    for name, reason in (
        ("", "no local folder"),
        ("some/hub-name", "some/hub-name"),
        (str(tmp_path), "there is none in"),
    ):
        tiny_vit.config._name_or_path = name
        for images in (pictures, folder):
            with pytest.raises(ValueError, match=rf"(?s){reason}.*pass processor="):
                pixel_values(images, tiny_vit)
    with pytest.raises(ValueError, match="pass processor="):
        pixel_values(pictures, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"processor must be a callable.* got 'some/hub-name'"):
        pixel_values(pictures, tiny_vit, "some/hub-name")


def test_few_pictures(tiny_vit, expected):
    for count in (1, 2, 31):
        with pytest.warns(UserWarning, match=rf"calibrating on {count} picture.*; 128 are recommended") as caught:
            assert torch.equal(pixel_values(expected[:count], tiny_vit), expected[:count])
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pixel_values(expected[:32], tiny_vit)) == 32


def test_duplicates_are_fine(tiny_vit, expected):
    images = torch.cat([expected[:1].expand(39, -1, -1, -1), torch.zeros(1, 3, 16, 16)])
    assert torch.equal(pixel_values(images, tiny_vit), images)


X = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BYTES = (X * 64 + 128).clamp(0, 255).to(torch.uint8)


def spoilt(value, i=37):
    images = X.clone()
    images[i, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "images must be a float tensor .*; got None"),
        (3, TypeError, "got 3"),
        (noise(0), TypeError, "a list .*of PIL images.*; got Image"),
        ([None], TypeError, r"images\[0\] is None"),
        ([X[0], 3], TypeError, r"images\[1\] is 3"),
        ([(3, 4)], TypeError, r"images\[0\] is 3"),
        (X.numpy(), TypeError, r"images\[0\] is ndarray"),
        ({"pixel_values": X.numpy()}, TypeError, 'return_tensors="pt", got ndarray'),
        (BYTES, TypeError, r"images must be .* got a uint8 tensor of shape \(40, 3, 16, 16\): normalise .*processor"),
        ([*X, BYTES[0]], TypeError, r"images\[40\] must be .* uint8 .*normalise"),
        ({"pixel_values": BYTES}, TypeError, "normalise"),
        (iter([(BYTES, 0)]), TypeError, r"images\[0\] must be .* uint8"),
        ("tabby, tabby cat", ValueError, "the folder of pictures 'tabby, tabby cat' does not exist; accepted"),
        (["tabby", "tench"], ValueError, r"images\[0\] \(tabby\) is no file: calibration needs pictures, not names"),
        (["x" * 5000], ValueError, "not names"),
        ([("tabby", "tench")], ValueError, "more than one of them a picture"),
        ({0: "tabby", 1: "tench"}, ValueError, "calibration needs pictures, not names.*0: 'tabby'"),
        ({"image": X, "label": 0}, ValueError, r'the key "pixel_values".*\[\'image\', \'label\'\]'),
        ([{"image": X}], ValueError, r'images\[0\] must have the key "pixel_values"'),
        ([], ValueError, "no picture: got list"),
        ({}, ValueError, "pixel_values"),
        (X[:0], ValueError, r"no picture: got a float32 tensor of shape \(0, 3, 16, 16\)"),
        (iter(()), ValueError, "no picture: .* used up"),
        (DataLoader(Pairs(X[:0])), ValueError, "no picture: got DataLoader"),
        (X[0], ValueError, r"4-D, \(N, C, H, W\), got a float32 tensor of shape \(3, 16, 16\)"),
        (X[None], ValueError, "4-D"),
        ([X[0], X[1, 0]], ValueError, r"images\[1\] must be \(C, H, W\).* \(16, 16\)"),
        (iter([X[None]]), ValueError, r"images\[0\] must be \(C, H, W\), or a batch"),
        (iter([list(X)]), ValueError, r"images\[0\] holds 40 items, more than one of them a picture"),
        (iter([(noise(0), noise(1))]), ValueError, "holds 2 items, more than one of them a picture"),
        (X[:, :1], ValueError, r"images\[0\] must be \(3, 16, 16\).*the model's config says; got \(1, 16, 16\)"),
        (X[..., :8], ValueError, r"got \(3, 16, 8\)"),
        (X[..., :8, :], ValueError, r"got \(3, 8, 16\)"),
        (X.permute(0, 2, 3, 1), ValueError, r"got \(16, 16, 3\)"),
        ([*X, X[0, :, :8]], ValueError, r"images\[40\] must be .*got \(3, 8, 16\)"),
        (spoilt(float("nan")), ValueError, r"images\[37\] has NaN or infinite"),
        (spoilt(-float("inf")), ValueError, r"images\[37\] has NaN or infinite"),
        (spoilt(0).double() + torch.tensor(1e300, dtype=torch.float64), ValueError, r"images\[0\] has NaN or infinite"),
        (list(spoilt(float("nan")).split(8)), ValueError, r"images\[4\]\[5\] has NaN"),
        (DataLoader(Pairs(spoilt(float("nan"))), batch_size=8), ValueError, r"dataset\[37\] has NaN"),
        (X[:1].expand(40, -1, -1, -1), ValueError, "all 40 pictures are equal"),
        (X[:, :, :1, :1].expand(-1, -1, 16, 16), ValueError, "every picture is of one colour"),
        (torch.ones(1, 3, 16, 16), ValueError, "every picture is of one colour"),
    ],
)  # fmt: skip
def test_what_is_refused(images, error, message, tiny_vit):
    with pytest.raises(error, match=message):
        pixel_values(images, tiny_vit, Processor())


def test_names_are_found_out_before_the_processor_is_missed(tiny_vit):
    with pytest.raises(ValueError, match="not names"):
        pixel_values(list({0: "tabby", 1: "tench"}.values()), tiny_vit)


def test_files_that_are_refused(tiny_vit, pictures, tmp_path):
    def check(images, message):
        with pytest.raises(ValueError, match=message):
            pixel_values(images, tiny_vit, Processor())

    check(tmp_path, "there is no picture: got")
    pictures[0].save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "torn.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    check(tmp_path, r"torn\.jpg cannot be read as a picture")
    check([tmp_path / "a.png", tmp_path / "deep" / "torn.jpg"], r"images\[1\] \(.*torn\.jpg\) cannot be read")
    check([tmp_path / "a.png", tmp_path / "gone.png"], r"images\[1\] \(.*gone\.png\) is no file")
    check([tmp_path], r"images\[0\] .* is a folder")
    check(tmp_path / "a.png", r"a\.png' is a file \(pass a list of paths\)")
    Image.new("I;16", (16, 16)).save(tmp_path / "sixteen.png")
    check([tmp_path / "sixteen.png"], r"sixteen\.png\) cannot be read .* mode is I;16")
    check([pictures[0], Image.new("F", (16, 16))], r"images\[1\] cannot be read .* mode is F")
    check([pictures[0], noise(1, (16, 12))], r"images\[1\] must be \(3, 16, 16\).*got \(3, 12, 16\)")


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ([X[0]], ValueError, r"for one picture, got list"),
        (X[:2], ValueError, r"for one picture, got a float32 tensor of shape \(2, 3, 16, 16\)"),
        (X[0], ValueError, r"for one picture"),
        (BYTES[:1], TypeError, r"what the processor makes of images\[0\] must be .* uint8"),
    ],
)
def test_what_a_processor_may_not_return(output, error, message, tiny_vit, pictures):
    with pytest.raises(error, match=message):
        pixel_values(pictures, tiny_vit, lambda images, return_tensors: {"pixel_values": output})


def test_what_the_config_says(tiny_vit):
    tiny_vit.config.image_size = (16, 24)
    wide = torch.cat([X, X[..., :8]], dim=-1)
    assert torch.equal(pixel_values(wide, tiny_vit), wide)
    with pytest.raises(ValueError, match=r"must be \(3, 16, 24\)"):
        pixel_values(X, tiny_vit)
    bare = torch.nn.Linear(1, 1)
    assert torch.equal(pixel_values(X[:, :1], bare), X[:, :1])
    with pytest.raises(ValueError, match=r"images\[1\] must be .* as the first picture is; got \(3, 8, 16\)"):
        pixel_values([X[0], X[1, :, :8]], bare)


def test_all_of_them(tiny_vit, expected, folder):
    many = torch.cat([expected] * 4) + torch.arange(160)[:, None, None, None]
    assert len(pixel_values(many, tiny_vit)) == 128
    assert torch.equal(pixel_values(many, tiny_vit, limit="all"), many)
    assert torch.equal(pixel_values(folder, tiny_vit, Processor(), limit="all"), expected)


def test_views(tiny_vit, expected):
    found = pictures_of(expected, tiny_vit, limit=33, seed=2, augment=3)
    plain = pixel_values(expected, tiny_vit, limit=33, seed=2)
    assert found.shape == (99, 3, 16, 16)
    views = found[:].unflatten(0, (33, 3))
    assert torch.equal(views[:, 0], plain)
    assert torch.equal(found[20:30], found[:][20:30])  # a view is the same whenever it is asked for
    assert torch.equal(found[:], pictures_of(expected, tiny_vit, limit=33, seed=2, augment=3)[:])
    assert not torch.equal(found[:], pictures_of(expected, tiny_vit, limit=33, seed=3, augment=3)[:])
    for view in (views[:, 1], views[:, 2]):
        assert all(not torch.equal(one, whole) for one, whole in zip(view, plain))
        assert view.amax() <= plain.amax() + 1e-5
        assert view.amin() >= plain.amin() - 1e-5
    with pytest.raises(ValueError, match="augment must be an int of at least 1, the views of each picture; got 0"):
        pictures_of(expected, tiny_vit, augment=0)


def test_a_random_view_is_a_part_of_the_picture():
    """Of a ramp, which any part of is a ramp again: rising from left to right, or flipped; less steep."""
    ramp = torch.arange(16.0).expand(3, 16, 16)
    slopes = [random_view(ramp, seed).diff(dim=-1)[..., 4:-4].mean().item() for seed in range(40)]
    assert 10 <= sum(slope > 0 for slope in slopes) <= 30
    assert all(0.4 < abs(slope) < 1.01 for slope in slopes)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "4", None])
def test_limit(limit, tiny_vit):
    with pytest.raises((TypeError, ValueError), match=r"limit must be .*at least 1, got"):
        pixel_values(X, tiny_vit, limit=limit)


def test_a_limit_of_one(tiny_vit):
    with pytest.warns(UserWarning, match="calibrating on 1 picture;"):
        assert len(pixel_values(X, tiny_vit, limit=1)) == 1
