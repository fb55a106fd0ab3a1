"""The detectors `center`, `leaf` and `imgutils`, by their options in a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from animesion import detectors, model_files
from animesion.errors import AnimesionError, UsageError
from animesion.images import codec
from animesion.schemas import Box


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), share=st.sampled_from([0.1, 0.5, 0.875, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_centre_is_a_square_in_the_middle(width: int, height: int, share: float) -> None:
    image = Image.new("L", (width, height))  # no pixel is looked at
    [[box]] = detectors.load("center", {"share": share})([image], [None])
    crop = codec.crop_pixels(Box(*np.array(box, dtype=np.float32).tolist()), width, height, 0.0, square=False)
    assert crop is not None
    left, top, right, bottom = crop
    assert right - left == bottom - top == max(1, int(min(width, height) * share))
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1


def test_the_centre_keeps_the_shape_on_request() -> None:
    [[box]] = detectors.load("center", {"share": 0.5, "square": False})([Image.new("RGB", (400, 200))], [None])
    assert box == Box(0.25, 0.25, 0.75, 0.75, 1.0)
    with pytest.raises(UsageError, match="share"):
        detectors.load("center", {"share": 0})


def leaf(width: int, height: int, at: tuple[int, int, int, int], *, ground: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), ground)
    ImageDraw.Draw(image).ellipse(at, fill=(60, 140, 50))
    grain = Image.effect_noise((width, height), 12).convert("RGB")
    return Image.blend(image, grain, 0.1).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize("ground", [(245, 245, 240), (10, 10, 10), (70, 90, 200)], ids=["white", "black", "blue"])
@pytest.mark.parametrize("scale", [1, 4])
def test_a_leaf_is_found_on_any_plain_ground(ground: tuple[int, int, int], scale: int) -> None:
    width, height = 480 * scale, 360 * scale
    at = (100 * scale, 60 * scale, 330 * scale, 300 * scale)
    [[box]] = detectors.load("leaf")([leaf(width, height, at, ground=ground)], [None])
    found = (box.left * width, box.top * height, box.right * width, box.bottom * height)
    assert found == pytest.approx(at, abs=4 * scale)
    assert box.score > 0.8


def test_dust_is_no_part_of_the_leaf_and_several_parts_are_one_box() -> None:
    image = leaf(480, 360, (200, 100, 300, 200), ground=(250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 27, 27), fill=(40, 40, 40))  # dust
    [[box]] = detectors.load("leaf")([image], [None])
    assert box.left * 480 == pytest.approx(200, abs=3)
    draw.ellipse((320, 150, 380, 300), fill=(60, 140, 50))  # another leaflet
    [[box]] = detectors.load("leaf")([image], [None])
    assert (box.right * 480, box.bottom * 360) == pytest.approx((380, 300), abs=3)


def test_plain_ground_has_no_leaf_and_a_busy_one_a_low_score() -> None:
    find = detectors.load("leaf")
    assert find([Image.new("RGB", (300, 200), (90, 90, 90)), Image.new("RGB", (1, 1))], [None, None]) == [[], []]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    busy = Image.fromarray(pixels).resize((600, 400), Image.Resampling.BICUBIC)
    [boxes] = find([busy], [None])
    assert all(box.score < 0.7 for box in boxes)


@settings(max_examples=80, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=2, max_size=40))
def test_the_threshold_is_the_one_with_the_most_variance_between_classes(counts: list[int]) -> None:
    from animesion.detectors.plain import otsu

    values = np.repeat(np.arange(len(counts)), counts)
    threshold = otsu(np.array(counts, dtype=np.int64))
    if len(set(values.tolist())) < 2:
        assert threshold == 0
        return

    def between(level: int) -> float:
        low, high = values[values < level], values[values >= level]
        if not len(low) or not len(high):
            return 0.0
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2

    assert between(threshold) == pytest.approx(max(between(level) for level in range(1, len(counts))))


# -- imgutils ----------------------------------------------------------------------------------------------------------

STAND_IN = """
class LocalEntryNotFoundError(FileNotFoundError):
    pass


def detect_faces(image, level='s', version='v1.4', model_name=None, conf_threshold=0.25, iou_threshold=0.7, **kwargs):
    assert not kwargs and image.mode == 'RGB'
    if model_name == 'offline':
        raise LocalEntryNotFoundError('cannot find the file on disk\\nand the hub cannot be reached')
    if model_name == 'broken':
        raise RuntimeError('shape mismatch')
    found = [((10, 20, 110, 220), 'face', 0.4), ((150, -5, 250, 60), 'face', 0.8), ((30, 30, 30, 90), 'face', 0.9)]
    return [each for each in found if each[2] >= conf_threshold]


def detect_heads(image, level=None, model_name='head_detect_v2.0_s', conf_threshold=0.4, iou_threshold=0.7, **kwargs):
    assert model_name == 'head_detect_v2.0_s' and iou_threshold == 0.5
    return [((0, 0, 200, 400), 'head', 0.7)]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the call signatures of dghs-imgutils 0.19."""
    for name in [name for name in sys.modules if name == "imgutils" or name.startswith("imgutils.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "imgutils").mkdir()
    (tmp_path / "imgutils" / "__init__.py").write_text("")
    (tmp_path / "imgutils" / "detect.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))


IMAGE = Image.new("RGB", (200, 400))


@pytest.mark.usefixtures("stand_in")
def test_faces_are_relative_clipped_and_sorted() -> None:
    [boxes] = detectors.load("imgutils")([IMAGE], [None])
    assert boxes == [Box(0.75, 0.0, 1.0, 0.15, 0.8), Box(0.05, 0.05, 0.55, 0.55, 0.4)]
    [boxes] = detectors.load("imgutils", {"score": 0.5})([IMAGE], [None])
    assert [box.score for box in boxes] == [0.8]
    [boxes] = detectors.load("imgutils", {"part": "head", "iou": 0.5})([IMAGE], [None])
    assert boxes == [Box(0.0, 0.0, 1.0, 1.0, 0.7)]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("model", "message"), [("offline", "cannot download its network"), ("broken", "shape mismatch")]
)
def test_errors_are_one_sentence(model: str, message: str) -> None:
    find = detectors.load("imgutils", {"model": model})
    with pytest.raises(AnimesionError, match=message) as caught:
        find([IMAGE], [None])
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imgutils", None)
    monkeypatch.setitem(sys.modules, "imgutils.detect", None)
    with pytest.raises(UsageError, match="pip install"):
        detectors.load("imgutils")
    assert "dghs-imgutils" in model_files.setup_hint("imgutils")
