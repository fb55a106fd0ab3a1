"""Builds of images of several forms: what is dropped, what is copied, and what the packed files hold."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import animesion
from animesion.dataset.dataset import Dataset
from animesion.verification.checks import verify

SECRET = b"Jane Doe, 12 Home Street"


def drawing(seed: int, side: int = 64) -> npt.NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def strokes(seed: int, side: int = 64) -> npt.NDArray[np.uint8]:
    """The alpha channel of a drawing, 0 or 255."""
    coarse = np.random.default_rng(seed).integers(0, 2, (8, 8), dtype=np.uint8) * np.uint8(255)
    return np.kron(coarse, np.ones((side // 8, side // 8), dtype=np.uint8))


def inked(seed: int, level: int) -> Image.Image:
    alpha = strokes(seed)
    return Image.fromarray(np.stack([np.full_like(alpha, level)] * 3 + [alpha], axis=-1))


def saved(image: Image.Image | npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def built(tmp_path: Path, files: dict[str, bytes], *overrides: str) -> Dataset:
    for name, content in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settings = [f"source.path={tmp_path / 'set'}", "split.strategy=single", *overrides]
    out = tmp_path / "out"
    animesion.build(animesion.load_recipe("folder", settings), out, workers=1)
    dataset = animesion.open_dataset(out)
    report = verify(dataset, workers=1)
    assert report.clean, report.faults
    return dataset


def rows(dataset: Dataset) -> dict[str, dict[str, Any]]:
    return {row["source_id"]: row for row in dataset.read_table("curated.parquet").to_pylist()}


def payloads(dataset: Dataset) -> dict[str, bytes]:
    names = {row["key"]: row["source_id"] for row in dataset.read_table("curated.parquet").to_pylist()}
    return {names[sample.key]: sample.image for sample in dataset.samples()}


def profile() -> bytes:
    """A profile with the primaries of sRGB and a linear curve: other values for every mid-tone."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(content[128:132], "big")):
        entry = 132 + 12 * i
        if bytes(content[entry : entry + 4]) in {b"rTRC", b"gTRC", b"bTRC"}:
            at = int.from_bytes(content[entry + 4 : entry + 8], "big")
            content[at : at + 12] = b"curv" + bytes(8)  # no entries: linear
    return bytes(content)


def test_classes_of_white_ink_survive(tmp_path: Path) -> None:
    files = {f"{label}/{i}.png": saved(inked(9 * n + i, 255), "PNG") for n, label in enumerate("abc") for i in range(3)}
    files |= {
        f"{label}/empty.png": saved(Image.new("RGBA", (64, 64), (n, 0, 0, 0)), "PNG") for n, label in enumerate("abc")
    }
    found = rows(built(tmp_path, files))
    assert {name for name, row in found.items() if row["kept"]} == {name for name in files if "empty" not in name}
    assert {row["reason"] for name, row in found.items() if "empty" in name} == {"blank"}


def test_deep_images_are_not_duplicates_of_one_another(tmp_path: Path) -> None:
    grey = [drawing(i)[..., 0].astype(np.float64) for i in range(6)]
    files = {
        "a/16.png": saved((grey[0] * 257).astype(np.uint16), "PNG"),
        "a/16.tif": saved((grey[1] * 257).astype(np.uint16), "TIFF"),
        "b/32.tif": saved((grey[2] * 1e6).astype(np.int32), "TIFF"),
        "b/float.tif": saved((grey[3] / 255).astype(np.float32), "TIFF"),
        "b/far.tif": saved((grey[4] * 100 - 7).astype(np.float32), "TIFF"),
        "a/keyed.png": saved((grey[5] * 257).astype(np.uint16), "PNG", transparency=int(grey[5].max()) * 257),
    }
    dataset = built(tmp_path, files, "pack.format=png")
    assert {row["reason"] for row in rows(dataset).values()} == {""}
    for sample in dataset.samples():
        assert np.asarray(sample.decode()).std() > 20


def test_only_a_file_whose_profile_is_srgb_is_copied(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "a/srgb.png": saved(drawing(1), "PNG", icc_profile=srgb),
        "a/other.png": saved(drawing(2), "PNG", icc_profile=profile()),
        "a/cmyk.jpg": saved(Image.fromarray(drawing(3)).convert("CMYK"), "JPEG", icc_profile=profile()),
    }
    packed = payloads(built(tmp_path, files, "pack.format=png"))
    assert packed["a/srgb.png"] == files["a/srgb.png"]
    for name in ("a/other.png", "a/cmyk.jpg"):
        with Image.open(io.BytesIO(packed[name])) as image:
            assert "icc_profile" not in image.info
            assert image.mode == "RGB"
    linear = drawing(2) / 255
    right = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ours = np.asarray(Image.open(io.BytesIO(packed["a/other.png"]))).astype(float)
    assert np.abs(ours - right).max() <= 3


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_what_is_always_encoded_holds_pixels_only(tmp_path: Path, form: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    exif = Image.Exif()
    exif[0x013B] = SECRET.decode()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "png": ("PNG", {"pnginfo": text}),
        "webp": ("WEBP", {"lossless": True, "xmp": b"<x>" + SECRET + b"</x>"}),
        "jpg": ("JPEG", {"comment": SECRET, "quality": 90}),
    }
    files = {
        f"a/{i}.{end}": saved(drawing(i), kind, exif=exif, icc_profile=srgb, **options)
        for i, (end, (kind, options)) in enumerate(kinds.items())
    }
    files |= {f"b/{i}.png": saved(drawing(i), "PNG") for i in (0, 1)}
    overrides = ("pack.keep_original=never", f"pack.format={form}", "duplicates.action=report")
    packed = payloads(built(tmp_path, files, *overrides))
    assert len(packed) == len(files)
    for content in packed.values():
        assert SECRET not in content
        with Image.open(io.BytesIO(content)) as image:
            assert not {"exif", "icc_profile", "comment", "xmp", "Author"} & set(image.info)
    assert packed["a/0.png"] == packed["b/0.png"]
    assert packed["a/1.webp"] == packed["b/1.png"]


def test_damage_and_broken_metadata(tmp_path: Path) -> None:
    whole = [saved(drawing(i), "JPEG", quality=95, progressive=bool(i % 2)) for i in range(6)]
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "node " * 400_000, zip=True)
    big = saved(drawing(9), "PNG", pnginfo=text)
    png = saved(drawing(8), "PNG")
    files = {
        "a/ended.jpg": whole[0][: len(whole[0]) // 2] + b"\xff\xd9",
        "a/ended-progressive.jpg": whole[1][: len(whole[1]) * 3 // 4] + b"\xff\xd9",
        "a/padded.jpg": whole[2][: len(whole[2]) // 2] + bytes(len(whole[2])),
        "a/no-end.jpg": whole[4][:-2],
        "a/no-end-progressive.jpg": whole[5][:-2],
        "a/no-end.png": png[:-12],
        "a/text.png": big,
    }
    dataset = built(tmp_path, files)
    found = {name: row["reason"] for name, row in rows(dataset).items()}
    bad = {"a/ended.jpg", "a/ended-progressive.jpg", "a/padded.jpg"}
    assert found == {name: "truncated image" if name in bad else "" for name in files}
    for name, content in payloads(dataset).items():
        assert content != files[name]  # other readers refuse these bytes
        with Image.open(io.BytesIO(content)) as image:
            image.load()
