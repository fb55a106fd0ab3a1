"""Take the documentation's screenshots of the sample's report: `python docs/make_screenshots.py`.

Needs the extra `dev` and Chromium. `animesion_sample` draws all images; none of them is real data.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import animesion

OUT = Path(__file__).parent / "images"

#: File -> view, width and height in pixels.
SHOTS = {
    "report-overview.webp": ("overview", 1280, 1180),
    "report-desktop.webp": ("classes/3", 1280, 760),
    "report-alternates.webp": ("alternates", 1280, 760),
}


def main() -> None:
    """Build the sample, open its report and write the screenshots."""
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as engine:
        built = Path(scratch) / "built"
        animesion.build(animesion.load_recipe("daf-re", sample=True), built)
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (view, width, height) in SHOTS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"{(built / 'report.html').as_uri()}#{view}")
            page.wait_for_timeout(500)
            save(page, name)
            page.close()
        browse(browser, built)
        browser.close()


def browse(browser: Browser, built: Path) -> None:
    """Screenshots of `animesion browse`: decisions in a class, an area of the map, and an image at full size."""
    command = [sys.executable, "-c", "from animesion.cli import main; main()", "browse", built.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=built.parent) as serving:
        assert serving.stdout is not None
        url = next(line for line in serving.stdout if line.startswith("open ")).split()[1]
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.goto(url)
        page.wait_for_selector("h1")
        page.evaluate("location.hash = 'classes/3'")
        page.locator(".cards .frame").first.click()
        page.keyboard.press("x")
        page.wait_for_selector(".badge")
        for place in (2, 3):
            page.locator(".cards .frame").nth(place).click()
        page.wait_for_timeout(500)
        save(page, "browse.webp")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Hide").click()
        page.evaluate("location.hash = 'images'")
        surround(page, [(0.42, 0.05), (0.62, 0.1), (0.66, 0.3), (0.5, 0.38), (0.38, 0.25)])
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(800)
        save(page, "browse-images.webp")
        page.locator(".gridside .frame").nth(1).dblclick()
        page.wait_for_selector(".viewer .pane >> nth=1 >> img")
        page.wait_for_timeout(800)
        save(page, "browse-viewer.webp")
        page.close()
        serving.terminate()


def surround(page: Page, corners: list[tuple[float, float]]) -> None:
    """Draw an area on the map, whose corners are shares of its width and height."""
    box = page.locator(".map canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(x, y, steps=8)
    page.mouse.up()


def save(page: Page, name: str) -> None:
    """Write a screenshot as WebP."""
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").save(OUT / name, "WEBP", quality=80, method=6)
    print(f"wrote {OUT / name}")


if __name__ == "__main__":
    main()
