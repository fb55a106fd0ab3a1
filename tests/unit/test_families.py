"""Names that say which files come from one image or post."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import animesion
from animesion import sources
from animesion.sources import families

DIGEST = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"{DIGEST}-0", f"{DIGEST}-1"),
        (f"miku_{DIGEST}", f"{DIGEST}_rot90"),
        ("9000001_p0", "9000001_p12"),
        ("9000001_p0", "9000001_p0_master1200"),
        ("danbooru_7001_face0", "danbooru_7001_face1"),
        ("danbooru-7001", "danbooru_7001_crop2"),
        ("aug_3_leaf", "leaf"),
        ("aug_3_leaf", "aug_0_leaf"),
        ("leaf_jpg.rf.0f1e2d3c4b5a69788796a5b4c3d2e1f0", "leaf_jpg.rf.ffffffffffffffffffffffffffffffff"),
        ("leaf", "leaf (1)"),
        ("leaf", "leaf_rot90"),
        ("leaf", "leaf_flip"),
        ("leaf", "leaf - Copy (2)"),
        ("leaf-copy", "leaf_hflip_rot180"),
    ],
)
def test_copies_and_pages_are_one_family(first: str, second: str) -> None:
    one, two, other = families.tokens([first, second, "other"], ["a", "a", "a"])
    assert one == two != ()
    assert other == ()


@pytest.mark.parametrize(
    ("stems", "labels"),
    [
        (["1", "1"], ["a", "a"]),  # of two folders
        (["1_rot90", "1"], ["a", "b"]),  # of two classes
        (["9000001_p0", "9000002_p0"], ["a", "a"]),
        (["12_p0", "12_p1"], ["a", "a"]),  # too short for a work
        (["img_1", "img_2"], ["a", "a"]),
        (["face1", "face2"], ["a", "a"]),
        (["turn", "return"], ["a", "a"]),
    ],
)
def test_what_only_looks_alike_is_none(stems: list[str], labels: list[str]) -> None:
    one, two = families.tokens(stems, labels)
    assert one == () or one != two


@given(
    st.text(st.sampled_from("aAb01_-. ()コピー"), max_size=12),
    st.sampled_from(["_rot90", " (1)", "_face0", "-COPY", " - コピー", ".rf.0f1e2d3c4b5a69788796a5b4c3d2e1f0"]),
)
def test_a_name_with_an_affix_is_never_passed_over(base: str, affix: str) -> None:
    if base.strip("_-. ()"):
        assert families.read(base + affix, "").affixed


@pytest.mark.parametrize(
    ("source_id", "place"),
    [
        ("miku/1.png", ("1", "a")),
        ("C:\\faces\\1.png", ("1", "a")),
        ("https://A.example/x/y%20z_p0.jpg?w=1#f", ("y z_p0", "a/a.example/x")),
        ("https://a.example", ("", "a/a.example")),
        ("http://[::1", ("", "a/[::1")),
        ("train-00000.parquet:12/1_face0.png", ("1_face0", "a")),
    ],
)
def test_names_of_paths_and_urls(source_id: str, place: tuple[str, str]) -> None:
    assert families.named(source_id, "a") == place


def listed(kind: str, *overrides: str) -> list[Any]:
    chosen = [f"source.kind={kind}", *overrides] if kind != "urls" else ["source.contact=me@example.org", *overrides]
    return list(sources.make(animesion.load_recipe(kind if kind == "urls" else "folder", chosen)).items())


URLS = [
    f"https://a.example/o/{DIGEST}.jpg,x,k_1",
    f"https://b.example/s/sample-{DIGEST}.jpg?x=1,y,k_2",
    "https://i.example/img/9000001_p0.png,x,",
    "https://other.example/9000001_p1.png,y,",
    "https://a.example/leaf.jpg,x,",
    "https://a.example/leaf%20(1).jpg,x,",
    "https://b.example/leaf.jpg,x,",
    "https://a.example/more/leaf.jpg,x,",
    "https://a.example/leaf.jpg?size=2,y,",
]


def test_urls_are_families_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "urls.csv"
    path.write_text("\n".join(["url,label,group", *URLS]))
    found = listed("urls", f"source.path={path}")
    leaf = ("name:x/a.example/leaf",)
    assert families.of_images("auto", [item.source_id for item in found], [item.labels[0] for item in found]) == [
        (f"file:{DIGEST}",),
        (f"file:{DIGEST}",),
        ("pixiv:9000001",),
        ("pixiv:9000001",),
        leaf,
        leaf,
        (),
        (),
        (),
    ]
    assert [item.families for item in found][:3] == [("group:k_1",), ("group:k_2",), ()]
    regex = listed("urls", f"source.path={path}", "source.family='([0-9]+)_p.*'")
    assert [item.families for item in regex][1:4] == [("group:k_2",), ("file:9000001",), ("file:9000001",)]


def test_keys_of_a_table_name_its_images(tmp_path: Path) -> None:
    path = tmp_path / "urls.csv"
    rows = ["https://a.example/1,x,tree (1)", "https://a.example/2,x,tree", "https://a.example/3,x,bush"]
    path.write_text("\n".join(["url,label,key", *rows]))
    found = [item.source_id for item in listed("urls", f"source.path={path}", "source.key_column=key")]
    assert families.of_images("auto", found, ["x"] * 3) == [("name:x/tree",), ("name:x/tree",), ()]


def test_posts_of_a_dump_may_be_joined_by_their_numbers(tmp_path: Path) -> None:
    posts = [{"id": number, "tags": [{"name": "miku", "category": 4}], "file_ext": "jpg"} for number in (71, 72, 81)]
    (tmp_path / "meta.json").write_text("\n".join(map(json.dumps, posts)))
    chosen = [f"source.metadata={tmp_path / 'meta.json'}", f"source.images={tmp_path}"]
    assert [item.families for item in listed("dump", *chosen)] == [("post:71",), ("post:72",), ("post:81",)]
    joined = [item.families for item in listed("dump", *chosen, "source.family='(.).*'")]
    assert joined == [("post:71", "file:7"), ("post:72", "file:7"), ("post:81", "file:8")]
