"""Tables of URLs: all formats, malformed rows and files, and counts."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion_scrapers import ScraperError
from animesion_scrapers.counts import DigestSet, HostCounts
from animesion_scrapers.url_tables import UrlColumns, UrlRow, UrlTables, normalise, parquet, refusal_reason
from animesion_scrapers.url_tables.parquet_pages import pages

MD5 = "0123456789abcdef0123456789abcdef"
RECORDS = [
    {"url": "https://a.example/1.jpg", "label": "rose", "md5": MD5, "license": "CC0", "split": "train"},
    {"url": "https://b.example/ü.jpg", "label": "初音ミク", "md5": "", "license": "", "split": "test"},
]


def read(path: Path, columns: UrlColumns | None = None, table_format: str = "") -> list[UrlRow]:
    return [row for batch in UrlTables(path, columns, table_format).batches() for row in batch]


def write(folder: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{kind}"
    stem = kind.removesuffix(".gz")
    if stem == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    text = io.StringIO()
    if stem == "jsonl":
        text.writelines(f"{json.dumps(record)}\n" for record in records)
    else:
        writer = csv.DictWriter(text, list(records[0]), delimiter="\t" if stem == "tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "csv.gz", "tsv.gz", "jsonl.gz", "parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    first, second = read(write(tmp_path, kind, RECORDS))
    assert first[2:] == ("", "https://a.example/1.jpg", ("rose",), "", MD5, "", 0, "CC0", "", "", "train", (), ())
    assert (second.url, second.labels, second.md5) == ("https://b.example/ü.jpg", ("初音ミク",), "")
    text = kind.startswith(("csv", "tsv"))
    assert (first.line, second.line) == ((2, 3) if text else (1, 2))


def test_columns_are_named_or_known_by_their_names(tmp_path: Path) -> None:
    record = {
        "Image URL": "https://a.example/1.jpg", "href": "https://a.example/2.jpg", "Species": "rose", "id": 7,
        "FileSize": "1200", "SHA-1": "A" * 40, "Creator": "me", "group_id": 3.0, "Subset": "dev",
    }  # fmt: skip
    path = write(tmp_path, "csv", [record])
    [row] = read(path)
    assert row[3:] == (
        "https://a.example/1.jpg", ("rose",), "", "", "a" * 40, 1200, "", "me", "3.0", "dev", (), (),
    )  # fmt: skip
    [row] = read(path, UrlColumns(url="href", key="id", label="Creator"))
    assert (row.url, row.key, row.labels) == ("https://a.example/2.jpg", "7", ("me",))
    [row] = read(path, UrlColumns(url="link"))
    assert row.fault.startswith("there is no column 'link' among 'Image URL', 'href'")
    [row] = read(write(tmp_path, "csv", [{"name": "x", "address": "y"}]))
    assert "no column of URLs is recognised among 'name', 'address'" in row.fault


def test_parquet_and_json_lines_hold_lists_and_numbers(tmp_path: Path) -> None:
    record = {"url": "https://a.example/1.jpg", "labels": ["a", None, "b"], "group": 3.0, "bytes": 12}
    for kind in ("parquet", "jsonl"):
        [row] = read(write(tmp_path, kind, [record]))
        assert (row.labels, row.group, row.bytes) == (("a", "b"), "3", 12)


def test_a_table_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("rose,https://a.example/1.jpg\nlily,https://a.example/2.jpg\n")
    rows = read(tmp_path / "t.csv", UrlColumns(label="1"))
    assert [(row.line, row.url, row.labels) for row in rows] == [
        (1, "https://a.example/1.jpg", ("rose",)),
        (2, "https://a.example/2.jpg", ("lily",)),
    ]


A, B = "https://a.example/1.jpg", "https://a.example/2.jpg"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", f"url;label\n{A};rose\n{B};初音ミク, Miku\n"),
        ("tabs.csv", f"url\tlabel\n{A}\trose\n{B}\t初音ミク, Miku\n"),
        ("pipes.csv", f"url|label\n{A}|rose\n{B}|初音ミク, Miku\n"),
        ("commas.tsv", f'url,label\n{A},rose\n{B},"初音ミク, Miku"\n'),
        ("excel.csv", f"sep=;\r\nurl;label\r\n{A};rose\r\n{B};初音ミク, Miku\r\n"),
        ("blanks.csv", f' url , "label" \n{A} , rose \n {B}, "初音ミク, Miku"\n'),
        ("table.txt", f"url\tlabel\n{A}\trose\n{B}\t初音ミク, Miku\n"),
        ("lines.json", f'{{"url": "{A}", "label": "rose"}}\n{{"url": "{B}", "label": "初音ミク, Miku"}}\n'),
        ("array.json", f'[{{"url": "{A}", "label": "rose"}},\n {{"url": "{B}", "label": "初音ミク, Miku"}}]'),
        ("array.jsonl", f'\n[\n{{"url": "{A}", "label": "rose"}}\n,\n{{"url": "{B}", "label": "初音ミク, Miku"}}\n]\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gzip"])
def test_separators_json_arrays_and_unicode_encodings(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    data = content.encode("utf-8" if encoding == "gzip" else encoding)
    # with and without the suffix .gz
    (tmp_path / name).write_bytes(gzip.compress(data) if encoding == "gzip" else data)
    assert [(row.url, row.labels, row.fault) for row in read(tmp_path / name)] == [
        (A, ("rose",), ""),
        (B, ("初音ミク, Miku",), ""),
    ]


@pytest.mark.parametrize(
    ("encoding", "labels"),
    [
        ("cp932", ["初音ミク", "鏡音リン", "ｶﾀｶﾅ と 漢字", "rose"]),
        ("euc_jp", ["初音ミク", "鏡音リン", "ひらがな", "rose"]),
        ("gb18030", ["初音未来", "镜音铃", "月季花", "牡丹", "菊花", "凤凰木", "银杏", "荷花", "rose"]),
        ("cp1252", ["Café society", "Müller-Thurgau", "Rosa ‘Peace’", "naïve", "à la crème", "Hélène"]),
        ("cp1252", ["Grüner Veltliner", "Weißburgunder", "rose"]),
    ],
)
def test_legacy_encodings_are_recognised_and_reported(tmp_path: Path, encoding: str, labels: list[str]) -> None:
    ascii_rows = [f"https://a.example/ascii/{number}.jpg,plain" for number in range(50_000)]
    rows = [f"https://a.example/{number}.jpg,{label}" for number, label in enumerate(labels)]
    (tmp_path / "t.csv").write_bytes("\n".join(["url,label", *ascii_rows, *rows]).encode(encoding))
    tables = UrlTables(tmp_path / "t.csv")
    found = [row for batch in tables.batches() for row in batch]
    assert [row.labels for row in found[50_000:]] == [(label,) for label in labels]
    assert tables.encodings == {encoding: 1}
    [*_, row] = read_as(tmp_path / "t.csv", "latin-1")
    assert row.fault == ""


def read_as(path: Path, encoding: str) -> list[UrlRow]:
    return [row for batch in UrlTables(path, encoding=encoding).batches() for row in batch]


def test_a_damaged_row_does_not_change_the_encoding(tmp_path: Path) -> None:
    rows = [b"url,label", f"{A},初音ミク".encode(), f"{B},caf".encode() + b"\xe9", f"{A},鏡音".encode()]
    (tmp_path / "t.csv").write_bytes(b"\n".join(rows))
    tables = UrlTables(tmp_path / "t.csv")
    faults = [row.fault for batch in tables.batches() for row in batch]
    assert faults == ["", "not UTF-8 text in the column for label", ""]
    assert not tables.encodings
    (tmp_path / "t.csv").write_bytes(f"url,label\n{A},初音".encode("utf-16")[:-1])
    assert [row.fault for row in read(tmp_path / "t.csv")] == ["not UTF-8 text in the column for label"]
    with pytest.raises(ScraperError, match=r"^There is no encoding 'cp0'"):
        UrlTables(tmp_path / "t.csv", encoding="cp0")


def test_a_list_of_urls_is_one_column_unless_it_has_tabs_or_a_header(tmp_path: Path) -> None:
    commas = "https://a.example/w_200,h_100/1.jpg;x"
    path = tmp_path / "list.txt"
    path.write_text(f"{commas}\n{B}\n")
    assert [row.url for row in read(path)] == [commas, B]
    path.write_text(f"{A},rose\n{B},lily\n")
    assert [row.url for row in read(path)] == [f"{A},rose", f"{B},lily"]
    assert [(row.url, row.labels) for row in read(path, UrlColumns(label="2"))] == [(A, ("rose",)), (B, ("lily",))]
    path.write_text(f"{A}\trose\n")
    assert [(row.url, row.labels) for row in read(path, UrlColumns(label="2"))] == [(A, ("rose",))]
    # in a folder, other files have these suffixes too
    (tmp_path / "t.csv").write_text(f"url\n{A}\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    tables = UrlTables(tmp_path)
    assert [file.name for file in tables.files] == ["t.csv"]
    assert tables.skipped_names == ["dataset_infos.json", "list.txt"]
    (tmp_path / "t.csv").unlink()
    assert [file.name for file in UrlTables(tmp_path).files] == ["dataset_infos.json", "list.txt"]


def test_a_json_array_is_read_in_pieces(tmp_path: Path) -> None:
    records = [{"url": f"https://a.example/{n}.jpg", "label": "ü" * 50, "more": {"a": [n]}} for n in range(5_000)]
    path = tmp_path / "t.json"
    for indent in (None, 2):
        path.write_text(json.dumps(records, ensure_ascii=False, indent=indent))
        rows = read(path)
        assert [row.url for row in rows] == [record["url"] for record in records]
        assert {row.labels for row in rows} == {("ü" * 50,)}
        assert rows[-1].line == (1 if indent is None else 2 + 4_999 * 9)
    whole = path.read_text()
    path.write_text(whole[:-9_000])
    rows = read(path)
    assert rows[-1].fault == "not a JSON array beyond this line"
    assert 4_900 < len(rows) < 5_000
    path.write_text('[{"url": "' + "x" * 400_000 + '"}]')
    assert [row.fault for row in read(path)] == ["a member of the array has more than 262,144 bytes"]
    path.write_text("[]")
    assert read(path) == []
    path.write_text(f'[{{"url": "{A}"}}, 3, {{"url": "{B}"}}]')
    assert [row.fault for row in read(path)] == [
        "",
        "not a JSON object: a table has one per line, or is one array of them",
        "",
    ]


def test_what_is_no_table_is_named_with_the_way_out(tmp_path: Path) -> None:
    workbook = b"PK\3\4" + bytes(50)
    for name in ("t.csv", "t.jsonl", "t.txt"):
        (tmp_path / name).write_bytes(workbook)
        [row] = read(tmp_path / name)
        assert row.fault.startswith("it is a workbook or zip, not a text table: save the sheet as CSV")
    for data, what in (
        (f"url,label\n{A},x\n".encode("utf-32"), "it is UTF-32 text: save it as UTF-8"),
        (
            f"url,label\r{A},x\r".encode(),
            "it is a text whose lines end in carriage returns alone: save it with line feeds",
        ),
        (b"PAR1" + bytes(9), "it is a Parquet file: rename it to end in .parquet"),
    ):
        (tmp_path / "t.csv").write_bytes(data)
        assert [row.fault for row in read(tmp_path / "t.csv")] == [what]
    for name in ("t.xlsx", "t.XLS", "t.ods"):
        (tmp_path / name).write_bytes(workbook)
        with pytest.raises(ScraperError, match=r"is a workbook: save its sheet as CSV \(UTF-8\) and give that\.$"):
            UrlTables(tmp_path / name)
    images = pa.table({"image": [{"bytes": b"x", "path": "a"}], "label": [0]})
    pq.write_table(images, tmp_path / "t.parquet")
    [row] = read(tmp_path / "t.parquet")
    assert row.fault.startswith("the column 'image' contains the images themselves, not URLs")


def test_labels_of_every_type(tmp_path: Path) -> None:
    day = datetime.datetime(2020, 1, 2)
    cases: list[tuple[pa.Array, list[tuple[str, ...]]]] = [
        (pa.array([True, False, None]), [("true",), ("false",), ()]),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("3.00"), None]), [("1.5",), ("3",), ()]),
        (pa.array([decimal.Decimal(10) ** 40], pa.decimal256(50, 2)), [("1" + "0" * 40,)]),
        (pa.array([day.date(), None]), [("2020-01-02",), ()]),
        (pa.array([day, day.replace(hour=3)], pa.timestamp("ns")), [("2020-01-02",), ("2020-01-02T03:00:00",)]),
        (pa.array([day], pa.timestamp("us", "Europe/Berlin")), [("2020-01-02",)]),
        (pa.array([day.time().replace(hour=4)]), [("04:00:00",)]),
        (pa.array([1.5, 3.0, None], pa.float16()), [("1.5",), ("3",), ()]),
        (pa.array([0.1, float("nan")], pa.float32()), [("0.1",), ()]),
        (pa.array([0.1, 2.0**60], pa.float64()), [("0.1",), ("1.152921504606847e+18",)]),
        (pa.array([2**64 - 1], pa.uint64()), [("18446744073709551615",)]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), [("a",), ("b",), ("a",)]),
        (pa.array([1, 2, 1]).dictionary_encode(), [("1",), ("2",), ("1",)]),
        (pa.array(["a"], pa.large_string()), [("a",)]),
        (pa.array(["a"], pa.string_view()), [("a",)]),
        (pa.array([b"a"], pa.binary()), [("a",)]),
        (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), [("a",), ("b",)]),
        (pa.array([[1, 2], None]), [("1", "2"), ()]),
        (pa.array([[day.date()]], pa.large_list(pa.date32())), [("2020-01-02",)]),
        (pa.array([[0.1]], pa.list_(pa.float32())), [("0.1",)]),
        (pa.array([bytes(15) + b"1"], pa.uuid()), [("00000000-0000-0000-0000-000000000031",)]),
        (pa.nulls(1), [()]),
    ]
    for label, due in cases:
        urls = [f"https://a.example/{number}.jpg" for number in range(len(due))]
        pq.write_table(pa.table({"url": urls, "label": label}), tmp_path / "t.parquet")
        assert [row.labels for row in read(tmp_path / "t.parquet")] == due, label.type
    pq.write_table(pa.table({"url": [A], "label": pa.array([1], pa.duration("s"))}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0].fault == "the column 'label' for label has type duration[s]"
    values = [True, 3, 3.0, 3.5, None, ["a", "b"], [], "", [1, 2], 10**30, {"a": 1}, [["a"]]]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"url": A, "label": value}) for value in values))
    rows = read(tmp_path / "t.jsonl")
    assert [row.labels for row in rows] == [
        ("true",), ("3",), ("3",), ("3.5",), (), ("a", "b"), (), (), ("1", "2"), (str(10**30),), (), ()
    ]  # fmt: skip
    assert [row.ignored for row in rows] == [()] * 10 + [("label",)] * 2


def test_class_labels_of_hugging_face_are_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["miku", "rin"], "_type": "ClassLabel"}, "url": {"dtype": "string"}}
    table = pa.table({"url": [A, B, A], "label": [1, 0, -1]})
    described = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(described, tmp_path / "t.parquet")
    assert [row.labels for row in read(tmp_path / "t.parquet")] == [("rin",), ("miku",), ()]
    pq.write_table(table.replace_schema_metadata({"huggingface": "["}), tmp_path / "t.parquet")
    assert [row.labels for row in read(tmp_path / "t.parquet")] == [("1",), ("0",), ("-1",)]


def test_names_of_columns_are_composed_or_decomposed(tmp_path: Path) -> None:
    for written, requested in (("Klässe", "Kla\u0308sse"), ("Kla\u0308sse", "Klässe")):
        (tmp_path / "t.csv").write_text(f"url,{written}\n{A},x\n", encoding="utf-8")
        assert [row.labels for row in read(tmp_path / "t.csv", UrlColumns(label=requested))] == [("x",)]


def test_a_footer_of_many_row_groups_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footers = 0
    opened = pq.ParquetFile.__init__

    def count(self: Any, *arguments: Any, metadata: Any = None, **options: Any) -> None:
        nonlocal footers
        footers += metadata is None
        opened(self, *arguments, metadata=metadata, **options)

    urls = [f"https://a.example/{number}.jpg" for number in range(300)]
    pq.write_table(pa.table({"url": urls, "label": ["a"] * 300}), tmp_path / "t.parquet", row_group_size=1)
    monkeypatch.setattr(pq.ParquetFile, "__init__", count)
    assert [row.url for row in read(tmp_path / "t.parquet")] == urls
    assert footers == 1


def test_each_bad_row_is_named_and_the_good_ones_stay(tmp_path: Path) -> None:
    good = b"https://a.example/%d.jpg,rose\r\n"
    lines = [b"\xef\xbb\xbfurl,label\r\n", good % 2, b"https://a.example/\xff.jpg,rose\r\n", b"\r\n", good % 5]
    lines += [b'"https://a.example/6.jpg,rose\n', good % 7, b"a,b,c\n", b",rose\n"]
    lines += [b'"https://a.example/10.jpg","two\nlines, ""quoted"""\n', b"x" * 300_000 + b"\n", good % 13]
    (tmp_path / "t.csv").write_bytes(b"".join(lines))
    rows = read(tmp_path / "t.csv")
    assert {row.line: row.fault for row in rows if row.fault} == {
        3: "not UTF-8 text in the column for url",
        6: "not a row: its quotes do not match",
        8: "3 cells instead of 2",
        9: "no URL",
        12: "a line of more than 262,144 bytes",
    }
    assert [row.line for row in rows if not row.fault] == [2, 5, 7, 10, 13]
    assert next(row for row in rows if row.line == 10).labels == ('two\nlines, "quoted"',)


