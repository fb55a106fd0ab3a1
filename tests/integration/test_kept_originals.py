"""Images that are copied into the shards unchanged, and re-encoded images with the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import animesion
from animesion.dataset.dataset import Dataset
from animesion.verification.checks import verify

TURNED, UPRIGHT, SOFTWARE = 6, 1, 0x0131


def draw(seed: int) -> Image.Image:
    """A soft random pattern, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 56), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, orientation: int = 0, **settings: Any) -> bytes:
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[SOFTWARE] = "a camera"
        settings["exif"] = exif.tobytes()
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def files() -> dict[str, bytes]:
    """A file of each kind, by name; each shows another image."""
    images = [draw(i) for i in range(8)]
    alpha = images[4].copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return {
        "plain.jpg": encoded(images[0], "JPEG", quality=60),
        "upright.jpg": encoded(images[1], "JPEG", UPRIGHT, quality=60),
        "turned.jpg": encoded(images[2], "JPEG", TURNED, quality=95),
        "progressive.jpg": encoded(images[3], "JPEG", quality=75, progressive=True),
        "alpha.png": encoded(alpha, "PNG"),
        "plain.png": encoded(images[5], "PNG", compress_level=1),
        "palette.png": encoded(images[6].quantize(16), "PNG"),
        "turned.png": encoded(images[7], "PNG", TURNED),
    }


def built(tmp_path: Path, *overrides: str) -> Dataset:
    for name, content in files().items():
        path = tmp_path / "set" / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settings = [f"source.path={tmp_path / 'set'}", "split.strategy=single", *overrides]
    out = tmp_path / "out"
    animesion.build(animesion.load_recipe("folder", settings), out, workers=1)
    dataset = animesion.open_dataset(out)
    report = verify(dataset, workers=1)
    assert report.clean, report.faults
    return dataset


def payloads(dataset: Dataset) -> dict[str, bytes]:
    rows = dataset.read_table("curated.parquet").to_pylist()
    names = {row["key"]: row["source_id"].rpartition("/")[2] for row in rows}
    return {names[sample.key]: sample.image for sample in dataset.samples()}


@pytest.mark.parametrize(
    ("form", "kept"), [("jpg", {"plain.jpg", "upright.jpg", "progressive.jpg"}), ("png", {"plain.png"})]
)
def test_files_of_the_requested_form_are_copied_byte_for_byte(tmp_path: Path, form: str, kept: set[str]) -> None:
    originals = files()
    found = payloads(built(tmp_path, f"pack.format={form}"))
    assert {name for name, content in found.items() if content == originals[name]} == kept
    for name, content in found.items():
        with Image.open(io.BytesIO(content)) as image:
            assert image.getexif().get(0x0112, UPRIGHT) == UPRIGHT, name
            assert image.mode == "RGB"
            assert image.size == ((56, 64) if name.startswith("turned") else (64, 56))


def test_png_of_any_original_has_the_same_pixels(tmp_path: Path) -> None:
    found = payloads(built(tmp_path, "pack.format=png"))
    for name in ("plain.jpg", "upright.jpg", "progressive.jpg", "plain.png", "palette.png"):
        with Image.open(io.BytesIO(files()[name])) as due, Image.open(io.BytesIO(found[name])) as image:
            assert np.array_equal(np.asarray(due.convert("RGB")), np.asarray(image)), name


def test_a_size_that_the_image_already_has_is_no_reason_to_encode(tmp_path: Path) -> None:
    found = payloads(built(tmp_path, "pack.size=56"))
    assert found["plain.jpg"] == files()["plain.jpg"]
    assert found["turned.jpg"] != files()["turned.jpg"]


def test_never_leaves_metadata_out(tmp_path: Path) -> None:
    found = payloads(built(tmp_path, "pack.keep_original=never"))
    assert not any(content == files()[name] for name, content in found.items())
    with Image.open(io.BytesIO(files()["upright.jpg"])) as due:
        assert due.getexif()[SOFTWARE] == "a camera"
    for content in found.values():
        with Image.open(io.BytesIO(content)) as image:
            assert not image.getexif()
