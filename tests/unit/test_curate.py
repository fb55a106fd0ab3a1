"""Decisions on tables: class sizes, labels, splits, keepers, groups; no file is read."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import strategies as st

import animesion
from animesion.config.decisions import Decisions, PairDecision
from animesion.config.decisions import read as read_decisions
from animesion.config.recipe import CurateSection
from animesion.errors import UsageError
from animesion.pipeline import reasons
from animesion.pipeline.columns import Columns
from animesion.pipeline.curate import decide
from animesion.schemas import CURATED, FEATURES, MEANINGS, PAIRS, RAW
from animesion.storage import parquet


def rows(*images: dict[str, Any]) -> dict[str, list[Any]]:
    """Columns as curate loads them; fields that an image leaves out are ordinary and unlike any other image's."""
    rng = random.Random(7)
    columns: dict[str, list[Any]] = {}
    for i, given in enumerate(images):
        label = given.pop("label", "miku")
        ordinary = {
            "key": f"k{i:04d}", "source": "test", "source_id": str(i), "order": i, "labels": [label], "families": [],
            "boxes": None, "split": "", "class_order": -1, "rating": "", "flags": [], "page_url": "", "file_url": "",
            "licence": "", "author": "", "md5": f"{i:032x}", "bytes": 100, "sha256": f"{i:064x}", "extension": "jpg",
            "offset": 0, "reason": "", "detail": "", "part": 0, "seen_reason": "", "seen_detail": "", "format": "jpg",
            "mode": "RGB", "face": 0, "width": 100, "height": 80, "plain": True, "pixels_blake3": f"p{i}", "faces": -1,
            "face_score": 0.0, "box_count": 0, "best_score": 0.0, "second_score": 0.0, "crop": None,
            "phash": rng.getrandbits(64), "phash_flip": rng.getrandbits(64), "thumbnail": rng.randbytes(768),
        }  # fmt: skip
        for name, value in {**ordinary, **given}.items():
            columns.setdefault(name, []).append(value)
    return columns


def pairs(*verdicts: tuple[str, str, str] | tuple[str, str, str, dict[str, Any]]) -> pa.Table:
    """A table of verdicts: two keys, the verdict and, where it is given, other columns."""
    ordinary = {"whole": False, "mirrored": False, "inliers": 40, "residual": 1.0, "how": ""}
    listed = [
        {**ordinary, "first": first, "second": second, "verdict": verdict, **(more[0] if more else {})}
        for first, second, verdict, *more in verdicts
    ]
    return pa.Table.from_pylist(listed, schema=PAIRS)


def columns_of(columns: dict[str, list[Any]]) -> Columns:
    """Columns as curate takes them."""
    fields = {field.name: field.type for schema in (FEATURES, RAW) for field in schema}
    fields |= {"seen_reason": pa.string(), "seen_detail": pa.string(), "part": pa.int32(), "box_count": pa.int64()}
    fields |= {"best_score": pa.float32(), "second_score": pa.float32()}
    given = {name: values for name, values in columns.items() if name not in ("boxes", "flags")}
    return Columns.of([pa.table({name: pa.array(values, fields[name]) for name, values in given.items()})])


