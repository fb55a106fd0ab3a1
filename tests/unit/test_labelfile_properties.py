"""Properties of the label-file readers: harmless variations are read back, anything else is one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from animesion.dataset.label_files import label_file, read_annotations, read_class_names, read_labels
from animesion.errors import UsageError
from animesion.sources.image_root import ImageRoot
from animesion.sources.labels import danbooru_id

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_NAMES = st.text(
    st.characters(exclude_categories=("C", "Z"), exclude_characters='\\,"/'), min_size=1, max_size=20
)  # neither blanks nor separators
ROWS = st.lists(st.tuples(st.integers(0, 999_999_999), st.builds("{}/{}.png".format, _NAMES, _NAMES)), max_size=12)


@quick
@given(ROWS, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_rows_are_read_back_in_every_harmless_form(
    tmp_path: Path, rows: Sequence[tuple[int, str]], header: bool, mark: bool, crlf: bool, backslash: bool
) -> None:
    lines = ["class_id,dir"] * header
    lines += [f"{number},{path.replace('/', chr(92)) if backslash else path}" for number, path in rows]
    file = tmp_path / "train.csv"
    text = "".join(line + ("\r\n" if crlf else "\n") for line in lines)
    file.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    table = read_labels(file)
    assert list(zip(table.class_ids.tolist(), table.paths, strict=True)) == list(rows)


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_one_sentence_with_file_and_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(content)
    for read in (read_labels, read_class_names, lambda path: read_annotations(path.read_bytes(), str(path))):
        try:
            read(file)
        except UsageError as error:
            message = str(error)
        else:
            continue
        # what is wrong with the whole file, such as its encoding, has no line
        assert message.startswith((f"{file}, line ", f"{file} is "))
        assert "\n" not in message


@quick
@given(
    st.lists(st.tuples(st.builds("{} {}.png".format, _NAMES, _NAMES), st.integers(1, 999_999_999)), max_size=12),
    st.sampled_from([" ", "\t", "   "]),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_annotations_are_read_back(rows: Sequence[tuple[str, int]], blank: str, end: str) -> None:
    content = "".join(f"{name}{blank}{number}{end}" for name, number in rows).encode()
    assert read_annotations(content, "train.txt") == list(rows)


@pytest.mark.parametrize(
    ("name", "due"),
    [
        ("train.csv", ("train", "")),
        ("train_val.csv", ("train_val", "")),
        ("test_R6.csv", ("test", "R6")),
        ("train_R1.csv.csv", ("train", "R1")),
        ("train_val_R3.csv.csv", ("train_val", "R3")),
        ("train_val_4.csv", ("train_val", "4")),
        ("training.csv", None),
        ("train_R7.csv", None),
        ("train.csv.csv.csv", None),
        ("classid_classname.csv", None),
    ],
)
def test_names_of_label_files(name: str, due: tuple[str, str] | None) -> None:
    assert label_file(name) == due


@quick
@given(st.integers(1, 9_999_999), st.booleans(), st.booleans())
def test_buckets_of_three_and_of_four_digits_are_one(
    tmp_path: Path, post: int, short: bool, queried_short: bool
) -> None:
    folder, queried = (f"{post % 1000:0{3 if form else 4}d}" for form in (short, queried_short))
    file = tmp_path / folder / f"{post}.jpg"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    root = ImageRoot(str(tmp_path), "source.images")
    facts, failure = root.locate(f"{queried}/{post}.jpg")
    assert failure == ""
    assert tmp_path / facts["path"] in (file, tmp_path / queried / f"{post}.jpg")
    assert [payload.content for payload in root.read([facts], 10)] == [b"x"]
    assert danbooru_id(f"{queried}/{post}.jpg") == str(post)
