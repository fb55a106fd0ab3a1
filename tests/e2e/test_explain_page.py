"""The page of `animesion explain` in a real browser: hostile names, the map at 20,000 images, narrow screens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from animesion.report import page
from animesion_training.analysis.class_similarity import class_similarity
from animesion_training.analysis.explain import Explained
from animesion_training.analysis.explain_page import Distances, PageData
from animesion_training.analysis.layers import LayerSimilarity
from animesion_training.analysis.neighbours import Neighbour
from animesion_training.analysis.panels import Panel
from animesion_training.analysis.predictions import Predictions

from .test_report_page import EVIL, chromium, opened  # noqa: F401

torch = pytest.importorskip("torch")

NAMES = tuple(EVIL)


def predictions(count: int) -> Predictions:
    """Predictions for images in as many colours as classes; every fifth is wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(NAMES), count)
    guesses = np.where(np.arange(count) % 5 == 0, (labels + 1) % len(NAMES), labels)
    colours = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200)], np.uint8)
    small = np.repeat(np.repeat(colours[labels][:, None, None], 8, 1), 8, 2)
    small[:, 0, 0, 0] += (np.arange(count) % 50).astype(np.uint8)  # not all equal
    vectors = np.eye(len(NAMES), dtype=np.float32)[labels]
    keys = [f"<img src=x onerror=window.ran=3> {i}" for i in range(count)]
    scores = np.full((count, 2), 0.5, np.float32)
    both = np.stack([guesses, (guesses + 1) % len(NAMES)], 1)
    return Predictions("test", NAMES, keys, labels, both, scores, np.zeros(count, np.float32), vectors, small)


def written(path: Path, count: int) -> str:
    found = predictions(count)
    pixels = np.full((32, 32, 3), 90, np.uint8)
    similar = (Neighbour("a/b.png", NAMES[1], 0.5, pixels),)

    def explained(i: int) -> Explained:
        panels = (Panel("image", pixels), Panel("Grad-CAM", pixels))
        guesses = tuple((NAMES[k], 0.5) for k in found.guesses[i])
        label = NAMES[found.labels[i]]
        return Explained(found.keys[i], panels, guesses, NAMES[0], label, similar)

    data = PageData("run <b>", "resnet18, 64 px", "test of faces", "gradcam: ResNet has a feature map")
    data.rows([explained(0), Explained("broken.png", problem="no image")])
    data.mistakes(found, explained, 20)
    turn = 2 * np.pi * (found.labels / len(NAMES) + np.random.default_rng(1).random(count) / 8)
    data.map([found], np.stack([np.cos(turn), np.sin(turn)], 1).astype(np.float32), "t-SNE")
    data.classes(class_similarity(found), NAMES)
    cka = LayerSimilarity(("layer1", "layer2"), ("a", "b", "c"), ((1.0, 0.2, None), (0.1, 0.9, 0.3)), count)
    data.layers(cka, "one", "other", Distances(torch.tensor([[10.0, 20.0], [30.0, 60.0]]), 64, count))
    path.write_bytes(page.render(data.json).encode())
    return path.as_uri()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_every_view_is_drawn(chromium: Any, tmp_path: Path, width: int, height: int) -> None:  # noqa: F811
    url = written(tmp_path / "p.html", 60)
    with opened(chromium, url, viewport={"width": width, "height": height}) as view:
        assert view.locator(".explained").count() == 2
        assert "not explained: no image" in view.inner_text(".explanations")
        for tab, what in (("Mistakes", ".pairgroup"), ("Map", "canvas"), ("Classes", ".matrix"), ("Layers", "circle")):
            view.click(f".tabs >> text={tab}")
            view.wait_for_selector(what, state="attached")
            assert view.locator("[role=alert]").count() == 0
            assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.locator("circle").count() == 4
        assert view.locator(".matrix td", has_text="–").count() == 1
        view.click(".tabs >> text=Mistakes")
        heading = view.locator(".pairgroup h2").first.inner_text()
        assert "predicted as" in heading
        assert view.locator("img[src='x']").count() == 0
        # 12 of 60 are wrong
        assert "12 of 60 images (20.0%)" in view.inner_text(".explain")


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_map_shows_the_image_under_the_pointer(chromium: Any, tmp_path: Path, count: int) -> None:  # noqa: F811
    url = written(tmp_path / "p.html", count)
    with opened(chromium, url + "#map", viewport={"width": 1280, "height": 900}) as view:
        box = view.locator("canvas").bounding_box()
        radius = min(box["width"], box["height"]) / 2.1
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for label, name in enumerate(NAMES):
            turn = 2 * np.pi * (label / len(NAMES) + 1 / 16)
            view.mouse.move(middle[0] + radius * np.cos(turn), middle[1] + radius * np.sin(turn))
            view.wait_for_selector(".tip")
            shown = view.inner_text(".tip")
            assert "<img src=x onerror=window.ran=3>" in shown
            assert ("ミク" in shown) == ("ミク" in name)
            assert view.locator(".tip img").get_attribute("src").startswith("data:image/webp;base64,")
        view.mouse.move(*middle)  # nothing is there
        view.wait_for_selector(".tip", state="detached")
        view.click(".legend button >> nth=0")
        assert view.locator(".legend button[aria-pressed=true]").count() == 1
        view.fill(".legend input", "ミク")
        assert view.locator(".legend button").count() == 1
        view.click("text=right or wrong")
        view.focus("canvas")
        before = view.evaluate("document.querySelector('canvas').toDataURL().length")
        view.keyboard.press("+")
        view.keyboard.press("ArrowLeft")
        assert view.evaluate("document.querySelector('canvas').toDataURL().length") != before
