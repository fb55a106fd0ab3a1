"""Tables of tag aliases and implications: their effect on labels, and malformed files."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from animesion.errors import UsageError
from animesion.sources.tag_tables import Implied, TagTableOptions, TagTables, load

Rows = list[tuple[str, str]]


def tables(
    folder: Path, aliases: Rows | None = None, implications: Rows | None = None, implied: Implied = "keep-specific"
) -> TagTables:
    names = {"aliases": "", "implications": ""}
    for name, rows in (("aliases", aliases), ("implications", implications)):
        if rows is not None:
            path = folder / f"{name}.csv"
            lines = ["antecedent_name,consequent_name", *(f"{tag},{other}" for tag, other in rows)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            names[name] = str(path)
    return load(TagTableOptions(**names, implied=implied))


def test_without_tables_labels_stay_as_they_are() -> None:
    assert load(TagTableOptions()).labels(("b", "a", "c")) == ("b", "a", "c")


def test_aliases_are_followed_to_their_end_and_make_one_label_of_several(tmp_path: Path) -> None:
    found = tables(tmp_path, [("a", "b"), ("b", "c"), ("x", "c")])
    assert found.labels(("x", "other", "a", "b", "c")) == ("c", "other")
    assert dict(found.aliases) == {"a": "c", "b": "c", "x": "c"}


@pytest.mark.parametrize(("implied", "kept"), [("keep-specific", ("swimsuit_rem", "emilia")), ("keep-general", None)])
def test_of_labels_that_imply_one_another_one_stays(
    tmp_path: Path, implied: Implied, kept: tuple[str, ...] | None
) -> None:
    # two steps apart, the middle one not among the labels; and by way of an alias
    found = tables(
        tmp_path, [("rem_old", "rem")], [("swimsuit_rem", "rem_(re:zero)"), ("rem_(re:zero)", "rem")], implied
    )
    assert found.labels(("swimsuit_rem", "rem_old", "emilia")) == (kept or ("rem", "emilia"))
    assert found.labels(("swimsuit_rem",)) == ("swimsuit_rem",)


def test_an_alias_may_make_antecedent_and_consequent_one(tmp_path: Path) -> None:
    found = tables(tmp_path, [("a", "b")], [("a", "b"), ("b", "c")])
    assert found.labels(("a", "c")) == ("b",)


@pytest.mark.parametrize(
    ("aliases", "implications", "shown"),
    [
        ([("a", "b"), ("b", "c"), ("c", "b")], None, r"source\.aliases: .* cycle \(b -> c -> b\)"),
        ([("a", "a")], None, r"\(a -> a\)"),
        (None, [("x", "a"), ("a", "b"), ("b", "a")], r"source\.implications: .* cycle \(a -> b -> a\)"),
        ([("c", "a")], [("a", "b"), ("b", "c")], r"cycle \(a -> b -> a\)"),
        ([(f"t{n}", f"t{(n + 1) % 50}") for n in range(50)], None, r"\(t0 -> t1 -> t2 -> t3 -> t4 -> \.\.\. -> t0\)"),
    ],
)
def test_cycles_are_refused_and_shown(
    tmp_path: Path, aliases: Rows | None, implications: Rows | None, shown: str
) -> None:
    with pytest.raises(UsageError, match=shown):
        tables(tmp_path, aliases, implications)


def test_a_tag_is_an_alias_of_one(tmp_path: Path) -> None:
    assert tables(tmp_path, [("a", "b"), ("a", "b")]).labels(("a",)) == ("b",)
    with pytest.raises(UsageError, match=r"line 3 of .* makes 'a' an alias of 'c', an earlier line of 'b'"):
        tables(tmp_path, [("a", "b"), ("a", "c")])


def test_long_chains_and_wide_graphs_are_no_trouble(tmp_path: Path) -> None:
    chain = [(f"t{number}", f"t{number + 1}") for number in range(20_000)]
    assert tables(tmp_path, chain).labels(("t0",)) == ("t20000",)
    assert tables(tmp_path, None, chain).labels(("t20000", "t0")) == ("t0",)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda pair: pair[0] < pair[1]), max_size=40),
    st.lists(st.integers(0, 30).map(str), max_size=8),
    st.sampled_from(["keep-specific", "keep-general"]),
)
def test_no_two_labels_that_stay_imply_one_another_and_every_other_is_covered(
    edges: list[tuple[int, int]], tags: list[str], implied: Implied
) -> None:
    graph: dict[str, tuple[str, ...]] = {}
    for low, high in edges:  # towards higher numbers alone, so there is no circle
        graph[str(low)] = (*graph.get(str(low), ()), str(high))
    reach = {str(number): {str(number)} for number in range(31)}
    for number in range(30, -1, -1):
        for general in graph.get(str(number), ()):
            reach[str(number)] |= reach[general]
    kept = TagTables({}, graph, implied).labels(tags)
    assert list(kept) == [tag for tag in dict.fromkeys(tags) if tag in kept]
    assert not [(a, b) for a in kept for b in kept if a != b and b in reach[a]]
    for tag in tags:
        assert any(tag in reach[stays] if implied == "keep-specific" else stays in reach[tag] for stays in kept)


def test_the_formats_of_dumps(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "antecedent_name": 'a"b', "consequent_name": "c", "status": "active"},
        {"id": "2", "antecedent_name": "old", "consequent_name": "new", "status": "deleted"},
        {"id": "3", "antecedent_name": "初音", "consequent_name": "miku", "status": "active"},
    ]
    quoted = [['"a""b"' if value == 'a"b' else value for value in row.values()] for row in rows]
    files = {
        "t.csv": "\ufeff" + "\r\n".join(",".join(row) for row in [list(rows[0]), *quoted]) + "\r\n\r\n",
        "t.tsv": "\n".join("\t".join(row) for row in [list(rows[0]), *quoted]),
        "t.jsonl": "\n".join(json.dumps(row | {"creator_id": 1, "reason": None}) for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            found = load(TagTableOptions(aliases=str(path)))
            assert dict(found.aliases) == {'a"b': "c", "初音": "miku"}, path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"name,alias\na,b\n",
            r"line 1 of .* is not a header with the columns antecedent_name and consequent",
        ),
        ("t.csv", b"antecedent_name,consequent_name\na\n", r"line 2 of .* has 1 columns, the header has 2"),
        ("t.csv", b"antecedent_name,consequent_name\na,\n", r"line 2 of .* has no antecedent_name or no consequent"),
        ("t.csv", b'antecedent_name,consequent_name\n"a,b\n', r"line 2 of .* quotes that do not match"),
        ("t.csv", b"antecedent_name,consequent_name\n\xff,b\n", r"line 2 of .* is not UTF-8 text"),
        ("t.csv", b"antecedent_name,consequent_name\na," + b"b" * 70_000, r"line 2 of .* is longer than 65,536 bytes"),
        ("t.jsonl", b'{"antecedent_name": "a"}\n', r"line 1 of .* has no antecedent_name"),
        ("t.jsonl", b'{"antecedent_name": ["a"], "consequent_name": 5}\n', r"line 1 of .* has no antecedent_name"),
        ("t.jsonl", b"[1]\n", r"line 1 of .* is not a JSON object"),
        ("t.jsonl", b"[" * 60_000, r"line 1 of .* is not JSON"),
        ("t.csv.gz", b"not gzip at all", r"cannot be read \("),
        ("t.csv.gz", gzip.compress(b"antecedent_name,consequent_name\n" * 99, mtime=0)[:-20], r"cannot be read \("),
        ("t.txt", b"", r"the format of .* is unknown: rename it to end in \.csv"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for option in ("aliases", "implications"):
        with pytest.raises(UsageError, match=rf"^source\.{option}: .*{message}"):
            load(TagTableOptions.model_validate({option: str(path)}))
    with pytest.raises(UsageError, match="cannot be read"):
        load(TagTableOptions(aliases=str(tmp_path / "absent.csv")))


def test_a_gzip_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"antecedent_name,consequent_name\n")
        for _ in range(64):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UsageError, match="longer than"):
        load(TagTableOptions(aliases=str(path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20
