"""An image that kills its worker: found, dropped, named; in inspect through a third party's detector, in pack too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import animesion
from animesion.executors import local
from animesion.executors.local import LocalExecutor

from .test_bad_input import class_folders, put, recipe, rows, saved

PLUGIN = '''
import os, signal
from animesion.detectors import WholeImage

class Fragile(WholeImage):
    """Dies of images whose first pixel is pure green, as a native decoder with a bug would."""

    summary = "a detector with a bug"

    def __call__(self, images, given):
        if any(image.getpixel((0, 0)) == (0, 255, 0) for image in images):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(images, given)
'''


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a plug-in the way pip would: a module and its entry point on the path."""
    site = tmp_path / "site"
    put(site, "fragile_plugin.py", PLUGIN.encode())
    put(site, "fragile-1.0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    put(site, "fragile-1.0.dist-info/entry_points.txt", b"[animesion.detectors]\nfragile = fragile_plugin:Fragile\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "fragile_plugin", raising=False)


@pytest.mark.usefixtures("fragile")
def test_poison_images_are_found_and_dropped(tmp_path: Path) -> None:
    from PIL import Image

    root = class_folders(tmp_path / "set", 10)
    green = Image.new("RGB", (40, 40), (0, 255, 0))
    put(root, "asuka/poison.png", saved(green, "PNG"))
    green.putpixel((5, 5), (9, 9, 9))
    put(root, "rei/poison.png", saved(green, "PNG"))
    result = animesion.build(recipe(root, "crop.detector=fragile"), tmp_path / "out", workers=2)
    found = rows(tmp_path / "out")
    assert {name for name, row in found.items() if row["reason"] == "crashed decoder"} == {
        "asuka/poison.png",
        "rei/poison.png",
    }
    assert result.dropped == {"crashed decoder": 2}
    assert result.kept == 20


@pytest.mark.slow
def test_an_image_that_kills_the_worker_in_pack_is_dropped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # packing opens the encoder: a native crash there is planted through Pillow's own start-up hook
    monkeypatch.setattr(local, "LocalExecutor", LocalExecutor)  # a fork has started already
    root = class_folders(tmp_path / "set", 10)
    site = tmp_path / "site"
    put(
        site,
        "sitecustomize.py",
        b"import os\n"
        b"from PIL import Image\n"
        b"original = Image.Image.save\n"
        b"def save(self, *arguments, **options):\n"
        b"    if self.size == (24, 24) and self.getpixel((0, 0)) == (1, 2, 3):\n"
        b"        os._exit(11)\n"
        b"    return original(self, *arguments, **options)\n"
        b"Image.Image.save = save\n",
    )
    from PIL import Image

    put(root, "rei/poison.png", saved(Image.new("RGB", (48, 48), (1, 2, 3)), "PNG"))
    monkeypatch.syspath_prepend(str(site))
    result = animesion.build(recipe(root, "pack.size=24"), tmp_path / "out", workers=2)
    assert rows(tmp_path / "out")["rei/poison.png"]["reason"] == "crashed decoder"
    assert result.kept == 20
