"""Detectors: the LBP cascade, and the installation of the files that detectors need."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from aiohttp import web
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

import animesion
from animesion import detectors, model_files
from animesion.cli import cli
from animesion.config.recipe import load
from animesion.detectors.matching import overlap
from animesion.errors import UsageError
from animesion.pipeline import inspect
from animesion.schemas import Box
from animesion_sample.faults import local_server
from animesion_sample.scenes import SCENES
from tests.cascades import BRIGHT

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


CONTACT = ("--contact", "tests@example.org")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def install(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["detectors", "install", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of detectors."""
    monkeypatch.setenv("ANIMESION_DETECTORS", str(tmp_path / "detectors"))
    return tmp_path / "detectors"


@pytest.fixture
def cascade(folder: Path) -> Path:
    """A cascade that finds bright squares, where `lbp` looks for its own."""
    folder.mkdir()
    path = folder / "lbpcascade_animeface.xml"
    path.write_bytes(BRIGHT)
    return path


def square(width: int, height: int, left: int, top: int, side: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (20, 20, 20))
    ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=(230, 230, 230))
    return image


@pytest.mark.parametrize("scale", [1, 3, 9], ids=["small", "middle", "above the bound"])
def test_boxes_are_relative_to_the_image_whatever_its_size(cascade: Path, scale: int) -> None:
    """The window is three times the square; the longest side is 400, 1,200 and 3,600 px."""
    image = square(400 * scale, 300 * scale, 200 * scale, 120 * scale, 40 * scale)
    [[best, *_], none] = detectors.load("lbp")([image, square(400, 300, 0, 0, 1)], [None, None])
    assert overlap(best, Box(0.4, 80 / 300, 0.7, 200 / 300, 1.0)) > 0.6
    assert 0.5 <= best.score <= 1
    assert none == []


@pytest.mark.parametrize("size", [(1, 1), (23, 400), (24, 24), (5000, 30)])
def test_images_of_any_size_are_searched(cascade: Path, size: tuple[int, int]) -> None:
    [found] = detectors.load("lbp")([Image.new("RGB", size, (90, 90, 90))], [None])
    assert found == []


def test_a_missing_cascade_is_one_sentence_with_the_command_that_installs_it(folder: Path) -> None:
    with pytest.raises(
        UsageError, match=r"lbpcascade_animeface\.xml, which is not installed; install it with: animesion"
    ):
        detectors.load("lbp")
    listed = " ".join(CliRunner().invoke(cli, ["detectors"]).output.split())
    assert "lbp missing" in listed
    assert "animesion detectors install lbp --from FILE|URL" in listed
    assert "none ready" in listed


