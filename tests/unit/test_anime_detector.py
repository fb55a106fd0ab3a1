"""The detector `anime`: the network of the package, its two runtimes, and images of any size."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from animesion import detectors
from animesion.detectors import anime, matching
from animesion.detectors.anime import AnimeDetector, AnimeOptions, TableOrAnime
from animesion.errors import UsageError
from animesion.schemas import Box
from animesion_sample.characters import CAST
from animesion_sample.drawing import Drawing, heads, render
from animesion_sample.scenes import SCENES


@pytest.fixture(scope="module")
def detector() -> AnimeDetector:
    return AnimeDetector()


def test_heads_of_the_sample_world_are_found(detector: AnimeDetector) -> None:
    found = truth = 0
    for number, design in enumerate(CAST[:8]):
        drawing = Drawing(f"anime/{number}", (design.name,), 480, 400)
        boxes = [box for box in detector([render(drawing)], [None])[0] if box.score >= 0.5]
        true = [Box(*head.box, 1.0) for head in heads(drawing)]
        assert len(boxes) <= len(true)
        truth += len(true)
        found += sum(at >= 0 for at in matching.matches(boxes, true, 0.5))
    assert found >= truth - 1


def test_grounds_have_no_faces(detector: AnimeDetector) -> None:
    images = [SCENES[name]((480, 400), Random(f"anime/{name}")).convert("RGB") for name in sorted(SCENES)]
    found = detector(images, [None] * len(images))
    assert sum(box.score >= 0.5 for boxes in found for box in boxes) <= 1


def test_both_runtimes_give_the_same_boxes(detector: AnimeDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    images = [render(Drawing(f"anime/{n}", (CAST[n].name,), *size)) for n, size in ((0, (480, 400)), (3, (300, 500)))]
    before = detectors.identity("anime"), detectors.identity("auto")
    assert before[0] == before[1] != ""
    monkeypatch.setattr(anime, "_installed", lambda module: False)
    # boxes that the other library found are not used
    assert {detectors.identity("anime"), detectors.identity("auto")}.isdisjoint(before)
    for ours, theirs in zip(detector(images, [None] * 2), AnimeDetector()(images, [None] * 2), strict=True):
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (31, 33), (2000, 40), (700, 900)])
def test_boxes_are_in_the_image_whatever_its_size(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    [found] = AnimeDetector(AnimeOptions(score=0.01))([image], [None])
    assert len(found) <= 300
    for box in found:
        assert 0 <= box.left < box.right <= 1
        assert 0 <= box.top < box.bottom <= 1
    scores = [box.score for box in found]
    assert scores == sorted(scores, reverse=True)


def test_an_image_of_twice_the_size_has_the_same_faces(detector: AnimeDetector) -> None:
    image = render(Drawing("anime/scale", (CAST[2].name,), 560, 420))
    [[ours, *_]] = detector([image], [None])
    [[theirs, *_]] = detector([image.resize((1680, 1260), Image.Resampling.BICUBIC)], [None])
    assert matching.overlap(ours, theirs) > 0.8


def test_values_that_are_no_numbers_are_left_out() -> None:
    outputs = [np.full((1, 5, 64 // stride, 96 // stride), np.nan, np.float32) for stride in anime.OUTPUTS.values()]
    outputs[2][0, :, 1, 2] = (3.0, 0.0, 0.0, 0.0, 0.0)
    outputs[1][0, :, 0, 0] = (5.0, 0.0, np.nan, 0.0, 0.0)
    corners, scores = anime.boxes_of(outputs, 0.1)
    # the cell's centre is 80, 48, and each edge one stride away
    assert corners.tolist() == [[48.0, 16.0, 112.0, 80.0]]
    assert scores[0] == pytest.approx(1 / (1 + np.exp(-3)))


def test_a_file_that_is_no_such_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    with pytest.raises(UsageError, match="file not found"):
        AnimeDetector(AnimeOptions(file=str(path)))
    path.write_bytes(b"no network")
    with pytest.raises(UsageError, match="not a network that the detector 'anime' can load"):
        AnimeDetector(AnimeOptions(file=str(path)))


def test_the_network_is_small() -> None:
    assert AnimeDetector.file().stat().st_size < 6_000_000


def test_a_table_of_boxes_is_used_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    image, box = render(Drawing("anime/table", (CAST[5].name,), 400, 400)), Box(0.1, 0.2, 0.3, 0.4, 0.9)
    detector = TableOrAnime()
    with monkeypatch.context() as without:
        without.setattr(anime, "_runtime", lambda path: pytest.fail("the network was loaded"))
        assert detector([image, image], [[box], []]) == [[box], []]
    [table, found] = detector([image, image], [[box], None])
    assert table == [box]
    assert found == AnimeDetector()([image], [None])[0]
