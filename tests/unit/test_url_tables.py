"""Tables of URLs: all formats, malformed rows and files, and counts."""

from __future__ import annotations

import csv
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
from animesion_scrapers.url_tables import UrlColumns, UrlRow, UrlTables, normalise, refusal_reason

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


@given(st.binary(max_size=400), st.sampled_from(["csv", "tsv", "jsonl", "csv.gz", "parquet"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_have_a_fault(data: bytes, kind: str, headed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t.{kind}")
        path.write_bytes((b"url,label\n" if headed else b"") + data)
        for row in read(path):
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
