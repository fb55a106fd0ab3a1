"""Parts of paths are those of `PurePosixPath`, for every path."""

from __future__ import annotations

from pathlib import PurePosixPath

import hypothesis
import pytest
from hypothesis import strategies as st

from animesion.dataset.path_parts import parts_of, stem_of, suffix_of


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(st.text(alphabet="a./ -é", max_size=12))
@hypothesis.example("a/b.jpg")
@hypothesis.example("a/b.tar.gz")
@hypothesis.example("..")
def test_parts_are_those_of_pathlib(path: str) -> None:
    pure = PurePosixPath(path)
    assert (parts_of(path), stem_of(path), suffix_of(path)) == (pure.parts, pure.stem, pure.suffix)


def test_a_plain_path_needs_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("animesion.dataset.path_parts.PurePosixPath", None)
    assert parts_of("miku/1.x.jpg") == ("miku", "1.x.jpg")
    assert stem_of("miku/1.x.jpg") == "1.x"
    assert suffix_of("miku/1.x.jpg") == ".jpg"
