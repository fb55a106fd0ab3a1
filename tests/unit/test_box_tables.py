"""Files of boxes: what is written is read back, and what has no clear meaning is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion.dataset import box_files, box_tables
from animesion.dataset.box_tables import ImageBoxes, KindBox
from animesion.errors import UsageError
from animesion.schemas import Box

DIGEST = "0123456789abcdef" * 4


def kind_box(left: int, top: int, wide: int, tall: int, score: int, kind: str, flags: tuple[str, ...]) -> KindBox:
    return KindBox(Box(left / 100, top / 80, (left + wide) / 100, (top + tall) / 80, score / 100), kind, flags)


BOXES = st.lists(
    st.builds(
        kind_box,
        st.integers(0, 60),
        st.integers(0, 40),
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(0, 100),
        st.sampled_from(["face", "=HYPERLINK(1)", "頭", "a,b"]),
        st.sampled_from([(), ("cut",), ("cut", "covered")]),
    ),
    max_size=4,
)


def images(boxes: list[list[KindBox]]) -> list[ImageBoxes]:
    return [ImageBoxes(f"a b/é {i}.jpg", f"{i:064x}", 100, 80, tuple(of_image)) for i, of_image in enumerate(boxes)]


def equal(found: list[ImageBoxes], expected: list[ImageBoxes], *, size: bool = True) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if size:
            assert (one.file, one.sha256, one.width, one.height) == (
                other.file,
                other.sha256,
                other.width,
                other.height,
            )
        assert [each.kind for each in one.boxes] == [each.kind for each in other.boxes]
        for a, b in zip(one.boxes, other.boxes, strict=True):
            assert a.box == pytest.approx(b.box, abs=1e-4)


@pytest.mark.parametrize("form", ["json", "csv", "coco"])
@settings(deadline=None, max_examples=40)
@given(boxes=st.lists(BOXES, min_size=1, max_size=3))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, form: str, boxes: Any) -> None:
    path = tmp_path_factory.mktemp("t") / ("boxes.csv" if form == "csv" else "boxes.json")
    path.write_text(box_tables.text(images(boxes), form), encoding="utf-8")
    found = box_tables.read(path)
    equal(found, images(boxes))
    assert [each.flags for image in found for each in image.boxes] == [each.flags for of in boxes for each in of]


def test_yolo_is_read_back_and_recognised(tmp_path: Path) -> None:
    made = images([[kind_box(10, 20, 30, 40, 90, "face", ()), kind_box(1, 2, 3, 4, 50, "頭", ())], []])
    box_tables.write_yolo(made, tmp_path)
    found = box_tables.read(tmp_path)
    equal(found, made, size=False)
    assert [image.file for image in found] == ["a b/é 0", "a b/é 1"]
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    known = box_files.find(
        [f"images/{image.file}" for image in made],
        paths,
        lambda names: [(tmp_path / name).read_bytes() for name in names],
    )
    assert known is not None
    assert known.kind == "YOLO"


def test_cocos_file_is_recognised_beside_images(tmp_path: Path) -> None:
    made = images([[kind_box(10, 20, 30, 40, 90, "face", ())]])
    text = box_tables.text(made, "coco").encode()
    known = box_files.find([made[0].file], ["annotations.json"], lambda names: [text for _ in names])
    assert known == box_files.BoxFiles("COCO", "annotations.json")
    document = json.loads(text)
    assert document["annotations"][0]["bbox"] == [10, 20, 30, 40]
    assert document["annotations"][0]["area"] == 1200


def test_a_table_of_labels_needs_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(
        "sha256,file,width,height,left,top,right,bottom,kind,flags\n"
        f"{DIGEST.upper()},x/1.jpg,200,100,20,10,60,51,face,cut;covered\n"
        f"{DIGEST},x/1.jpg,200,100,-1,90,30,101,face,\n"
        f"{'f' * 64},x/2.jpg,200,100,,,,,,\n"
    )
    first, second = box_tables.read(path)
    assert [each.box for each in first.boxes] == [Box(0.1, 0.1, 0.3, 0.51, 1.0), Box(0.0, 0.9, 0.15, 1.0, 1.0)]
    assert first.boxes[0].flags == ("cut", "covered")
    assert second == ImageBoxes("x/2.jpg", "f" * 64, 200, 100)


HEAD = "file,width,height,left,top,right,bottom,score\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.csv", "file,left,top,right,bottom\n", "has no column width, height"),
        ("b.csv", "width,height,left,top,right,bottom\n", "has no column sha256 or file"),
        ("b.csv", f"{HEAD}a.jpg,100,80,10,10,5,20,1\n", "row 2: the box 10, 10, 5, 20 has no area"),
        ("b.csv", f"{HEAD}a.jpg,100,80,10,10,500,20,1\n", "reaches out of its image of 100x80"),
        ("b.csv", f"{HEAD}a.jpg,100,80,10,10,50,nan,1\n", "'nan' where a number is expected"),
        ("b.csv", f"{HEAD}a.jpg,100,80,10,10,50,,1\n", "'' where a number is expected"),
        ("b.csv", f"{HEAD}a.jpg,100,80,10,10,50,20,7\n", "the score 7 is not from 0 to 1"),
        ("b.csv", f"{HEAD}a.jpg,0,80,10,10,50,20,1\n", "width is a whole number from 1, not '0'"),
        ("b.csv", f"{HEAD}a.jpg,100,80,,,,,\na.jpg,100,90,1,1,9,9,1\n", "has 100x90 px here and 100x80 before"),
        ("b.csv", f"sha256,{HEAD}12,a.jpg,100,80,,,,,\n", "a SHA-256 has 64 hexadecimal digits, not '12'"),
        ("b.json", "[1]", "image 1 has no list 'boxes'"),
        ("b.json", '{"images": [{"id": 1, "width": 9, "height": 9}, {"id": 1}]}', "ids of images are different"),
        ("b.json", '{"images": [], "annotations": [{"id": 4, "image_id": 7}]}', "annotation 4 belongs to no image"),
        ("b.json", '{"a": 1}', "has neither images with boxes"),
        ("b.json", "[" * 100_000, "neither JSON nor lines of JSON"),
        (
            "b.json",
            '{"file": "a", "width": 9, "height": 9, "boxes": [{"box": [1, 2, 3]}]}',
            "a box needs 'box' with left",
        ),
        ("b.json", '{"file": "a", "width": true, "height": 9, "boxes": []}', "width is a whole number"),
    ],
)
def test_what_has_no_clear_meaning_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        box_tables.read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2\n", "line 1: a box of YOLO is a class and four numbers, not 4 columns"),
        ("0 120 80 40 40\n", "has no area inside its image"),
        ("0 0.9 0.5 0.4 0.2\n", "reaches out of its image"),
        ("3 0.5 0.5 0.2 0.2\n", "class 3 is not among the 1 of classes.txt"),
        ("x 0.5 0.5 0.2 0.2\n", "class is a whole number from 0"),
    ],
)
def test_wrong_label_files_of_yolo_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "classes.txt").write_text("face\n")
    with pytest.raises(UsageError, match=message):
        box_tables.read(tmp_path)


def test_yolo_refuses_files_that_would_meet_or_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two images share the label file"):
        box_tables.write_yolo([ImageBoxes("a.jpg"), ImageBoxes("a.png")], tmp_path)
    for name in ("../a.jpg", "/a.jpg"):
        with pytest.raises(UsageError, match="outside the folder"):
            box_tables.write_yolo([ImageBoxes(name)], tmp_path)
    with pytest.raises(UsageError, match="no label files of YOLO"):
        box_tables.read(tmp_path)
