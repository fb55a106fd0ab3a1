"""Raw and feature tables of parts become columns: joined, sorted, few Python objects, thumbnails left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from animesion.errors import UsageError
from animesion.pipeline import columns
from animesion.pipeline.columns import CodedLists, Columns, Texts, crop_of, load_columns
from animesion.schemas import FEATURES, RAW
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

_RAW = {
    "source": "s",
    "order": 0,
    "labels": ["a"],
    "families": [],
    "flags": [],
    "class_order": -1,
    "bytes": 9,
    **dict.fromkeys(("split", "rating", "page_url", "file_url", "licence", "author", "md5", "reason", "detail"), ""),
    "sha256": "d",
    "extension": "jpg",
    "offset": 512,
}
_SEEN = {
    "reason": "",
    "detail": "",
    "width": 40,
    "height": 30,
    "plain": True,
    "pixels_blake3": "p",
    "faces": -1,
    "face": 0,
    "face_score": 0.0,
    "phash": 1,
    "phash_flip": 2,
    "thumbnail": bytes(768),
}


def written(folder: Path, *parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> Columns:
    """The columns of parts: raw rows and feature rows of each."""
    workspace = Workspace(folder)
    for number, (raw, seen) in enumerate(parts):
        rows = [{**_RAW, "source_id": row["key"], "page_url": f"https://x/{row['key']}", **row} for row in raw]
        parquet.write(workspace.path(f"raw/part-{number:05d}.parquet"), parquet.table(rows, RAW))
        features = parquet.table([{**_SEEN, **row} for row in seen], FEATURES)
        parquet.write(workspace.path(f"features/part-{number:05d}.parquet"), features)
    return load_columns(workspace, len(parts))


def test_parts_are_joined_and_sorted(tmp_path: Path) -> None:
    rows = written(
        tmp_path,
        (
            [{"key": "z", "labels": ["b", "a"]}, {"key": "m", "reason": "not found", "detail": "404", "labels": []}],
            [{"key": "z", "crop": [1, 2, 11, 12], "thumbnail": bytes([7]) * 768}],
        ),
        (
            [{"key": "b", "labels": ["c"]}, {"key": "a", "labels": ["a"]}],
            [{"key": "a", "thumbnail": bytes([9]) * 768}, {"key": "b", "reason": "animated", "width": None}],
        ),
    )
    assert rows["key"].to_pylist() == ["a", "b", "m", "z"]
    labels = rows["labels"]
    assert [[labels.names[code] for code in labels.of(i)] for i in range(4)] == [["a"], ["c"], [], ["b", "a"]]
    assert [rows["reason"][i] for i in range(4)] == ["", "", "not found", ""]
    assert [rows["seen_reason"][i] for i in range(4)] == ["", "animated", "", ""]
    assert rows["detail"].to_pylist() == ["", "", "404", ""]
    assert rows["width"].tolist() == [40, 0, 0, 40]
    assert rows["faces"].tolist() == [-1] * 4
    assert [crop_of(rows, i) for i in range(4)] == [None, None, None, (1, 2, 11, 12)]
    assert rows["crop"].tolist() == [[0, 0, 40, 30], [0, 0, 0, 30], [0, 0, 0, 0], [1, 2, 11, 12]]
    assert rows["part"].tolist() == [1, 1, 0, 0]
    assert rows.passed.columns(0, 4)["page_url"].to_pylist() == [f"https://x/{key}" for key in "abmz"]
    assert rows.passed.columns(1, 3)["page_url"].to_pylist() == ["https://x/b", "https://x/m"]
    assert rows.passed.columns(0, 4)["plain"].to_pylist() == [True, True, False, True]


def test_faces_have_keys_that_no_image_has(tmp_path: Path) -> None:
    rows = written(
        tmp_path,
        (
            [{"key": "a"}, {"key": "a-face1"}, {"key": "a-face1_"}],
            [{"key": "a", "face": 2}, {"key": "a", "face": 1}, {"key": "a-face1"}, {"key": "a-face1_"}],
        ),
    )
    assert rows["key"].to_pylist() == ["a-face1", "a-face1_", "a-face1__", "a-face2"]
    assert rows["face"].tolist() == [0, 0, 1, 2]
    assert rows["source_id"].to_pylist() == ["a-face1", "a-face1_", "a", "a"]


def test_the_best_scores_are_of_the_detector_or_of_the_table(tmp_path: Path) -> None:
    def boxes(*scores: float) -> list[dict[str, float]]:
        return [{"left": 0, "top": 0, "right": 1, "bottom": 1, "score": score} for score in scores]

    rows = written(
        tmp_path,
        (
            [{"key": "a", "boxes": boxes(0.25, 0.5, 0.75)}, {"key": "b", "boxes": boxes(0.5)}, {"key": "c"}],
            [{"key": "a"}, {"key": "b", "boxes": []}, {"key": "c", "boxes": boxes(0.5, 0.125)}],
        ),
    )
    assert rows["box_count"].tolist() == [3, 0, 2]
    assert rows["best_score"].tolist() == [0.75, 0, 0.5]
    assert rows["second_score"].tolist() == [0.5, 0, 0.125]
    assert rows["has_table"].tolist() == [True, True, False]


@pytest.mark.parametrize("in_memory", [1 << 28, 0])
def test_thumbnails_are_read_when_they_are_needed(
    tmp_path: Path, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_IN_MEMORY", in_memory)
    keys = [f"k{i * 7 % 10}" for i in range(10)]
    halves = keys[:5], keys[5:]
    rows = written(
        tmp_path,
        *(
            ([{"key": key} for key in half], [{"key": key, "thumbnail": key.encode() * 384} for key in half[::-1]])
            for half in halves
        ),
    )
    chosen = np.array([9, 0, 4, 5, 0])
    found = rows["thumbnail"].read(chosen)
    assert isinstance(found, np.memmap) == (in_memory == 0)
    assert [bytes(row[:2]).decode() for row in found] == ["k9", "k0", "k4", "k5", "k0"]
    assert (found == np.tile(found[:, :2], 384)).all()
    assert rows["thumbnail"].read(np.array([], dtype=np.int64)).shape == (0, 768)
    assert not list(tmp_path.glob("features/*tmp*"))


def test_an_image_without_its_thumbnail_is_refused(tmp_path: Path) -> None:
    rows = written(tmp_path, ([{"key": "a"}], [{"key": "a", "reason": "animated", "thumbnail": None}]))
    with pytest.raises(UsageError, match=r"features/part-00000\.parquet is damaged \(column thumbnail\)"):
        rows["thumbnail"].read(np.array([0]))


def test_lists_are_taken_in_any_order() -> None:
    lists = CodedLists(np.array([0, 1, 1, 2], dtype=np.int32), np.array([2, 2, 3, 4]), ["a", "b", "c"])
    taken = lists.take(np.array([3, 0, 1, 0]))
    assert [taken.of(i) for i in range(4)] == [(2,), (0, 1), (), (0, 1)]
    assert not len(lists.take(np.array([], dtype=np.int64)))


def test_texts_change_in_place() -> None:
    texts = Texts(pa.array(["a", "b", "c"]))
    texts[1] = "x"
    texts[2] = ""
    assert [texts[i] for i in range(3)] == ["a", "x", ""]
    assert texts.texts(1, 3).to_pylist() == ["x", ""]
    assert texts.texts(0, 1).to_pylist() == ["a"]
    assert Texts(2).texts(0, 2).to_pylist() == ["", ""]