def test_bad_json_lines(tmp_path: Path) -> None:
    bad = [
        "[1]",
        "{",
        '{"a": 1}',
        '{"url": 3e400}',
        '{"url": "\\ud800"}',
        "[" * 100_000,
        '{"url": {"a": 1}}',
        "9" * 5000,
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*bad, '{"url": "https://a.example/", "label": {"x": 1}}']))
    rows = read(tmp_path / "t.jsonl")
    assert [bool(row.fault) for row in rows] == [True] * len(bad) + [False]
    assert [row.line for row in rows] == list(range(1, len(bad) + 2))
    assert rows[-1].labels == ()


def test_damaged_and_malformed_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", RECORDS * 5000)
    whole = path.read_bytes()
    path.write_bytes(whole[:4000] + bytes(2000) + whole[6000:])
    assert read(path)[-1].fault.startswith("cannot be read to its end")
    path.write_bytes(whole[:-20])
    [row] = read(path)
    assert (row.line, row.fault.partition(" (")[0]) == (0, "cannot be read to its end")
    binary = pa.array([b"https://a.example/1.jpg", b"https://a.example/\xff.jpg"])
    pq.write_table(pa.table({"url": binary.view(pa.string())}), path)
    assert [row.fault for row in read(path)] == ["", "not UTF-8 text in the column for url"]
    pq.write_table(pa.table({"url": [{"path": "x"}]}), path)
    assert read(path)[0].fault.startswith("the column 'url' for url has type struct")


