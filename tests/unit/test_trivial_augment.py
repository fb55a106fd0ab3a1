"""TrivialAugmentWide for batches, against torchvision's and Pillow's operations one image at a time."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cv2")

from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from animesion.errors import UsageError
from animesion_training.data import Augment, RandomErasing, TrivialAugmentWide
from animesion_training.data.trivial_augment import LEVELS, OPERATIONS, OperationDraws

REFERENCE = v2.TrivialAugmentWide()
THEIRS = dict(zip(OPERATIONS, REFERENCE._AUGMENTATION_SPACE.items(), strict=True))
WARPS = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
COLOURS = tuple(name for name in OPERATIONS if name not in ("identity", *WARPS))
# odd and not square too
SIDES = [(53, 71), (64, 64)]


def soft(height, width, seed=0):
    """A soft image with a little noise and neither black nor white, (3, H, W), uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (30 + pixels * 3 // 4 + rng.integers(-9, 10, pixels.shape)).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def batch(count, side=48):
    rng = np.random.default_rng(1)
    images = torch.stack([soft(side, side, i).permute(1, 2, 0) for i in range(count)]).permute(0, 3, 1, 2)
    return images, torch.from_numpy(rng.integers(-(2**62), 2**62, count))


def every(name):
    """All strengths of an operation, both ways."""
    levels = torch.arange(LEVELS).repeat(2)
    return OperationDraws(torch.full((2 * LEVELS,), OPERATIONS.index(name)), levels, torch.arange(2 * LEVELS) >= LEVELS)


def ours(name, image, **options):
    """An operation at all its strengths, (62, 3, H, W)."""
    return TrivialAugmentWide(**options).apply(image.expand(2 * LEVELS, -1, -1, -1), every(name))


def theirs(name, image, fill=None):
    """What torchvision makes of a tensor or of a Pillow image at each of those strengths."""
    key, (magnitudes, signed) = THEIRS[name]
    height, width = functional.get_size(image)
    steps = magnitudes(LEVELS, height, width)
    strengths = [0.0] if steps is None else [float(step) for step in steps]
    results = []
    for magnitude in strengths + [-step if signed else step for step in strengths]:
        done = REFERENCE._apply_image_or_video_transform(
            image, key, magnitude, v2.InterpolationMode.NEAREST, {type(image): fill}
        )
        results.append(functional.pil_to_tensor(done) if isinstance(done, Image.Image) else done)
    return torch.stack(results).repeat_interleave(2 * LEVELS // len(results), 0)


def furthest(a, b):
    return int((a.int() - b.int()).abs().max())


# -- the operations --------------------------------------------------------------------------------------------------


def test_the_operations_are_torchvisions():
    keys = [key.lower() for key, _ in THEIRS.values()]
    assert keys == [name.replace("-", "") for name in OPERATIONS]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_within_a_level_of_torchvisions_at_every_strength(name, sides):
    image = soft(*sides)
    expected = theirs(name, image)
    assert furthest(ours(name, image), expected) <= 1
    changed = [not torch.equal(result, image) for result in expected]
    assert sum(changed) > LEVELS, "the reference hardly changes this image"


@pytest.mark.parametrize("name", [name for name in COLOURS if name not in ("solarize", "autocontrast")])
def test_colours_are_pillows_to_the_bit(name):
    image = soft(53, 71)
    assert torch.equal(ours(name, image), theirs(name, functional.to_pil_image(image)))


@pytest.mark.parametrize("sides", [*SIDES, (96, 96)])
@pytest.mark.parametrize("name", WARPS)
def test_warps_take_the_pixels_torchvision_takes(name, sides):
    noise = torch.from_numpy(np.random.default_rng(2).integers(1, 256, (3, *sides), dtype=np.uint8))
    same = (ours(name, noise, translate=32) == theirs(name, noise)).float().mean((1, 2, 3))
    # places halfway between two pixels fall either way
    assert same.min() >= 0.99
    assert same.mean() >= 0.999
    if name.startswith("translate"):
        assert same.min() == 1


@pytest.mark.parametrize("fill", [200, (3, 120, 250)])
@pytest.mark.parametrize("name", ["shear-y", "translate-x", "rotate"])
def test_pixels_from_outside_have_the_fill(name, fill):
    image = soft(64, 64)
    values = [float(value) for value in (fill if isinstance(fill, tuple) else (fill,) * 3)]
    same = (ours(name, image, fill=fill, translate=32) == theirs(name, image, values)).float().mean((1, 2, 3))
    assert same.min() >= 0.99


@pytest.mark.parametrize(("side", "pixels"), [(224, 32), (64, 9), (448, 64)])
def test_the_strongest_translation_is_a_seventh_of_the_side(side, pixels):
    image = soft(side, side)
    for name, (down, right) in (("translate-x", (0, pixels)), ("translate-y", (pixels, 0))):
        drawn = OperationDraws(*(torch.tensor([value]) for value in (OPERATIONS.index(name), LEVELS - 1, False)))
        expected = torch.zeros_like(image)
        expected[:, down:, right:] = image[:, : side - down, : side - right]
        assert torch.equal(TrivialAugmentWide().apply(image[None], drawn)[0], expected)


@pytest.mark.parametrize("name", ["translate-x", "translate-y"])
def test_the_share_gives_every_strength_of_its_pixels(name):
    image = soft(56, 56)
    assert torch.equal(ours(name, image), ours(name, image, translate=8))


def test_flat_and_grey_images_keep_what_there_is_to_keep():
    flat = torch.full((3, 20, 20), 90, dtype=torch.uint8)
    for name in ("color", "contrast", "sharpness", "autocontrast", "equalize"):
        assert (ours(name, flat) == 90).all(), name
    grey = soft(20, 20)[:1].expand(3, -1, -1)
    assert torch.equal(ours("color", grey), grey.expand(2 * LEVELS, -1, -1, -1))
    stretched = ours("autocontrast", soft(20, 20))
    assert (stretched.amin((2, 3)) == 0).all()
    assert (stretched.amax((2, 3)) == 255).all()


@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (3, 2)])
def test_the_smallest_images_go_through_everything(sides):
    image = soft(*sides)
    for name in COLOURS:
        assert furthest(ours(name, image), theirs(name, image)) <= 1
    for name in WARPS:
        assert torch.equal(ours(name, image, translate=32)[0], image)


