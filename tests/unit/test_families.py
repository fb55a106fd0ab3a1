"""Names that say which files come from one image or post."""

from __future__ import annotations

import pytest

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