def test_a_value_that_a_dictionary_repeats_does_not_fill_memory(tmp_path: Path) -> None:
    long = pa.array(["https://a.example/" + "x" * 1_000_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), long)
    pq.write_table(pa.table({"url": column}), tmp_path / "t.parquet", store_schema=False)
    before = pa.total_allocated_bytes()
    peak = count = 0
    for batch in UrlTables(tmp_path / "t.parquet").batches():
        peak = max(peak, pa.total_allocated_bytes() - before)
        count += len(batch)
        assert {len(row.url) for row in batch} == {8001}
        if count > 2000:
            break
    assert peak < 100_000_000  # all at once are 20 GB


def test_large_cells_of_parquet_do_not_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    urls = [f"https://a.example/{number}.jpg" for number in range(300)]
    plain: dict[str, Any] = {"compression": "zstd", "store_schema": False, "write_statistics": False}
    for use_dictionary in (False, True):
        cells = ["x" * 80_000_000, "b"]
        pq.write_table(pa.table({"url": urls[:2], "label": cells}), path, use_dictionary=use_dictionary, **plain)
        assert path.stat().st_size < 100_000
        before = pa.total_allocated_bytes()
        [row] = read(path)
        assert "the column 'label' has a page of 80,0" in row.fault
        assert pa.total_allocated_bytes() - before < 10_000_000
        assert [row.fault for row in read(path, UrlColumns(url="url", label="url"))] == ["", ""]
    # 300 MB in cells of one MiB, plain or each as the one before it and three letters more
    cells = ["y" * 1_000_000 + str(number) for number in range(300)]
    for encoding in ("PLAIN", "DELTA_BYTE_ARRAY"):
        table = pa.table({"url": urls, "label": cells})
        chosen: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"label": encoding}}
        pq.write_table(table, path, write_batch_size=32, **chosen, **plain)
        del table
        before, found = pa.total_allocated_bytes(), 0
        most, _ = parquet._page_rows(path, pq.ParquetFile(path).metadata, 0, ["label"])
        assert most <= 64
        for batch in parquet.read_parquet(path, UrlTables(path)._mapping("t", ())):
            found += len(batch)
            assert {(row.fault, row.labels[0]) for row in batch} == {("", "y" * 8001)}
            assert pa.total_allocated_bytes() - before < 200_000_000
        assert found == 300