# -- the draw --------------------------------------------------------------------------------------------------------


def test_operations_strengths_and_directions_are_equally_likely_and_independent():
    drawn = TrivialAugmentWide.draw(torch.arange(140_000))
    for values, kinds in zip(drawn, (len(OPERATIONS), LEVELS, 2), strict=True):
        counts = torch.bincount(values.long())
        assert len(counts) == kinds
        # five standard deviations
        assert ((counts - 140_000 / kinds).abs() < 5 * (140_000 / kinds) ** 0.5).all()
    together = torch.stack([values.double() for values in drawn])
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.015


def test_an_image_comes_out_the_same_in_any_batch_order_and_layout():
    images, keys = batch(80)
    augment = TrivialAugmentWide()
    whole = augment(images, keys)
    assert torch.equal(augment(images, keys), whole)
    for size in (1, 7):
        parts = [augment(images[i : i + size], keys[i : i + size]) for i in range(0, len(images), size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(images[order], keys[order]), whole[order])
    assert torch.equal(augment(images.contiguous(), keys), whole)
    assert not torch.equal(augment(images, keys + 1), whole)


def test_the_number_of_threads_changes_nothing():
    images, keys = batch(40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = TrivialAugmentWide()(images, keys)
        torch.set_num_threads(2)
        assert torch.equal(TrivialAugmentWide()(images, keys), alone)
    finally:
        torch.set_num_threads(threads)


def test_results_are_new_memory_channels_last():
    images, keys = batch(28)
    before = images.clone()
    result = TrivialAugmentWide()(images, keys)
    assert torch.equal(images, before)
    assert result.dtype == torch.uint8
    assert result.shape == images.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert TrivialAugmentWide()(images[:0], keys[:0]).shape == (0, 3, 48, 48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_gives_what_the_cpu_gives(deterministic):
    images, keys = batch(140)
    augment = TrivialAugmentWide(fill=(124, 116, 104))
    torch.use_deterministic_algorithms(deterministic)
    try:
        result = augment(images.cuda(), keys.cuda()).cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(result, augment(images, keys))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"fill": 256}, "fill"), ({"fill": (1, 2)}, "fill"), ({"fill": 0.5}, "fill"), ({"translate": -1}, "translate")],
)
def test_options_out_of_range_are_refused(options, word):
    with pytest.raises(UsageError, match=word):
        TrivialAugmentWide(**options)


def test_normalised_or_misshapen_images_are_refused():
    images, keys = batch(4)
    for wrong in (images / 255, images[:, :1], images[0]):
        with pytest.raises(UsageError, match="uint8 images of shape"):
            TrivialAugmentWide()(wrong, keys)
    with pytest.raises(UsageError, match="4 images, 3 seeds"):
        TrivialAugmentWide()(images, keys[:3])


# -- within Augment --------------------------------------------------------------------------------------------------


def test_augment_applies_it_between_flip_and_normalisation():
    images, keys = batch(60)
    trivial = TrivialAugmentWide()
    flips = Augment(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(images, keys) * 255
    expected = Augment.plain()(trivial(flips.round().to(torch.uint8), keys), keys)
    assert torch.allclose(Augment(trivial=trivial)(images, keys), expected, atol=1e-5)
    plain = Augment.plain()(trivial(images, keys), keys)
    assert torch.allclose(Augment(0.0, trivial=trivial)(images, keys), plain, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_erasing_comes_after_it():
    images, keys = batch(60)
    without = Augment(trivial=TrivialAugmentWide())(images, keys)
    erased = Augment(trivial=TrivialAugmentWide(), erasing=RandomErasing(1.0))(images, keys)
    boxes = erased != without
    assert boxes.any((1, 2, 3)).float().mean() > 0.95
    assert (erased[boxes] == 0).all()


def test_augment_with_it_is_the_same_in_any_batch():
    images, keys = batch(30)
    augment = Augment(trivial=TrivialAugmentWide(), erasing=RandomErasing(0.5))
    parts = torch.cat([augment(images[i : i + 1], keys[i : i + 1]) for i in range(30)])
    assert torch.equal(augment(images, keys), parts)


def test_augment_with_it_refuses_floating_point():
    images, keys = batch(4)
    with pytest.raises(UsageError, match="uint8"):
        Augment(trivial=TrivialAugmentWide())(images.float(), keys)
