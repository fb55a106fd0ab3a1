"""Filters of images in `animesion browse`, and the polygons that are drawn on its map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from animesion.errors import UsageError
from animesion.report.images import COLUMNS, Rows
from animesion.report.selection import Filter, SavedFilters, inside_polygon, matching
from animesion.schemas import CURATED


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Four images: two kept of `Miku` and `rin`, a near duplicate of `Miku`, one that could not be read."""
    values = {
        "key": ["a-1", "a-2", "b-1", "b-2"],
        "kept": [True, True, False, False],
        "reason": ["", "", "near duplicate", "not an image"],
        "label": ["Miku", "rin", "Miku", ""],
        "split": ["train", "test", "", ""],
        "source_id": ["x/ONE.png", "x/two.png", "y/1.png", "y/2.png"],
    }
    blank = {name: [None] * 4 for name in COLUMNS}
    return Rows(pa.table({name: pa.array((blank | values)[name], CURATED.field(name).type) for name in COLUMNS}))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, [0, 1]),
        ({"status": "all"}, [0, 1, 2, 3]),
        ({"status": "dropped"}, [2, 3]),
        ({"status": "near duplicate"}, [2]),
        ({"status": "no such reason"}, []),
        ({"split": "test"}, [1]),
        ({"status": "all", "label": "Miku"}, [0, 2]),
        ({"status": "all", "label": "miku"}, []),  # a label is given in full
        ({"status": "all", "text": "miku"}, [0, 2]),
        ({"text": "one.PNG"}, [0]),
        ({"status": "all", "text": "b-"}, [2, 3]),
        ({"text": "."}, [0, 1]),  # plain text, not a pattern
        ({"status": "all", "decided": "yes"}, [1, 3]),
        ({"status": "all", "decided": "no", "label": "Miku"}, [0, 2]),
        ({"status": "all", "area": "0,0 0.5,0 0.5,1 0,1"}, [0, 2]),
        ({"offset": "7", "more": "x"}, [0, 1]),
    ],
)
def test_a_filter_accepts_what_all_of_its_values_do(rows: Rows, query: dict[str, str], found: list[int]) -> None:
    at = np.array([[0.2, 0.5], [0.8, 0.5], [0.4, 0.9], [np.nan, np.nan]], dtype=np.float32)
    assert matching(rows, Filter.of(query), {"a-2", "b-2", "unknown"}, at).tolist() == found


def test_a_polygon_is_even_odd() -> None:
    points = np.array([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9], [0.5, 0.9], [np.nan, 0.5]], dtype=np.float32)
    square = [(0.0, 0.0), (0.6, 0.0), (0.6, 0.6), (0.0, 0.6)]
    assert inside_polygon(points, square).tolist() == [True, True, False, False, False]
    # a notch from below reaches the middle of the square
    notched = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.4), (0.0, 1.0)]
    assert inside_polygon(points, notched).tolist() == [True, False, False, False, False]
    # a curve that goes round twice leaves its inner part out
    twice = [*square, (0.0, 0.0), (0.6, 0.0), (0.6, 0.6), (0.0, 0.6)]
    assert not inside_polygon(points, twice).any()


@pytest.mark.parametrize(
    "query",
    [
        {"area": "0,0 1,1"},
        {"area": "0,0 1,1 x,1"},
        {"area": "0,0 1,1 nan,1"},
        {"area": "0,0 1,1 1e9,1"},
        {"area": "0,0 1,1 1,1,1"},
        {"area": " ".join(["0,0"] * 401)},
        {"decided": "perhaps"},
        {"text": "x" * 501},
    ],
)
def test_a_strange_filter_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"area|decided|text"):
        Filter.of(query)


def test_saved_filters_come_back(tmp_path: Path) -> None:
    path = tmp_path / "filters.toml"
    assert SavedFilters.read(path).filters == {}
    filters = {"dark ones": "area=0%2C0+1%2C0+1%2C1", '初音 "ミク"': "label=%E5%88%9D"}
    SavedFilters(filters=filters).write(path)
    assert SavedFilters.read(path).filters == filters
    path.write_text("filters = 3\n")
    with pytest.raises(UsageError, match="filters"):
        SavedFilters.read(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        SavedFilters.read(path)