def decided_table(columns: dict[str, list[Any]], *arguments: Any, **options: Any) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the facts of `decide`."""
    found, facts = decide(columns_of(columns), *arguments, **options)
    [rows] = found.groups()
    return found.table(rows), facts


def run(
    columns: dict[str, list[Any]], *overrides: str, compared: pa.Table | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    recipe = animesion.load_recipe("folder", ["source.path=x", *overrides])
    table, facts = decided_table(columns, recipe, {}, compared=compared)
    assert table.schema == CURATED
    assert facts["seen"] == facts["kept"] + sum(facts["dropped"].values())
    assert set(facts["dropped"]) <= set(MEANINGS)
    return {row["key"]: row for row in table.to_pylist()}, facts


def test_class_minimum_and_cap() -> None:
    columns = rows(*({"label": "many"} for _ in range(30)), *({"label": "few"} for _ in range(4)))
    found, facts = run(columns, "classes.minimum=5", "classes.cap=12")
    assert facts["classes"] == ["many"]
    assert facts["dropped"] == {"rare class": 4, "over class cap": 18}
    chosen = {key for key, row in found.items() if row["kept"]}
    again, _ = run({name: values[::-1] for name, values in columns.items()}, "classes.minimum=5", "classes.cap=12")
    assert chosen == {key for key, row in again.items() if row["kept"]}


def test_classes_with_similar_names_are_named_although_they_are_rare() -> None:
    labels = ["Miku", "miku", "m i_k u", "ＭＩＫＵ", "rin", "Rin-", "len", "-1", "1", "1-23", "12-3"]
    _, facts = run(rows(*({"label": label} for label in labels for _ in range(2))), "classes.minimum=3")
    [note] = [note for note in facts["notes"] if "label.rename" in note]
    assert note == (
        "classes whose names differ in case, blanks, _, - or width only: "
        "'Miku' and 'm i_k u' and 'miku' and 'ＭＩＫＵ'; "
        '\'Rin-\' and \'rin\'; label.rename = { "m i_k u" = "Miku", "miku" = "Miku", "ＭＩＫＵ" = "Miku", '
        '"rin" = "Rin-" } joins them'
    )


def test_names_that_mean_a_missing_label_are_named() -> None:
    _, facts = run(rows({"label": "nan"}, {"label": "Unknown"}, {"label": "Unknown"}, {"label": "nana"}))
    said = [note for note in facts["notes"] if "label.exclude" in note]
    assert said == [
        "1 image is of a class 'nan': if this means that it has no label, label.exclude = [\"nan\"] drops it",
        "2 images are of a class 'Unknown': if this means that they have no label, label.exclude = [\"Unknown\"] "
        "drops them",
    ]


def test_the_minimum_counts_images_left_after_duplicates() -> None:
    twins = [{"label": "few", "sha256": "same", "pixels_blake3": "same", "bytes": 100 + i} for i in range(5)]
    found, facts = run(rows(*twins, *({} for _ in range(9))), "classes.minimum=2")
    assert facts["dropped"] == {"exact duplicate": 4, "rare class": 1}
    assert found["k0004"]["reason"] == "rare class"  # the largest of equals was the keeper
    assert {found[f"k000{i}"]["keeper"] for i in range(4)} == {"k0004"}


def test_keepers_are_best_by_size_then_losslessness_then_bytes_then_order() -> None:
    same = {"pixels_blake3": "same", "phash": 1}
    found, _ = run(rows({**same, "extension": "jpg", "bytes": 900}, {**same, "extension": "png", "bytes": 500}, {}, {}))
    assert (found["k0000"]["reason"], found["k0000"]["keeper"]) == ("pixel duplicate", "k0001")
    near = {"phash": 5, "thumbnail": bytes(768)}
    found, _ = run(rows({**near, "phash": 4}, {**near, "width": 200}, {}, {}))
    assert (found["k0000"]["reason"], found["k0000"]["keeper"]) == ("near duplicate", "k0001")


def test_a_chain_of_look_alikes_drops_only_images_compared_with_their_keeper() -> None:
    # a ~ b ~ c, but a and c are too far apart; the first is the best
    chain: list[dict[str, Any]] = [
        {"phash": 0b0, "width": 300},
        {"phash": 0b111, "width": 200},
        {"phash": 0b111111, "width": 100},
    ]
    found, _ = run(rows(*({**link, "thumbnail": bytes(768)} for link in chain), {}, {}))
    assert [found[f"k000{i}"]["reason"] for i in range(3)] == ["", "near duplicate", ""]
    assert found["k0000"]["group"] == found["k0002"]["group"]


def test_a_long_chain_is_cut_where_its_ends_are_too_far_apart() -> None:
    # five images, three bits from one to the next; the third is the best
    links = [{"phash": (1 << 3 * i) - 1, "width": 500 if i == 2 else 100 + i} for i in range(5)]
    chain = [
        {**link, "thumbnail": bytes(768), "sha256": f"s{i}", "pixels_blake3": f"q{i}"} for i, link in enumerate(links)
    ]
    settings = ("duplicates.action=report", "duplicates.diameter=5")
    found, facts = run(rows(*(dict(link) for link in chain), {}, {}), *settings)
    clusters = [found[f"k000{i}"]["cluster"] for i in range(5)]
    assert clusters == ["", "k0001", "k0001", "k0001", ""]
    assert (facts["chains"], facts["clusters"]) == (1, 1)
    assert any("chains of near duplicates were cut" in note for note in facts["notes"])
    assert len({found[f"k000{i}"]["group"] for i in range(5)}) == 1  # alternates of one another: one split
    whole, facts = run(
        rows(*(dict(link) for link in chain), {}, {}), "duplicates.action=report", "duplicates.diameter=6"
    )
    assert len({whole[f"k000{i}"]["cluster"] for i in range(5)}) == 1
    assert facts["chains"] == 0


def test_where_a_chain_is_cut_does_not_depend_on_the_order_of_rows() -> None:
    rng = random.Random(3)
    images = [
        {"phash": (1 << rng.randrange(40)) - 1, "thumbnail": bytes(768), "width": rng.randrange(50, 90)}
        for _ in range(60)
    ]
    columns = rows(*images)
    found, facts = run(columns, "duplicates.action=report")
    assert facts["chains"]
    order = rng.sample(range(60), 60)
    again, _ = run({name: [values[i] for i in order] for name, values in columns.items()}, "duplicates.action=report")
    assert {key: row["cluster"] for key, row in found.items()} == {key: row["cluster"] for key, row in again.items()}


def test_mirrored_images_count_as_duplicates_when_requested() -> None:
    thumbnail = random.Random(1).randbytes(16 * 3)  # sixteen columns, alike in every row
    turned = b"".join(thumbnail[i : i + 3] for i in range(45, -1, -3))
    one = {"phash": 1, "phash_flip": 2**60 - 1, "thumbnail": thumbnail * 16, "width": 200}
    other = {"phash": 2**60 - 3, "phash_flip": 3, "thumbnail": turned * 16}
    found, facts = run(rows(dict(one), dict(other), {}, {}), "duplicates.flip=true")
    assert (found["k0001"]["reason"], found["k0001"]["keeper"]) == ("near duplicate", "k0000")
    _, facts = run(rows(dict(one), dict(other), {}, {}))
    assert facts["kept"] == 4


def test_a_conflict_drops_only_compared_images() -> None:
    # a ~ b under one label, b ~ c under another: a is not the same image as c
    columns = rows({}, {}, {"label": "rin"}, {}, {"label": "rin"})
    compared = pairs(("k0000", "k0001", "copy"), ("k0001", "k0002", "copy"))
    found, facts = run(columns, compared=compared)
    assert [found[f"k000{i}"]["reason"] for i in range(3)] == ["", "label conflict", "label conflict"]
    assert found["k0001"]["detail"] == "also under rin as k0002"
    assert facts["conflicts"] == 1


def test_a_resemblance_under_two_labels_is_reported_and_drops_nothing() -> None:
    alike: list[dict[str, Any]] = [{"phash": 0b0}, {"phash": 0b1, "label": "rin"}]
    found, facts = run(rows(*({**each, "thumbnail": bytes(768)} for each in alike), {}, {"label": "rin"}))
    assert [found[f"k000{i}"]["reason"] for i in range(2)] == ["", ""]
    assert found["k0000"]["group"] == found["k0001"]["group"]
    assert any("1 pair of images under two labels with close hashes kept" in note for note in facts["notes"])


def test_verdicts_decide_what_is_dropped_and_what_shares_a_split() -> None:
    columns = rows(*({"width": 100 - i} for i in range(7)))
    table = pairs(
        ("k0000", "k0001", "copy"),
        ("k0000", "k0002", "copy with overlay"),
        ("k0000", "k0003", "alternate"),
        ("k0003", "k0004", "part"),
        ("k0000", "k0005", "copy", {"mirrored": True, "how": "mirrored"}),
    )
    found, _ = run(columns, compared=table)
    assert {key: row["keeper"] for key, row in found.items() if not row["kept"]} == dict.fromkeys(
        ("k0001", "k0002"), "k0000"
    )
    assert len({found[f"k000{i}"]["group"] for i in range(6)}) == 1
    assert found["k0006"]["group"] != found["k0000"]["group"]
    assert (found["k0002"]["resembles"], found["k0002"]["verdict"]) == ("k0000", "copy with overlay")
    assert (found["k0005"]["resembles"], found["k0005"]["how"]) == ("k0000", "mirrored")
    assert (found["k0006"]["resembles"], found["k0006"]["verdict"]) == ("", "")
    turned, _ = run(columns, "duplicates.flip=true", compared=table)
    assert turned["k0005"]["reason"] == "near duplicate"


def test_a_verdict_on_a_dropped_image_holds_for_one_with_equal_pixels() -> None:
    # k0000 stood for its equals when pairs were compared, and is dropped for its rating
    columns = rows({"pixels_blake3": "x", "reason": "rating"}, {"pixels_blake3": "x", "width": 50}, {}, {})
    found, _ = run(columns, compared=pairs(("k0000", "k0002", "copy")))
    assert found["k0000"]["reason"] == "rating"
    assert (found["k0001"]["reason"], found["k0001"]["keeper"]) == ("near duplicate", "k0002")


def test_images_that_cannot_be_encoded_are_dropped_before_packing() -> None:
    tall = {"width": 100, "height": 30_000}
    found, _ = run(rows(tall, {}, {}), "pack.size=224")
    assert (found["k0000"]["reason"], found["k0000"]["detail"]) == ("too large", "224x67200")
    found, _ = run(rows(tall, {}, {}), "pack.format=webp")
    assert found["k0000"]["reason"] == "too large"
    found, _ = run(rows(tall, {}, {}), "pack.size=224", "pack.fit=inside")
    assert found["k0000"]["kept"]


def test_a_source_image_listed_twice_stays_in_one_split() -> None:
    found, _ = run(rows(*({"source_id": "a/x.png"} for _ in range(6)), *({} for _ in range(20))))
    assert len({found[f"k{i:04d}"]["split"] for i in range(6)}) == 1


def test_the_minimum_counts_images_with_a_published_split() -> None:
    given = [{"split": "train"}, {"split": "test"}, {"split": ""}, {"split": "train", "label": "z"}]
    _, facts = run(rows(*given), "split.strategy=published", "classes.minimum=2")
    assert facts["dropped"] == {"no published split": 1, "rare class": 1}


def test_reporting_keeps_everything() -> None:
    twins = [{"sha256": "same", "pixels_blake3": "same"} for _ in range(3)]
    found, facts = run(rows(*twins, {}, {}), "duplicates.action=report")
    assert facts["kept"] == 5
    assert facts["clusters"] == 1
    assert {found[f"k000{i}"]["cluster"] for i in range(3)} == {"k0000"}


def test_families_share_a_split_even_through_a_dropped_member() -> None:
    family: list[dict[str, Any]] = [
        {"families": ["post:1"]},
        {"families": ["post:1", "post:2"], "labels": []},
        {"families": ["post:2"]},
    ]
    family[1]["reason"] = "no label"
    found, _ = run(rows(*family, *({} for _ in range(20))))
    assert found["k0000"]["split"] == found["k0002"]["split"]
    assert found["k0000"]["group"] == found["k0001"]["group"] == found["k0002"]["group"] == "k0000"


@pytest.mark.parametrize(
    ("split_names", "strategy", "due"),
    [
        (["train", "test", "val"], "auto", "published"),
        (["train", "", "val"], "auto", "grouped"),
        (["train", "", "val"], "published", "published"),
        (["", "", ""], "single", "single"),
    ],
)
def test_strategies(split_names: list[str], strategy: str, due: str) -> None:
    found, facts = run(rows(*({"split": name} for name in split_names)), f"split.strategy={strategy}")
    assert facts["strategy"] == due
    if due == "published":
        assert [found[f"k000{i}"]["split"] for i in range(3)] == split_names
        assert facts["dropped"] == ({"no published split": 1} if "" in split_names else {})
    if due == "single":
        assert facts["splits"] == {"train": 3}
    noted = any(note.startswith("2 of 3 images have a published split") for note in facts["notes"])
    assert noted == (due == "grouped")


def test_the_legacy_split_takes_the_order_of_the_source() -> None:
    found, facts = run(rows(*({"order": 19 - i} for i in range(20))), "split.strategy=legacy-dafre")
    assert facts["splits"] == {"train": 14, "val": 1, "test": 5}
    assert [found[f"k{i:04d}"]["split"] for i in (0, 4, 5, 6, 19)] == ["test", "test", "val", "train", "train"]


def test_class_ids_follow_published_ids_then_names() -> None:
    columns = rows({"label": "z", "class_order": 3}, {"label": "a"}, {"label": "m", "class_order": 9}, {"label": "B"})
    _, facts = run(columns)
    assert facts["classes"] == ["z", "m", "B", "a"]


def test_labels_are_renamed() -> None:
    found, facts = run(rows({"label": "hatsune"}, {"label": "miku"}), "label.rename.hatsune=miku")
    assert facts["classes"] == ["miku"]
    assert {row["label"] for row in found.values()} == {"miku"}


def test_row_groups_are_parts_of_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = rows(*({"label": f"c{i % 3}", "sha256": f"s{i // 2}", "detail": "x" * (i % 2)} for i in range(40)))
    whole, _ = decided_table(columns, animesion.load_recipe("folder", ["source.path=x"]), {})
    monkeypatch.setattr(parquet, "ROW_GROUP", 16)
    found, _ = decide(columns_of(columns), animesion.load_recipe("folder", ["source.path=x"]), {})
    groups = [found.table(some) for some in found.groups()]
    assert [len(group) for group in groups] == [16, 16, 8]
    assert pa.concat_tables(groups).equals(whole)
    together = parquet.write_groups(tmp_path / "groups.parquet", CURATED, groups)
    assert together == parquet.write(tmp_path / "whole.parquet", whole)


def test_limits_are_those_of_the_rules_on_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    images = []
    for _ in range(600):
        width, height = rng.choice([(100, 80), (30, 100), (99, 33), (5000, 20), (20, 20)])
        left, top = rng.randrange(-3, 5), rng.randrange(-3, 5)
        crop = [left, top, left + rng.randrange(1, width + 3), top + rng.randrange(1, height + 3)]
        scores = [round(rng.random(), 2) for _ in range(rng.randrange(4))]
        images.append(
            {"width": width, "height": height, "crop": rng.choice([None, crop]), **faces(*scores)}
            | {"sharpness": rng.choice([None, 49.9, 50.0, 80.0]), "jpeg_quality": rng.choice([None, -1, 79, 80])}
            | {"lines": rng.choice([None, 3, 4])}
        )
    columns = rows(*images)
    for settings in (
        ["filter.min_side=25", "filter.max_aspect=3", "pack.size=64", "filter.max_pixels=8000"],
        ["crop.detector=lbp", "crop.min_score=0.5", "crop.unsure_score=0.3", "crop.min_side=20", "crop.outside=drop"],
        ["crop.detector=lbp", "crop.min_share=0.3", "crop.faces=best", "pack.size=300", "filter.max_side=4000"],
        ["quality.min_sharpness=50", "quality.min_jpeg_quality=80", "quality.max_lines=3", "pack.fit=stretch"],
    ):
        recipe = animesion.load_recipe("folder", ["source.path=x", *settings])
        with monkeypatch.context() as patched:
            found, _ = decided_table(columns, recipe, {})
            patched.setattr(reasons, "_may_exceed", lambda rows, chosen, recipe: np.ones(len(chosen), dtype=np.bool_))
            one_by_one, _ = decided_table(columns, recipe, {})
        assert found.equals(one_by_one)
        assert pc.count_distinct(found["reason"]).as_py() > 2


def test_a_known_crash_is_dropped() -> None:
    columns = rows({}, {}, {})
    recipe = animesion.load_recipe("folder", ["source.path=x"])
    table, facts = decided_table(columns, recipe, {"k0001": "the worker died"})
    assert facts["dropped"] == {"crashed decoder": 1}
    assert table["detail"].to_pylist()[1] == "the worker died"


# -- decisions -------------------------------------------------------------------------------------------------------


def decided(text: str) -> str:
    return f"curate.decisions={{{text}}}"


def test_excluded_images_are_dropped_and_counted() -> None:
    found, facts = run(rows({}, {}, {}), decided('exclude = ["k0001", "gone"]'))
    assert found["k0001"]["reason"] == "excluded by decision"
    assert facts["dropped"] == {"excluded by decision": 1}
    assert "decisions: 1 key matches no image of this source" in facts["notes"]


def test_a_decided_label_counts_everywhere_and_keeps_the_published_order() -> None:
    images = [{"label": "a", "class_order": 0}, {"label": "b", "class_order": 1}, {"label": "a", "class_order": 0}]
    found, facts = run(rows(*images), decided('label = {k0002 = "b"}'))
    assert [row["label"] for row in found.values()] == ["a", "b", "b"]
    assert facts["classes"] == ["a", "b"]
    found, _ = run(rows(*images), decided('label = {k0002 = "z"}'), 'label.exclude=["z"]')
    assert found["k0002"]["reason"] == "excluded label"


def test_a_decided_label_settles_a_conflict() -> None:
    twins = [{"sha256": "same", "pixels_blake3": "same", "label": label} for label in ("a", "b")]
    columns = rows(*twins, {})
    assert run(columns)[1]["dropped"] == {"label conflict": 2}
    _, facts = run(columns, decided('label = {k0001 = "a"}'))
    assert facts["dropped"] == {"exact duplicate": 1}


def test_images_that_are_the_same_by_decision_are_one_cluster() -> None:
    found, facts = run(rows({"width": 300}, {}, {}, {}), decided('same = [["k0000", "k0002"], ["k0002", "k0003"]]'))
    assert [found[f"k000{i}"]["cluster"] for i in range(4)] == ["k0000", "", "k0000", "k0000"]
    assert facts["dropped"] == {"duplicate by decision": 2}
    assert {found[key]["keeper"] for key in ("k0002", "k0003")} == {"k0000"}


def test_images_that_differ_by_decision_stay_and_share_a_split() -> None:
    alike = [{"phash": 1, "thumbnail": bytes(768)} for _ in range(3)]
    columns = rows(*alike, *({} for _ in range(20)))
    _, facts = run(columns)
    assert facts["dropped"] == {"near duplicate": 2}
    found, facts = run(columns, decided('different = [["k0000", "k0001"]]'))
    assert (found["k0000"]["reason"], found["k0001"]["reason"]) == ("", "")
    assert facts["dropped"] == {"near duplicate": 1}
    assert found["k0000"]["group"] == found["k0001"]["group"]


def turned(*pairs: tuple[int, int, str]) -> str:
    """Decisions on pairs of images by their numbers; image i has the digest `digest(i)`."""
    listed = ", ".join(f'{{images = ["{digest(a)}", "{digest(b)}"], verdict = "{verdict}"}}' for a, b, verdict in pairs)
    return decided(f"pairs = [{listed}]")


def digest(i: int) -> str:
    return f"{i:064x}"


def test_a_turned_verdict_replaces_the_one_that_was_found() -> None:
    columns = rows(*({"sha256": digest(i)} for i in range(5)))
    found_pairs = pairs(("k0000", "k0001", "copy"), ("k0002", "k0003", "alternate", {"how": "mirrored"}))
    assert run(columns, compared=found_pairs)[1]["dropped"] == {"near duplicate": 1}
    found, facts = run(columns, turned((1, 0, "alternate"), (2, 3, "copy"), (3, 4, "copy")), compared=found_pairs)
    assert facts["dropped"] == {"duplicate by decision": 1}
    assert [found[f"k000{i}"]["kept"] for i in range(5)] == [True, True, True, False, True]
    assert (found["k0001"]["verdict"], found["k0001"]["how"]) == ("alternate", "by decision")
    assert (found["k0003"]["verdict"], found["k0003"]["how"]) == ("copy", "by decision; mirrored")
    assert found["k0000"]["group"] == found["k0001"]["group"]
    found, facts = run(columns, turned((0, 1, "different"), (0, 9, "copy")), compared=found_pairs)
    assert facts["dropped"] == {}
    # they still look alike to anyone who searches, so they share a split
    assert found["k0000"]["group"] == found["k0001"]["group"]
    assert (found["k0001"]["verdict"], found["k0001"]["resembles"]) == ("", "")
    assert any("1 verdicts on pairs have no effect" in note for note in facts["notes"])


def test_a_copy_by_decision_under_two_labels_is_a_conflict() -> None:
    columns = rows(*({"sha256": digest(i), "label": "ab"[i]} for i in range(2)), {})
    assert run(columns)[1]["dropped"] == {}
    assert run(columns, turned((0, 1, "copy")))[1]["dropped"] == {"label conflict": 2}


@pytest.mark.parametrize(
    ("by_keys", "verdict", "message"),
    [
        (
            'same = [["k0000", "k0001"]]',
            "alternate",
            "k0000 and k0001 are declared the same by their keys, and alternate",
        ),
        ('different = [["k0001", "k0000"]]', "copy", "k0000 and k0001 are declared different by their keys, and copy"),
    ],
)
def test_decisions_that_contradict_one_another_are_refused(by_keys: str, verdict: str, message: str) -> None:
    columns = rows(*({"sha256": digest(i)} for i in range(3)))
    both = f'{by_keys}, pairs = [{{images = ["{digest(0)}", "{digest(1)}"], verdict = "{verdict}"}}]'
    with pytest.raises(UsageError, match=message):
        run(columns, decided(both))
    twins = rows(*({"sha256": digest(i), "pixels_blake3": f"p{i // 2}"} for i in range(4)), {})
    with pytest.raises(UsageError, match="k0000 and k0002 are declared both copy and different: remove one"):
        run(twins, turned((0, 2, "copy"), (1, 3, "different")))


def test_a_build_that_reports_says_what_it_found() -> None:
    twin = {"sha256": "s", "pixels_blake3": "p"}
    columns = rows({}, {}, {**twin}, {**twin, "label": "b"}, {}, {})
    found_pairs = pairs(
        ("k0000", "k0001", "copy", {"how": "turned 90°"}), ("k0004", "k0005", "copy", {"mirrored": True})
    )
    _, facts = run(columns, "duplicates.action=report", compared=found_pairs)
    assert (
        'duplicates were found and kept (duplicates.action = "report"), in pairs: '
        "1 equal bytes, 1 copy, 1 mirrored copy" in facts["notes"]
    )
    label = columns["labels"][2][0]
    assert (
        "for example copy: k0000 and k0001 (turned 90°); mirrored copy: k0004 and k0005; "
        f"two labels: k0002 under {label} and k0003 under b" in facts["notes"]
    )
    _, facts = run(rows({}, {}), "duplicates.action=report")
    assert "no duplicates were found" in facts["notes"]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_their_order(rng: random.Random) -> None:
    columns = rows(*({"phash": 1, "thumbnail": bytes(768), "label": "ab"[i % 2]} for i in range(4)), {}, {})
    keys = columns["key"]
    sets = [rng.sample(keys, 2) for _ in range(3)]
    turns = [PairDecision(images=[digest(i), digest(i + 1)], verdict="copy") for i in range(3)]
    other = [PairDecision(images=each.images[::-1], verdict="copy") for each in turns[::-1]]
    first = Decisions(exclude=[keys[5]], same=sets, pairs=turns)
    second = Decisions(exclude=[keys[5]], same=[each[::-1] for each in sets[::-1]], pairs=other)
    assert first.to_toml() == second.to_toml()
    recipe = animesion.load_recipe("folder", ["source.path=x"])
    tables = [
        decided_table(columns, recipe.model_copy(update={"curate": CurateSection(decisions=each)}), {})[0]
        for each in (first, second)
    ]
    assert tables[0].equals(tables[1])


def test_the_recipe_holds_the_decisions_and_not_the_files_name(tmp_path: Path) -> None:
    for name in ("one.toml", "other.toml"):
        (tmp_path / name).write_text('exclude = ["a"]\n[label]\nb = "rin"\n')
    one, other = (
        animesion.load_recipe("folder", ["source.path=x", f'curate.decisions="{tmp_path / name}"'])
        for name in ("one.toml", "other.toml")
    )
    assert one == other
    assert one.digest() == other.digest() != animesion.load_recipe("folder", ["source.path=x"]).digest()
    assert str(tmp_path) not in one.to_toml()
    (tmp_path / "recipe.toml").write_text(one.to_toml())
    assert animesion.load_recipe(str(tmp_path / "recipe.toml")) == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('exclude = ["a"]\n[label]\na = "x"\n', "a is excluded and has a label"),
        (
            'same = [["a", "b"], ["b", "c"]]\ndifferent = [["c", "a"]]\n',
            "a and c are declared both the same and different",
        ),
        ('same = [["a"]]\n', "same"),
        ('exclude = ["../etc"]\n', "exclude"),
        ("labels = {}\n", "did you mean 'label'"),
        ("exclude = [\n", "not valid TOML"),
        ('label = {a = "x\\u0000"}\n', "label"),
        (f'[[pairs]]\nimages = ["{"0" * 64}", "{"0" * 64}"]\nverdict = "copy"\n', "is given twice: name two images"),
        (f'[[pairs]]\nimages = ["../x", "{"0" * 64}"]\nverdict = "copy"\n', "images"),
        (f'[[pairs]]\nimages = ["{"0" * 64}", "{"1" * 64}"]\nverdict = "part"\n', "verdict"),
        (
            "".join(
                f'[[pairs]]\nimages = ["{"0" * 64}", "{"1" * 64}"]\nverdict = "{verdict}"\n'
                for verdict in ("copy", "alternate")
            ),
            "are declared both copy and alternate",
        ),
    ],
)
def test_wrong_decisions_are_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        animesion.load_recipe("folder", ["source.path=x", f'curate.decisions="{path}"'])


def test_a_split_without_images_is_a_note() -> None:
    columns = rows(*({"label": f"class {i // 2}"} for i in range(10)))
    _, facts = run(columns, "split.strategy=grouped")
    assert any(re.match(r"no images in split (val|test|val and test): the classes are too small", note)
               for note in facts["notes"]), facts["notes"]  # fmt: skip
    _, facts = run(columns, "split.strategy=single")
    assert not any("no images in split" in note for note in facts["notes"])


def test_classes_are_split_without_a_common_group() -> None:
    labels = [f"c{i}" for i in range(8)]
    images = [{"label": label} for label in labels for _ in range(3)]
    # each class shares a post with the next one, and one has no image of its own
    shared = [{"label": label, "families": [f"post:{i}"]} for i, label in enumerate(labels)]
    shared += [{"label": labels[(i + 1) % 8], "families": [f"post:{i}"]} for i in range(8)]
    lost = [{"label": "lost", "families": ["post:big"]}, *({"label": "c0", "families": ["post:big"]} for _ in range(9))]
    columns = rows(*images, *shared, *lost)
    settings = ["split.strategy=by-class", "split.train=50", "split.val=10", "split.test=40", "split.seed=3"]
    found, facts = run(columns, *settings)
    kept = [row for row in found.values() if row["kept"]]
    assert {len({row["split"] for row in kept if row[name] == each}) for name in ("label", "group") for each in
            {row[name] for row in kept}} == {1}  # fmt: skip
    assert set(facts["dropped"]) == {"class apart"}
    apart = facts["dropped"]["class apart"]
    assert any(note.startswith(f"{apart} images were dropped because most of their group") for note in facts["notes"])
    # ids are without gaps, also if a class has lost all of its images
    assert {row["label"]: row["class_id"] for row in kept} == {name: i for i, name in enumerate(facts["classes"])}
    again, _ = run({name: values[::-1] for name, values in columns.items()}, *settings)
    assert {key: row["split"] for key, row in again.items()} == {key: row["split"] for key, row in found.items()}
    _, few = run(rows({"label": "a"}, {"label": "b"}), *settings)
    assert few["notes"][-1] == "no images in split test: there are too few classes for the shares of the recipe"


def test_published_splits_with_relatives_are_noted() -> None:
    columns = rows(
        {"split": "train", "families": ["post:1"]},
        {"split": "val", "families": ["post:1", "post:2"]},
        {"split": "test", "families": ["post:2"]},
        {"split": "test"},
        {"split": "train", "families": ["post:3"]},
        {"split": "train", "families": ["post:3"]},
    )
    said = "images related to one of an earlier split, by family or as duplicates: 1 of 1 in val and 1 of 2 in test"
    _, facts = run(columns, "split.strategy=published")
    assert any(note.startswith(said) for note in facts["notes"]), facts["notes"]
    _, grouped = run(columns, "split.strategy=grouped")
    assert not any("earlier split" in note for note in grouped["notes"])
    del columns["families"]
    columns["families"] = [[] for _ in columns["key"]]
    _, apart = run(columns, "split.strategy=published")
    assert not any("earlier split" in note for note in apart["notes"])


def test_names_are_families_also_where_the_source_lists_none() -> None:
    columns = rows(
        {"source_id": "https://a.example/leaf.jpg"},
        {"source_id": "https://a.example/leaf%20(1).jpg"},
        {"source_id": "https://b.example/leaf.jpg"},
        {"source_id": "x/9000001_p0.png", "label": "rin"},
        {"source_id": "y/9000001_p1.png"},
    )
    found, _ = run(columns)
    assert [found[f"k{i:04d}"]["group"] for i in range(5)] == ["k0000", "k0000", "k0002", "k0003", "k0003"]
    found, _ = run(columns, "source.family=''")
    assert len({row["group"] for row in found.values()}) == 5


# -- faces -------------------------------------------------------------------------------------------------------------


def faces(*scores: float, **more: Any) -> dict[str, Any]:
    """An image in which a detector found boxes of these scores, best first."""
    best, second = [*scores, 0.0, 0.0][:2]
    crop = {"crop": [10, 10, 60, 60]} if scores else {}
    boxes = {"box_count": len(scores), "best_score": best, "second_score": second}
    return {"faces": len(scores), "face_score": best, **boxes, **crop, **more}


SCORES = [(0.9,), (0.9, 0.8), (0.9, 0.4), (0.9, 0.1), (0.9, 0.4, 0.2), (0.4,), (0.4, 0.3), (0.1,), ()]


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        # as before there were unsure boxes: every box counts
        ((), ["", "s", "s", "s", "s", "u", "s", "u", "n"]),
        (("crop.unsure=report",), ["", "s", "", "", "", "u", "u", "u", "n"]),
        (("crop.unsure_score=0.2",), ["", "s", "s", "", "s", "u", "s", "n", "n"]),
        (("crop.unsure_score=0.2", "crop.unsure=report"), ["", "s", "", "", "", "u", "u", "n", "n"]),
        (("crop.unsure_score=0.6",), ["", "s", "", "", "", "n", "n", "n", "n"]),
        (("crop.faces=best", "crop.unsure_score=0.2"), ["", "", "", "", "", "u", "u", "n", "n"]),
    ],
)
def test_a_second_box_that_is_unsure_counts_as_the_recipe_says(settings: tuple[str, ...], reasons: list[str]) -> None:
    names = {"": "", "s": "several faces", "u": "unsure face", "n": "no face"}
    overrides = ("crop.detector=lbp", "crop.min_score=0.6", *settings)
    found, facts = run(rows(*(faces(*each) for each in SCORES)), *overrides)
    assert [row["reason"] for row in found.values()] == [names[each] for each in reasons]
    unsure = [i for i, row in enumerate(found.values()) if row["detail"].startswith("perhaps a second face")]
    notes = " ".join(facts["notes"])
    if "crop.unsure=report" in settings:
        assert unsure == ([2, 4] if "crop.unsure_score=0.2" in settings else [2, 3, 4])
        assert f"{len(unsure)} images that passed the limits perhaps have a second face" in notes
    else:
        assert unsure == []
        dropped = {"crop.unsure_score=0.2": 2, "crop.unsure_score=0.6": 0}.get(" ".join(settings[-1:]), 3)
        dropped = 0 if "crop.faces=best" in settings else dropped
        assert (f"{dropped} images were dropped as 'several faces' although" in notes) == (dropped > 0)


def test_two_characters_are_several_faces_whatever_was_found() -> None:
    images = rows(faces(0.9), faces(), faces(0.9), {**faces(0.9), "width": 3, "height": 3})
    recipe = animesion.load_recipe("folder", ["source.path=x", "crop.detector=lbp", "filter.min_side=10"])
    decisions = Decisions(several=["k0000", "k0001", "k0003", "absent"])
    table, facts = decided_table(images, recipe.model_copy(update={"curate": CurateSection(decisions=decisions)}), {})
    assert table["reason"].to_pylist() == ["several faces", "several faces", "", "too small"]
    assert table["detail"].to_pylist()[:2] == ["by decision"] * 2
    assert "decisions: 4 images of several characters" in facts["notes"]
    assert "decisions: 1 key matches no image of this source" in facts["notes"]


def test_a_box_by_decision_is_the_one_face() -> None:
    images = rows({**faces(0.9, 0.4), "faces": 1, "face_score": 1.0}, faces(0.9))
    recipe = animesion.load_recipe("folder", ["source.path=x", "crop.detector=lbp", "crop.unsure=report"])
    decisions = Decisions(box={"k0000": [0.1, 0.1, 0.5, 0.5]})
    table, facts = decided_table(images, recipe.model_copy(update={"curate": CurateSection(decisions=decisions)}), {})
    assert table["reason"].to_pylist() == ["", ""]
    assert "decisions: 1 box" in facts["notes"]
    assert not any("perhaps" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"box": {"a": [0.1, 0.1, 0.1, 0.5]}}, "a has a box that ends before it starts"),
        ({"box": {"a": [0.1, 0.1, 1.5, 0.5]}}, "less than or equal to 1"),
        ({"box": {"a": [0.1, 0.1, 0.5]}}, "at least 4 items"),
        ({"box": {"a": [0.1, 0.1, float("nan"), 0.5]}}, "finite number|greater than or equal"),
        ({"box": {"a": [0.1, 0.1, 0.4, 0.5]}, "exclude": ["a"]}, "a is excluded and has a box"),
        ({"box": {"a": [0.1, 0.1, 0.4, 0.5]}, "several": ["a"]}, "shows several characters and has another decision"),
    ],
)
def test_decisions_on_boxes_that_make_no_sense_are_refused(decisions: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decisions.model_validate(decisions)


def test_decisions_on_boxes_are_read_back(tmp_path: Path) -> None:
    made = Decisions(box={"b": [0.1, 0.25, 1, 1], "a": [0, 0, 0.5, 0.5]}, several=["d", "c", "c"])
    (tmp_path / "d.toml").write_text(made.to_toml())
    again = read_decisions(tmp_path / "d.toml")
    assert again.box == made.box
    assert again.several == ["c", "d"]
    assert again.to_toml() == made.to_toml()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["crop.unsure_score=0.9", "crop.min_score=0.8"], r"unsure_score \(0.9\) is above min_score \(0.8\)"),
        (["crop.detector=['lbp']"], "a list of detectors needs two or more"),
        (["crop.detector=['lbp', 'none']"], "a list of detectors needs two or more"),
    ],
)
def test_limits_on_boxes_that_contradict_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        animesion.load_recipe("folder", ["source.path=x", *settings])
