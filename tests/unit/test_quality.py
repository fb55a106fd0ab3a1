"""Figures of single images, the limits on them, crops that reach out, and samples that are faces."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

import animesion
from animesion.errors import AnimesionError, UsageError
from animesion.images import codec, hashing, quality
from animesion.report import facts
from animesion.schemas import FEATURES, MEANINGS


def noise(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """Colours in blobs with edges: what no check minds."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def on(ground: tuple[int, int, int], inner: Image.Image, size: tuple[int, int], at: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, ground)
    canvas.paste(inner, at)
    return canvas


def lossy(image: Image.Image, level: int = 80) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=level)
    return out.getvalue()


def page() -> Image.Image:
    """Six drawn panels on white."""
    canvas = Image.new("RGB", (700, 1000), "white")
    for i in range(6):
        left, top = 30 + 330 * (i % 2), 30 + 320 * (i // 2)
        canvas.paste(noise(304, 288, i), (left, top))
    return canvas


def text() -> Image.Image:
    canvas = Image.new("RGB", (600, 800), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(30):
        draw.text((40, 40 + 24 * i), "the quick brown fox jumps over the lazy dog " * 2, fill="black")
    return canvas


LIMITS = {
    "too dark": ("min_light", 50, noise().point(lambda value: value // 8)),
    "too bright": ("max_dark", 200, noise().point(lambda value: 240 + value // 32)),
    "blank": ("min_contrast", 2, Image.new("RGB", (300, 300), (90, 140, 200))),
    "blurred": ("min_sharpness", 20, noise().filter(ImageFilter.GaussianBlur(12))),
    "greyscale": ("min_chroma", 3, noise().convert("L").convert("RGB")),
    "heavy compression": ("min_jpeg_quality", 40, noise()),
    "borders": ("max_border", 0.2, on((0, 0, 0), noise(640, 320), (640, 480), (0, 80))),
    "comic page": ("max_panels", 3, page()),
    "text page": ("max_lines", 12, text()),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_finds_its_own_and_passes_an_ordinary_image(name: str) -> None:
    key, limit, bad = LIMITS[name]
    recipe = animesion.load_recipe("folder", ["source.path=x", f"quality.{key}={limit}"])

    def verdict(image: Image.Image, level: int) -> tuple[str, str]:
        decoded = codec.decode(lossy(image, level), codec.Limits())
        figures = {**quality.measure(decoded.image)._asdict(), "jpeg_quality": decoded.jpeg_quality}
        assert quality.reason(figures, animesion.load_recipe("folder", ["source.path=x"]).quality) == ("", "")
        return quality.reason(figures, recipe.quality)

    assert name in MEANINGS
    reason, detail = verdict(bad, 25 if name == "heavy compression" else 90)
    assert reason == name
    assert detail.split()[0] in FEATURES.names
    assert verdict(noise(), 90) == ("", "")


@pytest.mark.parametrize("level", [1, 10, 35, 50, 75, 90, 95, 99])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(level: int) -> None:
    decoded = codec.decode(lossy(noise(64, 64), level), codec.Limits())
    assert decoded.jpeg_quality == pytest.approx(level, abs=1)


def test_what_is_no_jpeg_has_no_such_quality_and_is_not_dropped_for_it() -> None:
    out = io.BytesIO()
    noise(64, 64).save(out, "PNG")
    decoded = codec.decode(out.getvalue(), codec.Limits())
    recipe = animesion.load_recipe("folder", ["source.path=x", "quality.min_jpeg_quality=90"])
    assert decoded.jpeg_quality == -1
    assert quality.reason({"jpeg_quality": -1}, recipe.quality) == ("", "")
    assert quality.jpeg_quality({0: [1, 2]}) == quality.jpeg_quality({}) == -1


@settings(max_examples=60, deadline=None)
@given(bars=st.tuples(*[st.integers(0, 90)] * 4), ground=st.sampled_from([0, 255]), width=st.sampled_from([200, 1500]))
def test_trimming_finds_the_very_edge_of_the_bars(bars: tuple[int, int, int, int], ground: int, width: int) -> None:
    left, top, right, bottom = bars
    inner = noise(width, 320).point(lambda value: 40 + value // 2)  # unlike both grounds
    whole = on((ground,) * 3, inner, (left + inner.width + right, top + inner.height + bottom), (left, top))
    due = None if not any(bars) else (left, top, left + inner.width, top + inner.height)
    assert quality.trimmed(whole) == due


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 4000), (4000, 2), (513, 511), (1024, 1024)])
def test_any_size_is_measured(size: tuple[int, int]) -> None:
    plain = quality.measure(Image.new("RGB", size, (10, 200, 30)))
    assert (plain.sharpness, plain.contrast, plain.chroma) == (0, 0, 0)
    assert plain.light == plain.dark
    assert quality.trimmed(Image.new("RGB", size)) is None


@pytest.mark.parametrize("size", [(1024, 300), (2049, 1100), (1023, 800)])
def test_the_reduced_copy_is_measured_alike(size: tuple[int, int]) -> None:
    image = noise(*size, 3)
    small = quality.reduced(image)
    assert 512 <= max(small.size) < 1024
    assert quality.reduced(small) is small
    assert quality.measure(small) == quality.measure(image)
    assert hashing.thumbnail(image, small) == hashing.thumbnail(image)
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.int16)
    mine = np.frombuffer(hashing.thumbnail(image), np.uint8).reshape(16, 16, 3)
    assert np.abs(whole - mine).mean() < 1.5  # of grain, the worst there is; images count as alike up to 6


def test_sharpness_and_chroma_are_what_they_are_called() -> None:
    image = noise(113, 96, 3).filter(ImageFilter.GaussianBlur(1))
    found = quality.measure(image)
    grey = np.asarray(image.convert("L")).astype(float)
    inner = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    assert found.sharpness == pytest.approx(inner.var())
    tints = np.asarray(image.convert("YCbCr")).astype(float)[:, :, 1:]
    assert found.chroma == pytest.approx(tints.var(axis=(0, 1)).sum() ** 0.5, rel=0.01)


def test_trim_and_a_detector_are_refused_together() -> None:
    with pytest.raises(UsageError, match="trim"):
        animesion.load_recipe("folder", ["source.path=x", "quality.trim=true", "crop.detector=center"])


# -- crops and samples -------------------------------------------------------------------------------------------------


CORNERS = """
from animesion.schemas import Box


class Corners:
    summary = "two boxes, always: one inside, one at the edge; counts its images in a file"

    def __call__(self, images, given):
        with open(__file__ + ".log", "a") as file:
            file.write("x" * len(images))
        return [[Box(0.0, 0.0, 0.3, 0.4, 0.9), Box(0.4, 0.4, 0.7, 0.8, 0.95)] for _ in images]
"""


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A detector of another package; gives the file that has one letter for each image that it saw."""
    site = tmp_path / "site"
    (site / "corners-1.dist-info").mkdir(parents=True)
    (site / "corners.py").write_text(CORNERS)
    (site / "corners-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: corners\nVersion: 1\n")
    (site / "corners-1.dist-info" / "entry_points.txt").write_text("[animesion.detectors]\ncorners = corners:Corners\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "corners", raising=False)
    return site / "corners.py.log"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(320, 240, i).save(path)
    return tmp_path / "images"


def built(folder: Path, out: Path, *overrides: str, workers: int = 1) -> list[dict[str, Any]]:
    recipe = animesion.load_recipe("folder", [f"source.path='{folder}'", "pack.format=png", *overrides])
    animesion.build(recipe, out=out, workers=workers, replace=True)
    return list(pq.read_table(out / "curated.parquet").to_pylist())


def test_each_face_is_a_sample_and_those_of_an_image_share_its_split(
    corners: Path, folder: Path, tmp_path: Path
) -> None:
    rows = built(folder, tmp_path / "out", "crop.detector=corners", "crop.faces=each", "split.train=50", "split.val=25",
                 "split.test=25")  # fmt: skip
    assert len(rows) == 24
    assert all(row["kept"] for row in rows)
    of_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_source.setdefault(row["source_id"], []).append(row)
    for pair in of_source.values():
        first, second = sorted(pair, key=lambda row: row["key"])
        assert (first["key"][-6:], second["key"]) == ("-face1", first["key"][:-1] + "2")
        assert first["crop"] == [128, 96, 224, 192]  # the surest
        assert second["crop"] == [0, 0, 96, 96]
        assert (first["group"], first["split"], first["sha256"]) == (second["group"], second["split"], second["sha256"])
    dataset = animesion.open_dataset(tmp_path / "out")
    assert len(dataset) == 24
    from animesion.verification.checks import verify

    assert verify(dataset, workers=1).clean


def test_faces_that_were_published_are_known_again_and_counted_in_the_report(
    corners: Path, folder: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    built(folder, old, "crop.detector=corners", "crop.faces=each")
    counted = {each["title"]: sum(each["kept"]) for each in facts.of_dataset(animesion.open_dataset(old))["histograms"]}
    assert counted["sharpness: variance of the Laplacian"] == 24
    noise(320, 240, 99).save(folder / "a" / "new.png")
    again = built(folder, tmp_path / "new", "crop.detector=corners", "crop.faces=each", f"duplicates.against=['{old}']")
    assert [row["reason"] for row in again if not row["kept"]] == ["published duplicate"] * 24
    assert sum(row["kept"] for row in again) == 2


def test_faces_are_the_same_whatever_the_number_of_workers(corners: Path, folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        built(folder, tmp_path / str(workers), "crop.detector=corners", "crop.faces=each", workers=workers)
    for name in ("curated.parquet", "index.parquet", "data/train-00000.tar"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_equal_files_are_duplicates_face_by_face(corners: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "0.png").read_bytes())
    rows = built(folder, tmp_path / "out", "crop.detector=corners", "crop.faces=each")
    dropped = [row for row in rows if not row["kept"]]
    assert [row["reason"] for row in dropped] == ["exact duplicate"] * 2
    assert {row["key"][-6:] for row in dropped} == {"-face1", "-face2"}


def test_the_policy_on_several_faces(corners: Path, folder: Path, tmp_path: Path) -> None:
    rows = built(folder, tmp_path / "out", "crop.detector=corners", "crop.faces=best")
    assert {tuple(row["crop"]) for row in rows if row["kept"]} == {(128, 96, 224, 192)}
    with pytest.raises(AnimesionError, match="no image is left"):
        built(folder, tmp_path / "none", "crop.detector=corners")
    rows = pq.read_table(tmp_path / "none" / "curated.parquet").to_pylist()
    assert {row["reason"] for row in rows} == {"several faces"}


def test_another_margin_asks_no_detector_and_gives_the_same_as_a_fresh_build(
    corners: Path, folder: Path, tmp_path: Path
) -> None:
    keys = ("crop.detector=corners", "crop.faces=best")
    built(folder, tmp_path / "out", *keys)
    assert corners.read_text() == "x" * 12
    again = built(folder, tmp_path / "out", *keys, "crop.margin=0.1")
    assert corners.read_text() == "x" * 12
    fresh = built(folder, tmp_path / "fresh", *keys, "crop.margin=0.1")
    assert corners.read_text() == "x" * 24
    assert again == fresh
    for path in sorted((tmp_path / "fresh" / "data").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "out" / "data" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("outside", "crop", "dropped"),
    [("shift", [0, 0, 144, 144], ""), ("pad", [-48, -48, 144, 144], ""), ("drop", [-48, -48, 144, 144], "cut face")],
)
def test_a_crop_that_reaches_out(
    corners: Path, folder: Path, tmp_path: Path, outside: str, crop: list[int], dropped: str
) -> None:
    rows = built(folder, tmp_path / "out", "crop.detector=corners", "crop.faces=each", "crop.margin=0.5",
                 f"crop.outside={outside}")  # fmt: skip
    rows = [row for row in rows if row["key"].endswith("-face2")]
    assert {tuple(row["crop"]) for row in rows} == {tuple(crop)}
    assert {row["reason"] for row in rows} == {dropped}
    if outside == "pad":
        packed = next(image for image, key in samples(tmp_path / "out") if key.endswith("-face2"))
        assert packed.size == (192, 192)
        assert packed.getpixel((47, 47)) == (0, 0, 0)
        assert packed.crop((48, 48, 192, 192)).getextrema() != ((0, 0),) * 3


def samples(out: Path) -> list[tuple[Image.Image, str]]:
    import tarfile

    found: list[tuple[Image.Image, str]] = []
    for shard in sorted((out / "data").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append((Image.open(io.BytesIO(file.read())), member.name.removesuffix(".png")))
    return found


def test_faces_below_a_share_of_the_image_are_dropped(corners: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AnimesionError, match="no image is left"):
        built(folder, tmp_path / "out", "crop.detector=corners", "crop.faces=best", "crop.min_share=0.13")
    rows = pq.read_table(tmp_path / "out" / "curated.parquet").to_pylist()
    assert {(row["reason"], row["detail"]) for row in rows} == {("small face", "12.00% of the image")}


def test_a_changed_limit_inspects_nothing_again(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (5, 5, 5)).save(folder / "a" / "dark.png")
    rows = built(folder, tmp_path / "out")
    assert all(row["kept"] for row in rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").iterdir()}
    rows = built(folder, tmp_path / "out", "quality.min_light=50")
    assert [(row["reason"], row["detail"]) for row in rows if not row["kept"]] == [("too dark", "light 5")]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").iterdir()} == before


def test_trimmed_bars_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        on((0, 0, 0), noise(320, 192, i + 5).point(lambda v: 40 + v // 2), (320, 240), (0, 24)).save(
            tmp_path / "images" / "a" / f"{i}.png"
        )
    rows = built(tmp_path / "images", tmp_path / "out", "quality.trim=true")
    assert {tuple(row["crop"]) for row in rows} == {(0, 24, 320, 216)}
    assert {image.size for image, _ in samples(tmp_path / "out")} == {(320, 192)}


def test_a_decided_box_replaces_those_of_the_detector_and_asks_it_nothing(
    corners: Path, folder: Path, tmp_path: Path
) -> None:
    """Two boxes everywhere: only images with a decision are kept; taking it back drops them again."""
    out, decisions = tmp_path / "out", tmp_path / "decisions.toml"
    settings = ("crop.detector=corners", "crop.margin=0.1", "split.strategy=single", f"curate.decisions='{decisions}'")
    decisions.write_text("")
    with pytest.raises(AnimesionError, match="no image is left"):
        built(folder, out, *settings)
    asked = len(corners.read_text())
    keys = pq.read_table(out / "curated.parquet")["key"].to_pylist()
    decisions.write_text(
        f"several = ['{keys[2]}']\n[box]\n{keys[0]} = [0.5, 0.25, 0.75, 0.5]\n{keys[1]} = [0, 0, 1, 1]\n"
    )
    rows = {row["key"]: row for row in built(folder, out, *settings)}
    assert [key for key, row in rows.items() if row["kept"]] == keys[:2]
    assert rows[keys[0]]["crop"] == [152, 54, 248, 126]
    assert rows[keys[1]]["crop"] == [0, 0, 320, 240]
    assert rows[keys[2]]["detail"] == "by decision"
    assert len(corners.read_text()) == asked
    boxes = pq.read_table(out / "features" / "part-00000.parquet", columns=["key", "boxes"]).to_pylist()
    assert {len(row["boxes"]) for row in boxes} == {2}  # the detector's, for the report and for the next decision
    fresh = {row["key"]: row for row in built(folder, tmp_path / "fresh", *settings)}
    assert fresh == rows
    decisions.write_text(f"[box]\n{keys[1]} = [0, 0, 1, 1]\n")
    assert [row["key"] for row in built(folder, out, *settings) if row["kept"]] == [keys[1]]
