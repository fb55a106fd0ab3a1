"""`animesion detect` and `animesion detectors eval` on images whose boxes are known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from animesion.cli.detect import detect
from animesion.cli.detectors import detectors
from animesion.dataset import box_tables
from animesion.errors import UsageError
from tests.cascades import BRIGHT
from tests.unit.test_detectors import square


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images with zero, one and two bright squares, which `lbp` finds; a text and a broken image beside them."""
    monkeypatch.setenv("ANIMESION_DETECTORS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "lbpcascade_animeface.xml").write_bytes(BRIGHT)
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    square(300, 200, 0, 0, 1).save(root / "none.png")
    one = square(300, 200, 60, 60, 30)
    one.save(root / "one.png")
    one.paste(Image.new("RGB", (40, 40), (235, 235, 235)), (200, 100))
    one.save(root / "sub" / "two.png")
    (root / "notes.txt").write_text("hello")
    return root


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(detect, list(map(str, arguments)))


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(detectors, ["eval", *map(str, arguments)])


def test_boxes_are_printed_and_written_in_every_form(world: Path, tmp_path: Path) -> None:
    done = run(world, "--detector", "lbp")
    assert done.exit_code == 0, done.exception
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == ["none.png", "one.png", "sub/two.png"]
    assert [len(line["boxes"]) for line in lines] == [0, 1, 2]
    assert "3 images: 1 without a box, 1 with one, 1 with several" in done.stderr
    assert "1 file is no image" in done.stderr
    left, top, right, bottom = lines[1]["boxes"][0]["box"]
    assert (left + right) / 2 == pytest.approx(75, abs=8)
    assert (top + bottom) / 2 == pytest.approx(75, abs=8)
    for form, out in {"json": "b.json", "csv": "b.csv", "coco": "c.json", "yolo": "yolo"}.items():
        written = run(world, "--detector", "lbp", "--format", form, "--out", tmp_path / out)
        assert written.exit_code == 0, written.exception
        found = box_tables.read(tmp_path / out)
        assert [len(image.boxes) for image in found] == [0, 1, 2]
        # a detector finds all of its own boxes again, by digest or by path
        judged = evaluate(world, "--boxes", tmp_path / out, "--detector", "lbp", "--json")
        assert judged.exit_code == 0, judged.exception or judged.output
        facts = json.loads(judged.stdout)
        assert (facts["images"], facts["rows"][0]["truth"], facts["rows"][0]["found"]) == (3, 3, 3)
        assert facts["rows"][0]["average_precision"] == 1


def test_a_broken_image_is_named_and_the_status_is_one(world: Path) -> None:
    (world / "bad.png").write_bytes((world / "one.png").read_bytes()[:200])
    done = run(world, "--detector", "lbp")
    assert done.exit_code == 1
    assert "bad.png: truncated image" in done.stderr or "bad.png: corrupt image" in done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_comparison_counts_boxes_of_both(world: Path, tmp_path: Path) -> None:
    done = run(world, "--compare", "lbp,center", "--set", "center.share=0.3", "--sheet", tmp_path / "s.png")
    assert done.exit_code == 0, done.exception
    assert "lbp and center: 0 of 6 different boxes are of both (0.0%" in done.stdout
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (3 * 246 + 6, 246 + 28 + 26 + 6)
    facts = json.loads(run(world, "--compare", "lbp,center", "--format", "json").stdout)
    del facts["detectors"][0]["ms_per_image"]
    counts = {"images_without": 1, "images_with_one": 1, "images_with_several": 1}
    assert facts["detectors"][0] == {"name": "lbp", "boxes": 3, **counts}


def test_agreement_of_a_list_is_a_detector_of_its_own(world: Path) -> None:
    done = run(world, "--detector", "lbp,center", "--min-score", "0.5")
    assert [len(json.loads(line)["boxes"]) for line in done.stdout.splitlines()] == [0, 0, 0]
    alone = run(world, "--detector", "lbp,center")
    assert [len(json.loads(line)["boxes"]) for line in alone.stdout.splitlines()] == [1, 2, 3]


def test_html_sheets_hold_no_script_and_escape_names(world: Path, tmp_path: Path) -> None:
    (world / "one.png").rename(world / "<script>alert(1)</script>.png".replace("/", "∕"))
    assert run(world, "--detector", "lbp", "--sheet", tmp_path / "s.html").exit_code == 0
    text = (tmp_path / "s.html").read_text()
    assert "<script" not in text
    assert text.count("<figure>") == 3
    assert text.count("<rect") == 3


def test_evaluation_tells_missed_and_wrong_boxes(world: Path, tmp_path: Path) -> None:
    run(world, "--detector", "lbp", "--format", "csv", "--out", tmp_path / "b.csv")
    lines = (tmp_path / "b.csv").read_text().splitlines()
    # one box of two.png is taken out, one is drawn where nothing is
    lines[-1] = lines[-1].replace(",face,", ",chibi,")
    digest, size = lines[1].split(",")[0], "300,200"
    lines[1] = f"{digest},none.png,{size},10,10,40,40,1,face,cut"
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    arguments: list[str | Path] = [world, "--boxes", tmp_path / "b.csv", "--detector", "lbp"]
    facts = json.loads(evaluate(*arguments, "--ignore", "chibi", "--json", "--sheet", tmp_path / "m.png").stdout)
    row = facts["rows"][0]
    assert (row["truth"], row["found"], row["boxes"], facts["ignored"]) == (3, 2, 2, 1)
    assert row["recall_interval"] == pytest.approx([0.2077, 0.9385], abs=1e-3)
    assert facts["recall_by_kind"] == {"+cut": {"found": 0, "truth": 1}, "face": {"found": 2, "truth": 3}}
    assert (tmp_path / "m.png").is_file()
    text = evaluate(*arguments).output
    assert "all" in text
    assert "chibi" in text
    refused = evaluate(*arguments, "--ignore", "chibo")
    assert "--ignore chibo" in str(refused.exception)
    assert "has chibi, cut, face" in str(refused.exception)


def test_images_without_labels_and_labels_without_images_are_counted(world: Path, tmp_path: Path) -> None:
    run(world / "one.png", "--detector", "lbp", "--format", "csv", "--out", tmp_path / "b.csv")
    done = evaluate(world, "--boxes", tmp_path / "b.csv", "--detector", "lbp")
    assert done.exit_code == 0
    assert "2 images without labels passed over" in done.stderr
    (world / "copy.png").write_bytes((world / "one.png").read_bytes())
    assert (
        "1 image whose entry labels another already"
        in evaluate(world, "--boxes", tmp_path / "b.csv", "--detector", "lbp").stderr
    )
    lost = evaluate(world / "none.png", "--boxes", tmp_path / "b.csv", "--detector", "lbp")
    assert isinstance(lost.exception, UsageError)
    assert "labels none of the images" in str(lost.exception)


def test_labels_of_an_image_that_was_turned_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("file,width,height,left,top,right,bottom\none.png,200,300,10,10,40,40\n")
    refused = evaluate(world, "--boxes", tmp_path / "b.csv", "--detector", "lbp")
    assert "one.png has 300x200 px, but its boxes were drawn on 200x300" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", ""], "--detector names none; there are anime, "),
        (["--detector", "lbp", "--compare", "lbp,center"], "give --detector or --compare"),
        (["--compare", "lbp"], "takes two or more detectors"),
        (["--compare", "lbp,center", "--out", "x"], "takes two or more detectors"),
        (["--detector", "boxes"], "needs the boxes of a source"),
        (["--detector", "lbp", "--format", "yolo"], "give --out DIR"),
        (["--detector", "lbp", "--sheet", "x.pdf"], "ends in .png"),
        (["--detector", "lpb"], "there is no detector 'lpb'"),
        (["--compare", "lbp,center", "--set", "share=1"], "tables by their names"),
    ],
)
def test_wrong_requests_are_one_sentence(world: Path, arguments: list[str], message: str) -> None:
    done = run(world, *arguments)
    assert done.exit_code != 0
    assert message in str(done.exception) + done.stderr


def test_names_that_are_no_text_or_act_on_the_terminal(world: Path, tmp_path: Path) -> None:
    os.rename(os.fsencode(world / "one.png"), os.fsencode(world) + b"/\xff\x1b[31m.png")
    (world / "bad\x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for form in ("csv", "coco"):
        done = run(
            world, "--detector", "lbp", "--format", form, "--out", tmp_path / "b", "--sheet", tmp_path / "s.html"
        )
        assert done.exit_code == 1
        assert "\x1b" not in done.stderr
        assert "bad?[31m.png" in done.stderr
        judged = evaluate(world, "--boxes", tmp_path / "b", "--detector", "lbp", "--json")
        assert json.loads(judged.stdout)["rows"][0]["found"] == 3
