"""Decoding, transforms and batch-wise augmentation, against slow and plain references."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from animesion.images.codec import RejectedImageError
from animesion_training.data import (
    Augment,
    ColorJitter,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    seeds,
)
from animesion_training.data.augment import random_boxes, resample_boxes
from animesion_training.data.decode import Transform, decode_into

SIDES = st.integers(1, 900)


def soft(width: int, height: int) -> Image.Image:
    """A smooth image, in which resampling filters hardly differ."""
    coarse = np.random.default_rng(width + height).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **({"quality": 95} if format == "JPEG" else {}), **options)
    return out.getvalue()


def decoded(content: bytes, transform: Transform, u: tuple[float, ...] = ()) -> np.ndarray:
    out = np.zeros((transform.size, transform.size, 3), dtype=np.uint8)
    decode_into(out, content, transform, u)
    return out


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@given(SIDES, SIDES, st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22))
def test_views_lie_inside_the_image(width: int, height: int, u: list[float]) -> None:
    for transform in (RandomResizedCrop(64), ResizeRandomCrop(64), ResizeCenterCrop(64), Resize(64)):
        view = transform.view(width, height, u)
        assert view.width >= 1
        assert view.height >= 1
        assert 0 <= view.left <= width - view.width
        assert 0 <= view.top <= height - view.height
        assert 0 <= view.x <= view.to_width - 64
        assert 0 <= view.y <= view.to_height - 64


def test_random_resized_crops_have_torchvisions_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop as Reference

    torch.manual_seed(0)
    transform, empty = RandomResizedCrop(64), torch.empty(3, 90, 120)
    numbers = seeds.uniforms(np.arange(4000, dtype=np.uint64), transform.numbers, seeds.CROP)
    ours = np.array([transform.view(120, 90, u)[:4] for u in numbers.tolist()], dtype=float)
    theirs = np.array([Reference.get_params(empty, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float)
    theirs = theirs[:, [1, 0, 3, 2]]
    aspects = torch.full((4000,), 120 / 90)
    batched = random_boxes(torch.arange(4000), aspects).numpy() * np.array([120, 90, 120, 90])
    for column in range(4):
        for quantile in (10, 25, 50, 75, 90):
            expected = np.percentile(theirs[:, column], quantile)
            assert np.percentile(ours[:, column], quantile) == pytest.approx(expected, abs=3)
            assert np.percentile(batched[:, column], quantile) == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("sides", [(300, 200), (700, 900), (64, 64), (50, 90)])
@pytest.mark.parametrize("smooth", [False, True])
def test_scaled_decoding_looks_like_pillows_resize(sides: tuple[int, int], smooth: bool) -> None:
    image = soft(*sides)
    ours = decoded(encoded(image), Resize(64, smooth=smooth))
    assert apart(ours, np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))) < 3


@pytest.mark.parametrize("sides", [(300, 200), (900, 1400)])
def test_crops_are_cut_where_the_view_says(sides: tuple[int, int]) -> None:
    image = soft(*sides)
    transform = RandomResizedCrop(64, scale=(0.2, 0.6))
    numbers = seeds.uniforms(np.arange(20, dtype=np.uint64), transform.numbers, seeds.CROP)
    for u in numbers.tolist():
        left, top, width, height = transform.view(*sides, u)[:4]
        cut = image.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        assert apart(decoded(encoded(image), transform, u), np.asarray(cut)) < 4
        png = decoded(encoded(image, "PNG"), transform, u)
        assert apart(png, np.asarray(cut)) < 4


def test_center_crop_is_torchvisions() -> None:
    from torchvision.transforms import v2

    for sides in ((300, 200), (200, 301), (64, 64)):
        image = soft(*sides)
        reference = v2.CenterCrop(64)(v2.Resize(73)(image))
        assert apart(decoded(encoded(image), ResizeCenterCrop(64)), np.asarray(reference)) < 3


def test_daf_re_crop_covers_every_offset() -> None:
    transform = ResizeRandomCrop(32, margin=4)
    places = {transform.view(9, 9, (i / 50, j / 50))[6:] for i in range(50) for j in range(50)}
    assert places == {(x, y) for x in range(5) for y in range(5)}


def test_rotated_grey_transparent_and_cmyk_images() -> None:
    image = soft(120, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif), Resize(64))
    assert apart(turned, decoded(encoded(image), Resize(64))) < 3
    grey = decoded(encoded(image.convert("L")), Resize(64))
    assert (grey[..., 0] == grey[..., 2]).all()
    clear = image.copy()
    alpha = Image.new("L", clear.size, 0)
    alpha.paste(255, (60, 0, 120, 80))
    clear.putalpha(alpha)
    half = decoded(encoded(clear, "PNG"), Resize(64))
    assert (half[:, :28] == 255).all()
    assert apart(half[:, 36:], decoded(encoded(image, "PNG"), Resize(64))[:, 36:]) < 3
    assert apart(decoded(encoded(image.convert("CMYK")), Resize(64)), decoded(encoded(image), Resize(64))) < 6


@pytest.mark.parametrize("content", [b"", b"no image", encoded(soft(90, 90))[:-700], b"\xff\xd8\xff\xe1"])
def test_what_is_no_image_is_rejected(content: bytes) -> None:
    with pytest.raises(RejectedImageError):
        decoded(content, Resize(32))


def test_device_numbers_are_the_hosts() -> None:
    keys = seeds.hashes(3, seeds.AUGMENT, 2, np.arange(1000))
    host = seeds.uniforms(keys, 7, 42)
    device = seeds.tensor_uniforms(torch.from_numpy(keys.view(np.int64)), 7, 42)
    assert (host == device.double().numpy()).all()
    assert host.mean() == pytest.approx(0.5, abs=0.02)
    assert 0 <= host.min() <= host.max() < 1


def batch(count: int = 6, side: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(rng.integers(-(2**62), 2**62, count))


def test_normalisation_and_flips() -> None:
    images, keys = batch(64)
    mean, std = torch.tensor(Augment().mean).view(3, 1, 1), torch.tensor(Augment().std).view(3, 1, 1)
    plain = Augment.plain()(images, keys)
    assert torch.allclose(plain, (images / 255 - mean) / std, atol=1e-5)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert Augment(0.0, channels_last=False)(images, keys).is_contiguous()
    flipped = Augment()(images, keys)
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert 16 < sum(turned) < 48
    # the path of other devices gives the same
    assert torch.allclose(Augment()(images.float(), keys), flipped, atol=1e-5)


def test_a_sample_is_augmented_the_same_in_any_batch() -> None:
    images, keys = batch()
    augment = Augment(jitter=ColorJitter(0.4, 0.4, 0.4, 0.1), erasing=RandomErasing(1.0))
    whole = augment(images, keys)
    parts = torch.cat([augment(images[i : i + 2], keys[i : i + 2]) for i in range(0, 6, 2)])
    assert torch.allclose(whole, parts, atol=1e-4)
    assert not torch.allclose(augment(images, keys + 1), whole, atol=0.1)


def test_jitter_of_nothing_changes_nothing_and_of_something_stays_in_range() -> None:
    images, keys = batch()
    pixels = images.permute(0, 2, 3, 1).float()
    u = seeds.tensor_uniforms(keys, 4, 1)
    assert torch.allclose(ColorJitter()(pixels, u), pixels, atol=0.05)
    strong = ColorJitter(1, 1, 1, 0.5)(pixels, u)
    assert strong.min() >= 0
    assert strong.max() <= 255
    grey = torch.full_like(pixels, 90.0)
    assert torch.allclose(ColorJitter(0, 1, 1, 0.5)(grey, u), grey, atol=0.1)


def test_erasing_blanks_one_box_of_the_asked_size() -> None:
    u = seeds.tensor_uniforms(torch.arange(500), 5, 1)
    boxes = RandomErasing(0.5).boxes(u, 64, 64)
    areas = boxes.sum((1, 2)) / 64**2
    assert 200 < int((areas > 0).sum()) < 300
    assert areas.max() <= 0.35
    for box in boxes[areas > 0]:
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert int(rows * columns) == int(box.sum())


def test_resampling_on_the_device_is_pillows() -> None:
    image = soft(80, 80)
    pixels = torch.from_numpy(np.asarray(image).copy())[None]
    for box in ((0, 0, 80, 80), (10, 20, 60, 50), (5, 5, 20, 30)):
        shares = torch.tensor([[box[0], box[1], box[2] - box[0], box[3] - box[1]]]) / 80
        ours = resample_boxes(pixels, shares, 32)[0].permute(1, 2, 0).numpy()
        theirs = image.resize((32, 32), Image.Resampling.BILINEAR, box=box)
        assert apart(ours, np.asarray(theirs)) < 1.5
        assert math.isclose(float(ours.mean()), float(np.asarray(theirs).mean()), abs_tol=1.0)
