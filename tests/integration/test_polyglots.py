"""Files that are two things at once: what a build publishes is what was decoded, and nothing else of the file."""

from __future__ import annotations

import io
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import animesion
from animesion.images import ends
from animesion.schemas import DropReason
from tests.conftest import draw

SCRIPT = b"<html><script>fetch('//evil.invalid/PLANTED')</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="PLANTED()"><image href="http://evil.invalid/x"/></svg>'


def encoded(seed: int, kind: str) -> bytes:
    out = io.BytesIO()
    draw(seed).save(out, kind)
    return out.getvalue()


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as zipped:
            zipped.writestr("PLANTED.py", "print('PLANTED')")
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo("PLANTED.py")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"print"))
    return out.getvalue()


def polyglots() -> dict[str, bytes]:
    """Name -> bytes; names end in what a browser, a shell or a reader of archives would take them for."""
    jpeg, png, gif, webp = (encoded(seed, kind) for seed, kind in enumerate(("JPEG", "PNG", "GIF", "WEBP"), 50))
    script = b"GIF89a" + gif[6:] + b"*/=1;alert('PLANTED')//"
    return {
        "jpeg-html.jpg": jpeg + SCRIPT,
        "jpeg-html.html.jpg": encoded(60, "JPEG") + SCRIPT,
        "gif-js.gif": script,
        "png-zip.png": png + archive("zip"),
        "png-php.png": encoded(61, "PNG") + b"<?php system('PLANTED'); ?>",
        "webp-tar.webp": webp + archive("tar"),
        "jpeg-tar.jpg": encoded(62, "JPEG") + archive("tar"),
        "png-in-jpg.jpg": encoded(63, "PNG") + encoded(64, "JPEG"),
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_end_of_an_image_is_found(kind: str) -> None:
    extension = {"JPEG": "jpg"}.get(kind, kind.lower())
    choices: list[dict[str, Any]] = [{}, {"progressive": True}, {"quality": 5}, {"restart_marker_rows": 1}]
    for seed, options in enumerate(choices):
        out = io.BytesIO()
        draw(seed, 200).save(out, kind, **options)
        whole = out.getvalue()
        for after in (b"", b"\xff\xd9", SCRIPT, archive("zip"), whole, b"\0" * 99):
            assert ends.end_of(whole + after, extension) == len(whole)
        for cut in (1, 2, 9, len(whole) // 2, len(whole) - 3):
            assert ends.end_of(whole[:-cut], extension) == 0
    start = time.process_time()
    for piece in (b"\xff", b"\xff\xda\0\2", b"\xff\xe0\0\2", b"\0\0\0\0IDAT\0\0\0\0"):
        start_of = b"RIFF\xff\xff\xff\x7f" if kind == "WEBP" else whole[:8]
        assert ends.end_of(start_of + piece * 300_000, extension) == 0
    assert time.process_time() - start < 3


REFUSED = {"picture.svg": SVG, "svg-as-png.png": SVG, "script.jpg": b"#!/bin/sh\nPLANTED\n", "page.gif": SCRIPT}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("polyglots")
    for name, content in (polyglots() | REFUSED).items():
        (folder / "set" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "set" / "a" / name).write_bytes(content)
    settings = [f"source.path={folder / 'set'}", "duplicates.copies=off", "duplicates.near=false", "classes.minimum=1"]
    animesion.build(animesion.load_recipe("folder", settings), folder / "out", workers=1)
    return folder / "out"


def test_what_is_published_is_what_was_decoded(built: Path) -> None:
    dataset = animesion.open_dataset(built)
    assert len(dataset) == len(polyglots())
    for sample in dataset.samples():
        image = sample.decode()
        assert image.mode == "RGB"
        assert min(image.size) > 8
    for path in (built / "data").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                assert b"PLANTED" not in content, member.name
                assert member.name.rpartition(".")[2] in {"jpg", "png", "webp", "cls", "txt", "json"}
    for path in built.rglob("*"):
        if path.is_file() and "raw" not in path.parts:  # the originals, as they were found, are for the build alone
            assert b"PLANTED" not in path.read_bytes(), path
    assert not any("raw/" in line for line in (built / "SHA256SUMS").read_text().splitlines())


def test_what_is_no_image_is_dropped(built: Path) -> None:
    rows = {row["source_id"].rpartition("/")[2]: row for row in animesion.open_dataset(built).curated.to_pylist()}
    for name in REFUSED.keys() & rows.keys():
        assert not rows[name]["kept"]
        assert rows[name]["reason"] in (DropReason.NOT_AN_IMAGE, DropReason.UNSUPPORTED_FORMAT), name
    assert "script.jpg" in rows


def test_a_tar_that_is_also_an_image_is_read_as_what_it_is_named(tmp_path: Path) -> None:
    """The header of a tar begins with the name of its first member, which may be the start of a JPEG or a GIF."""
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("GIF89a/1.jpg", encoded(70, "JPEG")), ("GIF89a/2.jpg", encoded(71, "JPEG"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert path.read_bytes().startswith(b"GIF89a")
    recipe = animesion.load_recipe("folder", [f"source.path={path}", "duplicates.near=false", "duplicates.copies=off"])
    animesion.build(recipe, tmp_path / "from-tar", workers=1)
    assert len(animesion.open_dataset(tmp_path / "from-tar")) == 2
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "one.gif").write_bytes(path.read_bytes())
    Image.new("RGB", (40, 40), "red").save(tmp_path / "set" / "a" / "two.png")
    recipe = animesion.load_recipe("folder", [f"source.path={tmp_path / 'set'}", "duplicates.copies=off"])
    animesion.build(recipe, tmp_path / "from-image", workers=1)
    rows = {row["source_id"]: row for row in animesion.open_dataset(tmp_path / "from-image").curated.to_pylist()}
    [broken] = [row for name, row in rows.items() if name.endswith("one.gif")]
    assert not broken["kept"]