def test_headers_of_pages_are_read_as_pyarrow_writes_them(tmp_path: Path) -> None:
    rows = 50_000
    table = pa.table(
        {"url": [f"https://a.example/{n}" for n in range(rows)], "n": range(rows), "l": [["a", "b"]] * rows}
    )
    for options in ({"data_page_version": "1.0"}, {"data_page_version": "2.0"}, {"use_dictionary": False}):
        pq.write_table(table, tmp_path / "t.parquet", write_page_index=True, **options)
        group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
        with (tmp_path / "t.parquet").open("rb") as file:
            for i in range(group.num_columns):
                chunk = group.column(i)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                found = list(pages(file, start, start + chunk.total_compressed_size))
                assert sum(page.values for page in found) == chunk.num_values
                assert 0 < sum(page.size for page in found) <= chunk.total_uncompressed_size


@given(data=st.binary(max_size=200))
def test_hostile_page_headers_end(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        list(pages(io.BytesIO(data), 0, len(data)))


def test_a_truncated_gzip_gives_the_rows_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    text = "url\n" + "".join(f"https://a.example/{hash(n)}-{n}.jpg\n" for n in range(20_000))
    path.write_bytes(gzip.compress(text.encode())[:-3000])
    rows = read(path)
    assert len(rows) > 1000
    assert rows[-1].fault.startswith("cannot be read to its end")
    assert rows[-1].line == rows[-2].line + 1
    path.write_bytes(b"not gzip")
    assert [row.line for row in read(path)] == [0]


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.csv", "a.tsv", "c.jsonl"):
        (tmp_path / name).write_text(
            json.dumps({"url": f"https://{name}/"}) if name == "c.jsonl" else f"url\nhttps://{name}/\n"
        )
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.csv").write_text("x")
    tables = UrlTables(tmp_path)
    assert [row.url for batch in tables.batches() for row in batch] == [
        f"https://{n}/" for n in ("a.tsv", "b.csv", "c.jsonl")
    ]
    assert tables.skipped_files == 1
    assert [file.name for file in UrlTables(f"{tmp_path}/[ab].*").files] == ["a.tsv", "b.csv"]


@pytest.mark.parametrize("name", ["nothing.csv", "folder", "t.doc", "x*.csv"])
def test_paths_without_a_table_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.doc").write_text("url\n")
    with pytest.raises(ScraperError, match=r"^[A-Z/][^\n]+\.$"):
        UrlTables(tmp_path / name)
    assert len(read(tmp_path / "t.doc", table_format="csv")) == 0


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://a.example/1.jpg?x=1#f", ""),
        ("HTTP://A.example/a b/ü.jpg", ""),
        ("http://93.184.216.34/", ""),
        ("file:///etc/passwd", "not file"),
        ("javascript:alert(1)", "not javascript"),
        ("data:image/png;base64,AAAA", "not data"),
        ("=HYPERLINK(\"http://a.example\")", "without a scheme"),
        ("//a.example/1.jpg", "without a scheme"),
        ("a.jpg", "without a scheme"),
        ("http://127.0.0.1/", "not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("http://[::1]/", "not on the public internet"),
        ("http://10.0.0.8:80/x", "not on the public internet"),
        ("http://user:secret@a.example/", "passwords"),
        ("http:///x", "no host"),
        ("https://a.example/" + "x" * 10_000, "longer than 8,000"),
        ("https://a.example/\0", "malformed"),
        ("https://a.example/\nHost: b", "malformed"),
        ("https://a.example:99999/", "malformed"),
        ("https://[a/", "malformed"),
        ("https://a.example/\ud800", "malformed"),
        (f"https://{'a' * 300}/", "malformed"),
    ],
)  # fmt: skip
def test_hostile_urls_are_refused_before_anything_is_sent(url: str, why: str) -> None:
    reason = refusal_reason(url)
    assert bool(reason) == bool(why)
    assert why in reason


