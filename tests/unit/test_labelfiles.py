from __future__ import annotations

from pathlib import Path

import pytest

from animesion.dataset.label_files import (
    FaceBoxes,
    count_classes,
    find_label_files,
    post_id,
    read_class_counts,
    read_class_names,
    read_faces,
    read_labels,
    read_tag_ids,
)
from animesion.errors import UsageError
from animesion.schemas import Box

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "daf-re"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published DAF:re files are not on this machine"
)


def write(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "3,0001/1001.jpg\n0,0002/2.jpg\n",
        "class_id,dir\n3,0001/1001.jpg\n0,0002/2.jpg",
        "\ufeffclass_id,dir\r\n3,0001\\1001.jpg\r\n0,0002/2.jpg\r\n",
        '\ufeff 3 ,0001/1001.jpg\r\n\r\n0,"0002/2.jpg"\r\n\r\n',
        "3;0001/1001.jpg\n0;0002/2.jpg\n",
        "3\t0001/1001.jpg\n0\t0002/2.jpg\n",
        "3, 0001/1001.jpg \n0, 0002/2.jpg\n",
        '3, "0001/1001.jpg"\n0, "0002/2.jpg"\n',
        "path,label\n0001/1001.jpg,3\n0002/2.jpg,0\n",
        ",Class ID,File Name,split\n0,3,0001/1001.jpg,a\n1,0,0002/2.jpg,b\n",
        "class_id,whatever\n3,0001/1001.jpg\n0,0002/2.jpg\n",
        "class_id,dir\n3,0001/1001.jpg\n0,0002/2.jpg\n".encode("utf-16"),
        "class_id,dir\n3,0001/1001.jpg\n0,0002/2.jpg\n".encode("utf-16-le"),
    ],
)
def test_labels_in_every_harmless_form(tmp_path: Path, content: str | bytes) -> None:
    table = read_labels(write(tmp_path, content))
    assert table.class_ids.tolist() == [3, 0]
    assert table.paths == ["0001/1001.jpg", "0002/2.jpg"]
    assert table.counts() == {0: 1, 3: 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp932", "euc_jp"])
def test_label_files_in_legacy_encodings(tmp_path: Path, encoding: str) -> None:
    data = "class_id,dir\n3,ミク/初音.jpg\n0,リン/鏡音.jpg\n".encode(encoding)
    assert read_labels(write(tmp_path, data)).paths == ["ミク/初音.jpg", "リン/鏡音.jpg"]


def test_separators_and_characters_of_a_path_stay(tmp_path: Path) -> None:
    path = "a;b/Kla\u0308rchen|1.jpg"
    assert read_labels(write(tmp_path, f"3,{path}\n")).paths == [path]
    assert read_labels(write(tmp_path, "3;a,b.jpg\n")).paths == ["a,b.jpg"]


def test_an_empty_label_file_has_no_rows(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "")).counts() == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0,a.jpg\n1\n", "line 2: 1 column instead"),
        ("0,a.jpg\n1,b.jpg,c\n", "line 2: 3 columns instead"),
        ("dir,class_id\n0,a.jpg\n", "line 2: the class id 'a.jpg'"),
        ("dir,klass\n0,a.jpg\n", "line 1: the class id 'dir'"),
        ("class_id,dir,split\n0,a.jpg\n", "line 2: 2 columns instead of `class_id,dir,split`"),
        (b"PK\3\4" + bytes(30), "is a workbook or zip, not a text table: save the sheet as CSV"),
        (b"0,a.jpg\n1,\xd0\xe0\xe2.jpg\n2,\xe5\x0a", "line 2: the text may be cp"),
        ("class_id,dir\nclass_id,dir\n", "line 2: the class id 'class_id'"),
        ("0,a.jpg\n-1,b.jpg\n", "line 2: the class id '-1'"),
        ("1.0,b.jpg\n", "line 1: the class id '1.0'"),
        ("٣,b.jpg\n", "line 1: the class id"),
        ("99999999999999999999,b.jpg\n", "line 1: the class id"),
        ("0,a.jpg\n\n1, \n", "line 3: the path is empty"),
        (b"0,a.jpg\n1,\xff\xfe.jpg\n", "line 2: the text may be cp"),
        ("0,a.jpg\n1,é.jpg\n".encode() + b"2,\xff.jpg\n", "line 3: not UTF-8"),
        (b"0,a.jpg\n1,b\0.jpg\n", "line 2: a zero byte"),
        ('0,a.jpg\n1,"b.jpg\n2,c.jpg\n', "not a row of"),
    ],
)
def test_wrong_label_rows_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UsageError, match=message) as caught:
        read_labels(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    for reader in (read_labels, read_class_names, read_class_counts, read_tag_ids):
        with pytest.raises(UsageError, match="cannot be read"):
            reader(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_faces(tmp_path / "none.tsv"))


@pytest.mark.parametrize("header", ["", "class_id,class_name\n", "class_id,name\r\n", "label,class\n"])
def test_class_names_keep_file_order(tmp_path: Path, header: str) -> None:
    names = read_class_names(write(tmp_path, header + '2,b\n0,"a, the first"\n'))
    assert list(names.items()) == [(2, "b"), (0, "a, the first")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("0,a\n0,b\n", "line 2: class id 0 occurs twice"), ("0,\n", "line 1: class 0 has no name"), ("0\n", "1 column")],
)
def test_wrong_class_names(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_class_names(write(tmp_path, content))


def test_class_counts_with_any_splits(tmp_path: Path) -> None:
    counts = read_class_counts(write(tmp_path, "class_id,name,train,holdout,total\r\n4,d,3,1,4\r\n2,b,0,0,0\r\n"))
    assert (counts.ids.tolist(), counts.names, counts.total.tolist()) == ([4, 2], ("d", "b"), [4, 0])
    assert {name: sizes.tolist() for name, sizes in counts.splits.items()} == {"train": [3, 0], "holdout": [1, 0]}
    assert counts.differing(counts.total, {4: 4}) == 0
    assert counts.differing(counts.total, {4: 3, 2: 1, 9: 1}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: the header"),
        ("0,a,1,1\n", "line 1: the header"),
        ("class_id,name,train,train,total\n", "line 1: the header"),
        ("class_id,name,train,total\n0,a,1\n", "line 2: 3 columns"),
        ("class_id,name,train,total\n0,a,x,1\n", "line 2: the train count 'x'"),
        ("class_id,name,train,total\n0,a,1,2\n", "line 2: the total 2 is not the sum"),
        ("class_id,name,train,total\n0,a,1,1\n0,b,1,1\n", "line 3: class id 0 occurs twice"),
    ],
)
def test_wrong_class_counts(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_class_counts(write(tmp_path, content))


def test_counting_takes_the_class_map_over_what_occurs() -> None:
    counts = count_classes({"train": {5: 2, 1: 3}, "val": {1: 1}}, {0: "zero", 1: "one"})
    assert (counts.ids.tolist(), counts.names, counts.total.tolist()) == ([0, 1, 5], ("zero", "one", "5"), [0, 4, 2])


def test_label_files_are_found_by_name(tmp_path: Path) -> None:
    for name in ("test.csv", "train.csv", "classid_classname.csv", "per_class_counts.csv", "b.csv", "a.csv", "x.txt"):
        write(tmp_path, "", name)
    found = find_label_files(tmp_path)
    assert list(found.labels) == ["train", "test"]
    assert found.names == tmp_path / "classid_classname.csv"
    assert found.counts == tmp_path / "per_class_counts.csv"
    assert [p.name for p in found.others] == ["a.csv", "b.csv"]
    with pytest.raises(UsageError, match="cannot be listed"):
        find_label_files(tmp_path / "none")


def test_tag_ids(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeffmiyu_(vampire)\t0\r\n"quoted\t1\nline\u2028separator\t2')
    assert read_tag_ids(path) == {"miyu_(vampire)": 0, '"quoted': 1, "line\u2028separator": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\t0\nb 1\n", "line 2: 1 column"),
        ("a\tx\n", "line 1: the tag id 'x'"),
        ("a\t0\na\t1\n", "line 2: the tag 'a' occurs twice"),
        ("a\t0\nb\t0\n", "several tags have the id 0"),
        ("\t0\n", "line 1: the tag is empty"),
    ],
)
def test_wrong_tag_ids(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_tag_ids(write(tmp_path, content))


FACES = (
    b"\xef\xbb\xbf0446/332446.jpg\t12\t0.448534, 0.441995, 0.584106, 0.654420 0.337403\r\n"
    b"\r\n"
    b"446\\332446.jpg\t7\t0.1,0.2,0.3,0.4,9e-1\n"
)


def test_faces_in_both_published_forms(tmp_path: Path) -> None:
    expected = [
        FaceBoxes(332446, 12, Box(0.448534, 0.441995, 0.584106, 0.654420, 0.337403), 0),
        FaceBoxes(332446, 7, Box(0.1, 0.2, 0.3, 0.4, 0.9), 1),
    ]
    assert list(read_faces(write(tmp_path, FACES, "faces.tsv"))) == expected
    assert list(read_faces(FACES.splitlines(keepends=True))) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"0001/1.jpg\t2", "faces.tsv, line 2: 2 columns"),
        (b"0001/one.jpg\t2\t0 0 1 1 1", "no post id"),
        (b"0001/1.jpg\t-2\t0 0 1 1 1", "the tag id"),
        (b"0001/1.jpg\t2\t0 0 1 1", "not five finite numbers"),
        (b"0001/1.jpg\t2\t0 0 1 1 1 1", "not five finite numbers"),
        (b"0001/1.jpg\t2\t0 0 1 nan 1", "not five finite numbers"),
        (b"0001/1.jpg\t2\t0 0 1 inf 1", "not five finite numbers"),
        (b"0001/1.jpg\t2\t0 0 1 one 1", "not five finite numbers"),
        (b"0001/\xff1.jpg\t2\t0 0 1 1 1", "line 2: not UTF-8"),
    ],
)
def test_wrong_faces(row: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(read_faces([b"0001/1.jpg\t2\t0 0 1 1 1", row]))


@pytest.mark.parametrize("path", ["0446/332446.jpg", "446/332446.jpg", "446\\332446.png", "332446"])
def test_post_id(path: str) -> None:
    assert post_id(path) == 332446


@needs_published
def test_published_files() -> None:
    found = find_label_files(PUBLISHED)
    names = read_class_names(found.names or Path())
    counts = read_class_counts(found.counts or Path())
    assert len(names) == 3_263
    assert tuple(names.values()) == counts.names
    for split, rows in (("val", 46_050), ("test", 94_440)):
        table = read_labels(found.labels[split])
        assert len(table.paths) == len(set(table.paths)) == rows
        assert counts.differing(counts.splits[split], table.counts()) == 0
        assert all(int(path[:4]) == post_id(path) % 1000 for path in table.paths)
    assert len(read_tag_ids(PUBLISHED / "tagIds.tsv")) == 70_095
