"""Copies by local features: what is found, what an alternate is, and what is neither."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import candidates, geometry, residual
from animesion.dedup.compare import CompareJob, Pair, Place
from animesion.dedup.residual import Comparison
from animesion.dedup.verdict import Verdict
from animesion.images import codec, features, local_features

Change = Callable[[Image.Image], Image.Image]


def scene(seed: int, size: tuple[int, int] = (220, 180)) -> Image.Image:
    """A drawing with much to see: shapes, lines and letters on a ground that changes slowly."""
    rng = random.Random(seed)
    ramp = np.linspace(rng.randrange(90, 160), rng.randrange(160, 230), size[0]).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp[None], size[1], axis=0)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(45):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), rng.randrange(5, 30)
        colour = tuple(rng.randrange(256) for _ in range(3))
        points = [(x + rng.randint(-r, r), y + rng.randint(-r, r)) for _ in range(rng.choice((3, 4, 5)))]
        pen.polygon(points, fill=colour, outline=(20, 20, 20))
        pen.line([points[0], (rng.randrange(size[0]), rng.randrange(size[1]))], fill=colour, width=rng.randrange(1, 4))
    for _ in range(8):
        pen.text(
            (rng.randrange(size[0]), rng.randrange(size[1])), rng.choice("ABGKRSXZ"), font_size=rng.randrange(12, 30)
        )
    return image


def compared(first: Image.Image, second: Image.Image) -> Comparison | None:
    points = local_features.extract(first), local_features.extract(second)
    match = geometry.match(*points, (first.size, second.size))
    return None if match is None else residual.compare(first, second, match)


def jpeg(quality: int) -> Change:
    def encode(image: Image.Image) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(out).convert("RGB")

    return encode


def cut(left: float, top: float, right: float, bottom: float) -> Change:
    return lambda image: image.crop(
        (round(left * image.width), round(top * image.height), round(right * image.width), round(bottom * image.height))
    )


def turned(degrees: float) -> Change:
    return lambda image: image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))


def with_caption(image: Image.Image) -> Image.Image:
    taller = ImageOps.expand(image, (0, 0, 0, image.height // 5), (255, 255, 255))
    ImageDraw.Draw(taller).text((6, image.height + 4), "when you see it", fill=(0, 0, 0), font_size=18)
    return taller


COPIES: dict[str, Change] = {
    "re-encoded": jpeg(30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "stretched": lambda image: image.resize((image.width, round(0.93 * image.height)), Image.Resampling.BICUBIC),
    "cut on all sides": cut(0.08, 0.1, 0.9, 0.93),
    "cut to half": cut(0.25, 0.2, 0.95, 0.9),
    "border": lambda image: ImageOps.expand(image, 20, (0, 0, 0)),
    "caption": with_caption,
    "mirrored": ImageOps.mirror,
    "mirrored and cut": lambda image: ImageOps.mirror(cut(0.05, 0.0, 1.0, 0.95)(image)),
    "a quarter turn": turned(90),
    "upside down": turned(180),
    "tilted": turned(20),
    "brighter, clipped": lambda image: ImageEnhance.Brightness(image).enhance(1.25),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.75),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_a_copy_whatever_was_done_to_it(change: str) -> None:
    for seed in range(3):
        image = scene(seed)
        outcome = compared(image, COPIES[change](image))
        assert outcome is not None
        assert outcome.verdict is Verdict.COPY, (seed, outcome)


def test_what_was_done_is_stated() -> None:
    image = scene(1)
    plain, mirrored = compared(image, jpeg(80)(image)), compared(image, ImageOps.mirror(image))
    quarter, part = compared(image, turned(90)(image)), compared(image, cut(0.0, 0.0, 0.7, 1.0)(image))
    assert plain
    assert mirrored
    assert quarter
    assert part
    assert (plain.how, mirrored.how, quarter.how) == ("", "mirrored", "turned 90°")
    assert part.how.startswith("shows 0.00 0.00 0.70 1.00")


def test_a_sticker_is_an_overlay_with_its_place() -> None:
    image = scene(2)
    covered = image.copy()
    pen = ImageDraw.Draw(covered)
    pen.ellipse((120, 60, 180, 120), fill=(250, 40, 160), outline=(0, 0, 0), width=2)
    outcome = compared(image, covered)
    assert outcome is not None
    assert outcome.verdict is Verdict.OVERLAY
    left, top, right, bottom = map(float, outcome.how.removeprefix("overlay ").split())
    assert left == pytest.approx(120 / 220, abs=0.02)
    assert right == pytest.approx(181 / 220, abs=0.02)
    assert top == pytest.approx(60 / 180, abs=0.02)
    assert bottom == pytest.approx(121 / 180, abs=0.02)


def test_alternates_are_told_from_copies() -> None:
    image = scene(3)
    detail, colours = image.copy(), np.asarray(image).copy()
    pen = ImageDraw.Draw(detail)
    pen.ellipse((60, 80, 74, 88), fill=(120, 20, 30))  # a mouth
    pen.line((100, 60, 112, 56), fill=(10, 10, 10), width=3)  # a brow
    colours[40:140, 60:170] = colours[40:140, 60:170, ::-1]
    for changed in (detail, jpeg(85)(detail), Image.fromarray(colours)):
        outcome = compared(image, changed)
        assert outcome is not None
        assert outcome.verdict is Verdict.ALTERNATE


def test_a_change_is_not_lost_in_the_noise_of_a_worse_alignment(tmp_path: Path) -> None:
    image = scene(23)
    changed = image.copy()
    ImageDraw.Draw(changed).ellipse((60, 80, 72, 86), fill=(200, 120, 120))
    other = changed.crop((2, 2, 218, 178)).resize(image.size, Image.Resampling.BICUBIC)
    as_a_whole = residual.compare(image, other, geometry.stretched(image.size, other.size, mirrored=False))
    assert as_a_whole.verdict is Verdict.COPY  # two pixels off: every edge differs
    places, points = {}, {}
    for row, each in enumerate((image, other)):
        path = tmp_path / f"{row}.png"
        each.save(path)
        places[row] = Place(path, 0, path.stat().st_size, *each.size)
        points[row] = local_features.extract(each)
    pair = Pair(0, 1, plain=True, mirrored=False, whole=False)
    [found] = CompareJob([pair], places, points, codec.Limits()).run()
    assert found.verdict is Verdict.ALTERNATE
    assert found.inliers


def test_two_crops_of_one_picture_are_parts() -> None:
    wide = scene(4, (420, 200))
    outcome = compared(wide.crop((0, 0, 240, 200)), wide.crop((150, 0, 420, 200)))
    assert outcome is not None
    assert outcome.verdict is Verdict.PART


def test_different_drawings_do_not_match() -> None:
    scenes = [scene(seed) for seed in range(12)]
    assert not any(compared(a, b) for i, a in enumerate(scenes) for b in scenes[:i])


def test_small_drawings_on_a_plain_ground_are_not_copies_of_one_another() -> None:
    def letter(text: str) -> Image.Image:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).text((44, 30), text, fill=(0, 0, 0), font=ImageFont.load_default(56))
        return image

    letters = [letter(text) for text in "BEFGHKMPRSTXZ3578"]
    for i, first in enumerate(letters):
        as_a_whole = geometry.stretched(first.size, first.size, mirrored=False)
        assert residual.compare(first, jpeg(60)(first), as_a_whole).verdict is Verdict.COPY
        for second in letters[:i]:
            assert residual.compare(first, second, as_a_whole).verdict is Verdict.DIFFERENT


def test_points_of_a_mirror_image_follow_from_those_of_the_image() -> None:
    image = scene(5)
    mirrored = local_features.mirrored(local_features.extract(image), local_features.frame(image.size)[0])
    found = local_features.extract(ImageOps.mirror(image))
    bits = np.bitwise_count(mirrored["code"][:, None] ^ found["code"][None])
    assert np.median(bits.min(axis=1)) <= 1


def test_features_do_not_depend_on_threads_and_survive_a_table() -> None:
    import cv2

    image = scene(6)
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        first = local_features.extract(image)
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(first, local_features.extract(image))
    assert np.array_equal(first, local_features.from_bytes(first.tobytes()))
    assert 50 < len(first) <= 200
    assert not len(local_features.extract(Image.new("RGB", (64, 64), "white")))
    assert not len(local_features.extract(Image.new("RGB", (1, 1))))


def test_candidates_are_the_copies_and_never_two_published_images() -> None:
    images = [scene(seed) for seed in range(8)]
    images += [turned(90)(images[0]), ImageOps.mirror(images[1]), jpeg(60)(images[2])]
    computed = [features.compute_features(image) for image in images]
    hashes = candidates.Hashes(
        np.array([each.phash for each in computed], dtype=np.uint64),
        np.array([each.phash_flip for each in computed], dtype=np.uint64),
        [each.thumbnail for each in computed],
    )
    points = local_features.PointSets.of([local_features.extract(image) for image in images])
    found = candidates.find(candidates.Signatures(hashes, points=points), DuplicatesSection())
    pairs = [tuple(pair) for pair in found.pairs.tolist()]
    assert {(0, 8), (1, 9), (2, 10)} <= set(pairs)
    assert found.plain[pairs.index((2, 10))]
    assert found.mirrored[pairs.index((1, 9))]
    side = np.array([1, 1, 0, *[2] * 8])
    kept = candidates.find(candidates.Signatures(hashes, points=points, side=side), DuplicatesSection())
    assert (2, 10) in [tuple(pair) for pair in kept.pairs.tolist()]
    assert all(2 in pair for pair in kept.pairs.tolist())


@pytest.mark.parametrize("size", [(220, 180), (64, 200)])
def test_images_are_laid_over_one_another_at_any_size_by_the_transform_that_was_found(size: tuple[int, int]) -> None:
    first = scene(5, (220, 180))
    second = ImageOps.mirror(cut(0.1, 0.0, 0.9, 0.8)(first))
    points = local_features.extract(first), local_features.extract(second)
    match = geometry.match(*points, (first.size, second.size))
    assert match is not None
    assert match.mirrored
    outcome = residual.compare(first, second, match)
    assert outcome.verdict is Verdict.COPY
    # the second one is mirrored back: then it shows what was cut out
    assert np.allclose(outcome.transform, [0.8, 0, 0.1, 0, 0.8, 0], atol=0.01)
    misses = []
    for transform in (outcome.transform, (1, 0, 0, 0, 1, 0)):
        laid = residual.laid(first, second.resize(size), transform, mirrored=True)
        misses.append(np.abs(laid.first - laid.second)[laid.inside].mean())
    assert misses[0] < 0.5 * misses[1]
    exact = residual.laid(first, second, outcome.transform, mirrored=True)
    assert residual.beyond_noise(exact).max() == pytest.approx(outcome.residual, abs=0.5)


def test_point_sets_tell_images_without_points_from_those_whose_points_are_unknown() -> None:
    known = [local_features.extract(scene(seed)) for seed in range(2)]
    contents = [known[0].tobytes(), None, b"", known[1].tobytes()]
    lengths = np.array([len(known[0]), 0, 0, len(known[1])], dtype=np.int64)
    sets = local_features.PointSets.empty(lengths, np.array([content is not None for content in contents]))
    sets.set([3, 1], [contents[3], contents[1]])  # parts come in any order
    sets.set([0, 2], [contents[0], contents[2]])
    assert [None if (found := sets[i]) is None else found.tobytes() for i in range(4)] == contents
    together = local_features.PointSets.of(known)
    assert together.points.tobytes() == sets.points.tobytes()
    assert len(together) == 2