def test_a_file_is_installed_when_its_digest_is_the_one_that_was_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.xml").write_bytes(BRIGHT)
    refused = install("lbp", "--from", str(tmp_path / "mine.xml"))
    assert isinstance(refused.exception, UsageError)
    assert digest(BRIGHT) in str(refused.exception)
    assert not folder.exists()
    done = install("lbp", "--from", str(tmp_path / "mine.xml"), "--sha256", digest(BRIGHT).upper())
    assert done.exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["lbpcascade_animeface.xml"]
    assert "lbp ready" in " ".join(CliRunner().invoke(cli, ["detectors"]).output.split())
    assert model_files.path_of("lbp").read_bytes() == BRIGHT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BRIGHT.replace(b"<opencv", b"<!DOCTYPE x [<!ENTITY a 'b'>]><opencv", 1), "declares a document type"),
        (BRIGHT[: len(BRIGHT) // 2], "is not an OpenCV cascade"),
        (b"\xff\xd8\xff\xe0 no XML", "is not an OpenCV cascade"),
        (b"<opencv_storage><model/></opencv_storage>", "it holds <opencv_storage><model>"),
        (BRIGHT.replace(b"<height>24</height>", b""), "not a cascade that OpenCV can read"),
        (b" " * (8 << 20) + BRIGHT, "more than 8,388,608 bytes"),
    ],
    ids=["doctype", "truncated", "image", "other", "broken", "large"],
)
def test_what_is_no_cascade_is_refused_though_its_digest_was_given(
    folder: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "bad.xml").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        model_files.install("lbp", str(tmp_path / "bad.xml"), digest(content))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("none", "x.xml", "the detector 'none' needs no file; those that do: lbp"),
        ("lbp", "absent.xml", "absent.xml cannot be read: no such file"),
        ("lbp", "/", "cannot be read: is a directory"),
        ("lbp", "https://example.org/x.xml", "needs --contact"),
        ("lbp", "http://example.org/x.xml", "over https only"),
        ("lbp", "ftp://example.org/x.xml", "over https only"),
        ("lbp", "https://[x.xml", "is not a URL"),
        ("onnx", "https://example.org/x.onnx", "needs --sha256"),
    ],
)
def test_wrong_sources_are_one_sentence(folder: Path, name: str, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_files.install(name, source)
    assert not folder.exists()


def test_a_digest_that_is_none_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(UsageError, match="--sha256 takes the 64 hexadecimal digits"):
        model_files.install("lbp", "absent.xml", "9376")


def test_a_cascade_that_hangs_opencv_or_kills_it_is_not_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.xml").write_bytes(BRIGHT)
    monkeypatch.setattr(model_files, "_TRIAL_SECONDS", 0.01)
    with pytest.raises(UsageError, match="one image took more than"):
        model_files.install("lbp", str(tmp_path / "mine.xml"), digest(BRIGHT))
    monkeypatch.setattr(model_files, "_TRIAL_SECONDS", 60)
    monkeypatch.setattr(model_files, "_TRIAL_BYTES", 64 << 20)  # too little to load OpenCV
    with pytest.raises(UsageError, match=r"cannot be used: cv2 failed on it|needs OpenCV"):
        model_files.install("lbp", str(tmp_path / "mine.xml"), digest(BRIGHT))
    assert not folder.exists()


def test_lbp_takes_no_options_and_its_identity_is_the_digest_of_the_file(cascade: Path) -> None:
    with pytest.raises(UsageError, match="'lbp' takes no options, so not 'score'"):
        detectors.load("lbp", {"score": 0.3})
    assert detectors.identity("none") == ""
    assert detectors.identity("lbp") == digest(BRIGHT)
    cascade.write_bytes(BRIGHT + b"\n")
    assert detectors.identity("lbp") == digest(BRIGHT + b"\n")


def test_a_build_makes_a_detector_once_for_all_parts_of_a_process(cascade: Path) -> None:
    recipe = load("folder", ["source.path=x", "crop.detector=lbp"])
    first = inspect._detector(recipe)
    assert inspect._detector(recipe) is first
    cascade.write_bytes(BRIGHT + b"\n")  # another file may give other boxes
    assert inspect._detector(recipe) is not first


@pytest.mark.parametrize("content", [b"", b"no XML", BRIGHT.replace(b"<height>24</height>", b"")])
def test_a_file_that_was_spoilt_after_it_was_installed_is_one_sentence(cascade: Path, content: bytes) -> None:
    cascade.write_bytes(content)
    with pytest.raises(UsageError, match="not a cascade that OpenCV can read; install it with"):
        detectors.load("lbp")


def test_a_url_is_fetched_and_checked(folder: Path) -> None:
    def application() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            return web.Response(body=BRIGHT, content_type="text/xml")

        app = web.Application()
        app.router.add_get("/cascade.xml", file)
        return app

    with local_server(application) as server:
        url = server.url("/cascade.xml")
        done = install("lbp", "--from", url, "--sha256", digest(BRIGHT), "--allow-private", *CONTACT)
        private = install("lbp", "--from", "https://127.0.0.1:9/x.xml", *CONTACT)
        absent = install(
            "lbp", "--from", server.url("/no.xml"), "--sha256", digest(BRIGHT), "--allow-private", *CONTACT
        )
    assert done.exit_code == 0
    assert (folder / "lbpcascade_animeface.xml").read_bytes() == BRIGHT
    assert "127.0.0.1: unsafe address" in str(private.exception)
    assert "127.0.0.1: not found HTTP 404" in str(absent.exception)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real faces and the real cascade of ../shared")
def test_the_real_cascade_finds_real_faces_on_drawn_grounds(folder: Path) -> None:
    """The faces are cut tightly, which costs the cascade half of them."""
    model_files.install("lbp", str(SHARED / "lbpcascade_animeface.xml"))
    detector = detectors.load("lbp")
    rng = np.random.default_rng(0)
    found = wrong = 0
    with tarfile.open(SHARED / "holo-faces" / "faces-train-128.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        for number in rng.choice(len(members), 60, replace=False):
            file = tar.extractfile(members[number])
            assert file is not None
            ground = Random(int(number))
            image = SCENES[ground.choice(sorted(SCENES))]((640, 480), ground).convert("RGB")
            side = int(rng.integers(100, 240))
            left, top = int(rng.integers(0, 640 - side)), int(rng.integers(0, 480 - side))
            with Image.open(io.BytesIO(file.read())) as face:
                image.paste(face.convert("RGB").resize((side, side)), (left, top))
            truth = Box(left / 640, top / 480, (left + side) / 640, (top + side) / 480, 1.0)
            [boxes] = detector([image], [None])
            hits = sum(overlap(box, truth) >= 0.5 for box in boxes)
            found += hits > 0
            wrong += len(boxes) - hits
    assert found >= 18
    assert wrong <= 4


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("lpb", "there is no detector 'lpb'"),
        ("lbp", "which is not installed"),
        ("['center', 'lbp']", "which is not installed"),
        ("onnx:absent.onnx", "file not found: absent.onnx"),
    ],
)
def test_a_detector_that_is_not_ready_is_found_before_anything_is_fetched(
    folder: Path, tmp_path: Path, detector: str, message: str
) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    recipe = load("folder", [f"source.path='{tmp_path / 'images'}'", f"crop.detector={detector}"])
    with pytest.raises(UsageError, match=message):
        animesion.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