def test_one_file_has_one_url() -> None:
    assert normalise("HTTPS://A.Example/B?c#d") == "https://a.example/B?c"
    assert normalise("https://a.example/b") == "https://a.example/b"


@given(
    st.binary(max_size=400), st.sampled_from(["csv", "tsv", "txt", "json", "jsonl", "csv.gz", "parquet"]), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_have_a_fault(data: bytes, kind: str, headed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t.{kind}")
        path.write_bytes((b"url,label\n" if headed else b"") + data)
        rows: list[UrlRow] = []
        with contextlib.suppress(ScraperError):  # two encodings are as likely
            rows = read(path)
        for row in rows:
            assert bool(row.fault) != bool(row.url)
            "".join([row.url, *row.labels, row.fault]).encode()
            assert row.line >= 0


CELLS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), min_size=2, max_size=2)


@given(st.lists(CELLS, max_size=20))
@settings(max_examples=100, deadline=None)
def test_rows_written_by_the_csv_module_are_read_back(rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["url", "label"])
            writer.writerows([f"https://a.example/{url}", label] for url, label in rows)
        found = read(path)
    due = [(f"https://a.example/{url}".strip(), (label.strip(),) if label.strip() else ()) for url, label in rows]
    assert [(row.url, row.labels) for row in found] == due


@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=30), max_size=20))
def test_a_digest_set_is_a_set(batches: list[list[int]]) -> None:
    digests, known = DigestSet(), set[int]()
    for batch in batches:
        due = []
        for number in batch:
            due.append(number not in known)
            known.add(number)
        assert digests.add(np.array(batch, np.uint64)).tolist() == due
    assert len(digests) == len(known)


def test_files_are_counted_by_host() -> None:
    due: Counter[str] = Counter()
    counts = HostCounts()
    for number in range(18_000):
        host = f"h{number % 6_000}.example" if number % 3 else "big.example"
        counts.add(host, number % 2)
        due[host] += 1
    assert len(counts) == len(due) > 4_000
    assert {each.host: each.files for each in counts} == due
    first = counts.most_common(3)
    assert first[0] == ("big.example", 6_000, 3_000, 3_000)
    assert [each.host for each in first[1:]] == sorted(host for host in due if due[host] == 3)[:2]
