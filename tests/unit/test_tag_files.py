"""The `*_tags.csv` of DAF:re: categories, lists as text, and faults."""

from __future__ import annotations

from pathlib import Path

import pytest

import animesion
from animesion.errors import UsageError
from animesion.sources import tag_files
from animesion.sources.labels import LabelsOptions, LabelsSource
from animesion.sources.published_facts import DAF_RE

HEAD = "id,dir,class_id,tags_cat0,tags_cat3,tags_cat4\n"


def row(general: str, name: str = "0446/332446.jpg") -> str:
    return f'332446,{name},7,"{general}","[\'touhou\']","[\'unlabeled\']"\n'


def test_lists_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "train_tags.csv"
    path.write_text(HEAD + row("['1 girl', \"\"king's, crown\"\", '1 girl', 'a\\'b']") + row("[]", "x/1.jpg"))
    found = tag_files.read(path)
    assert list(found) == ["0446/332446.jpg", "x/1.jpg"]
    assert found["0446/332446.jpg"] == {
        "general": ("1 girl", "king's, crown", "a'b"), "character": (), "copyright": ("touhou",),
    }  # fmt: skip
    assert found["x/1.jpg"]["general"] == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'dir'"),
        ("id,dir,class_id,tags_cat0,tags_cat4\n", "has no column 'tags_cat3'"),
        (HEAD + "1,2\n", "row 2: 2 columns instead of 6"),
        (HEAD + row("solo"), "row 2: 'solo' is not a list such as"),
        (HEAD + row("['solo', __import__('os')]"), "is not an element of a list of tags"),
        (HEAD + row("['solo' 'hat']"), "is not an element"),
        (HEAD + row("['" + "\\\\'" * 30_000 + "]"), "is not an element"),
        (HEAD + row("[]") * 2, "row 3: '0446/332446.jpg' is listed twice"),
    ],
    ids=range(8),
)
def test_faults(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train_tags.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        tag_files.read(path)


def test_label_files_carry_tags_only_if_asked_and_must_have_the_published_counts(tmp_path: Path) -> None:
    for name, post in (("train", 332446), ("test", 1446)):
        (tmp_path / f"{name}.csv").write_text(f"7,0446/{post}.jpg\n")
        (tmp_path / "images" / "0446").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "0446" / f"{post}.jpg").write_bytes(b"x")
        (tmp_path / f"{name}_tags.csv").write_text(HEAD + row("['solo']", f"0446/{post}.jpg"))
    settings = {"labels": str(tmp_path), "images": str(tmp_path / "images"), "set": "daf-re"}
    due = DAF_RE.with_counts(1, {"train": 1, "val": 0, "test": 1}, {})
    source = LabelsSource(LabelsOptions.model_validate(settings), due)
    assert [item.tags for item in source.items()] == [None, None]
    source.with_tags = True
    assert [(item.tags or {})["general"] for item in source.items()] == [("solo",)] * 2
    with pytest.raises(
        UsageError, match="DAF:re is not as published: 1 of 3,263 classes; 1 of 322,947 train images; 0 of"
    ):
        list(LabelsSource(LabelsOptions.model_validate(settings)).items())
    (tmp_path / "test_tags.csv").unlink()
    with pytest.raises(UsageError, match=r"source.tags: .*test_tags.csv not found"):
        list(source.items())


def test_counts_of_daf_re() -> None:
    assert (DAF_RE.classes, DAF_RE.images) == (3263, 463_437)
    assert (
        animesion.load_recipe("daf-re-full-published", ["source.labels=x", "source.images=y"]).source.options["set"]
        == "daf-re"
    )
