"""Copies in a build: dropped with their transform, kept in one split, and found by verify where splits part them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from click.testing import CliRunner
from PIL import Image, ImageDraw, ImageOps

import animesion
from animesion.cli import cli
from animesion.dedup import extraction
from animesion.errors import UsageError
from animesion.images import other_hashes
from animesion.progress import Progress
from animesion.report import facts, live, page
from animesion.report.pairs import KINDS
from animesion.schemas import PAIRS
from animesion.storage import parquet
from tests.serving import served
from tests.unit.test_copies import cut, jpeg, scene, turned

PATHS = {"labels": "labels.csv", "images": "images", "faces": "faces.tsv"}


class Notes(Progress):
    """What a build notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def build(
    images: Path, out: Path, *overrides: str, workers: int = 1, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    recipe = animesion.load_recipe("folder", [f'source.path="{images}"', 'source.family=""', *overrides])
    animesion.build(recipe, out, workers=workers, replace=True, progress=progress)
    return {Path(row["source_id"]).stem: row for row in pq.read_table(out / "curated.parquet").to_pylist()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of two classes, three copies and an alternate of the first, and a copy under another label."""
    root = tmp_path_factory.mktemp("images")
    for name in ("miku", "rin"):
        (root / name).mkdir()
    for seed in range(12):
        scene(seed).save(root / ("miku" if seed % 2 else "rin") / f"scene{seed}.png")
    first = scene(0)
    turned(90)(first).save(root / "rin" / "turned.png")
    cut(0.1, 0.1, 1.0, 1.0)(first).save(root / "rin" / "cut.png")
    ImageOps.mirror(first).save(root / "rin" / "mirrored.png")
    other = first.copy()
    ImageDraw.Draw(other).ellipse((60, 80, 76, 90), fill=(120, 20, 30))
    other.save(root / "rin" / "other.png")
    jpeg(70)(cut(0.0, 0.0, 0.9, 0.9)(scene(1))).save(root / "rin" / "mislabelled.png")
    return root


@pytest.mark.parametrize("copies", ["local", "hash"])
def test_copies_are_dropped_and_relatives_share_a_split(images: Path, tmp_path: Path, copies: str) -> None:
    rows = build(images, tmp_path / "out", f"duplicates.copies={copies}")
    first = rows["scene0"]
    cut_copy = rows["cut"]
    assert (cut_copy["reason"], cut_copy["keeper"], cut_copy["verdict"]) == ("near duplicate", first["key"], "copy")
    assert "0.10 0.10 1.00 1.00" in cut_copy["how"]
    assert cut_copy["inliers"] >= 13
    assert rows["other"]["kept"]
    assert (rows["other"]["resembles"], rows["other"]["verdict"]) == (first["key"], "alternate")
    assert rows["mislabelled"]["reason"] == rows["scene1"]["reason"] == "label conflict"
    # the hashes of windows see no turned copy, and a mirrored one by the hash of the mirror image
    related = ["cut", "mirrored", "other", *(["turned"] if copies == "local" else [])]
    assert {rows[name]["group"] for name in related} == {first["group"]}
    assert rows["mirrored"]["kept"]
    if copies == "local":
        assert (rows["turned"]["reason"], rows["turned"]["how"]) == ("near duplicate", "turned 90°")
    assert len({row["group"] for name, row in rows.items() if name.startswith("scene")}) == 12
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_verdicts_do_not_depend_on_the_workers(images: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build(images, tmp_path / str(workers), workers=workers)
    sums = [(tmp_path / str(workers) / "SHA256SUMS").read_text() for workers in (1, 2)]
    assert sums[0] == sums[1]


def test_a_published_split_that_cuts_copies_apart_is_refused(tmp_path: Path) -> None:
    for seed in range(8):
        folder = tmp_path / "in" / ("train" if seed < 6 else "test") / "miku"
        folder.mkdir(parents=True, exist_ok=True)
        scene(seed).save(folder / f"scene{seed}.png")
    leaked = tmp_path / "in" / "test" / "miku"
    turned(180)(scene(0)).save(leaked / "leaked.png")
    cut(0.2, 0.0, 1.0, 0.85)(scene(1)).save(leaked / "part.png")
    build(tmp_path / "in", tmp_path / "out", "duplicates.action=report")
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 1
    checks = {check["check"]: check["faults"] for check in json.loads(done.stdout)["checks"]}
    faults = [fault["fault"] for fault in checks["leaks"]]
    assert len(faults) == 2
    assert any("copy (turned" in fault and "180°" in fault for fault in faults)
    assert any("shows 0.20 0.00 1.00 0.85" in fault or "shown in 0.20 0.00 1.00 0.85" in fault for fault in faults)


def test_two_crops_of_one_picture_posted_twice_are_one_sample(tmp_path: Path) -> None:
    wide = scene(3, (420, 200))
    images = {1: wide, 2: jpeg(80)(wide)} | {seed: scene(seed, (420, 200)) for seed in range(20, 26)}
    for number, image in images.items():
        (tmp_path / "images" / f"{number:04}").mkdir(parents=True)
        image.save(tmp_path / "images" / f"{number:04}" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("".join(f"0,{number:04}/{number}.png\n" for number in images))
    # a detector took the left face of one and the right face of the other
    sides = {1: (0.0, 0.5), 2: (0.5, 1.0)}
    lines = [
        f"{number:04}/{number}.png\t7\t{left},0.0,{right},1.0,0.99"
        for number, (left, right) in ((number, sides.get(number, (0.1, 0.6))) for number in images)
    ]
    (tmp_path / "faces.tsv").write_text("\n".join(lines) + "\n")
    settings = [f"source.{name}={tmp_path / path}" for name, path in PATHS.items()]
    recipe = animesion.load_recipe("folder", ["source={kind='labels'}", *settings, "crop.detector=boxes"])
    animesion.build(recipe, tmp_path / "out", workers=1)
    table = pq.read_table(tmp_path / "out" / "curated.parquet").to_pylist()
    rows = {Path(row["source_id"]).stem: row for row in table}
    [dropped] = [name for name, row in rows.items() if not row["kept"]]
    keeper = {"1": "2", "2": "1"}[dropped]
    assert (rows[dropped]["keeper"], rows[dropped]["verdict"]) == (rows[keeper]["key"], "copy")
    assert rows["1"]["group"] == rows["2"]["group"]


def test_pictures_without_features_are_compared_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "in" / "miku").mkdir(parents=True)
    for i, box in enumerate(((20, 20, 60, 90), (30, 50, 100, 70), (60, 20, 110, 110))):
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse(box, fill=(180, 40, 40))
        image.save(tmp_path / "in" / "miku" / f"plain{i}.png")
        image.save(tmp_path / "in" / "miku" / f"again{i}.jpg", quality=70)
    rows = build(tmp_path / "in", tmp_path / "out")
    assert {name: row["keeper"] for name, row in rows.items() if not row["kept"]} == {
        f"again{i}": rows[f"plain{i}"]["key"] for i in range(3)
    }


def test_features_of_another_search_or_version_are_computed_again_and_noted(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "old", "duplicates.copies=hash", "name=old")
    (tmp_path / "in" / "rin").mkdir(parents=True)
    turned(90)(scene(2)).save(tmp_path / "in" / "rin" / "turned.png")
    scene(60).save(tmp_path / "in" / "rin" / "other.png")
    against = f'duplicates.against=["{tmp_path / "old"}"]'
    rows = build(tmp_path / "in", tmp_path / "new", against, "duplicates.copies=local")
    assert (rows["turned"]["reason"], rows["other"]["kept"]) == ("published duplicate", True)
    assert "turned" in rows["turned"]["detail"]
    version = extraction.version("local")
    note = f"the features of old are of another search, so those for {version} were computed from its packed images"
    assert f"published datasets: {note}" in notes_of(tmp_path / "new")
    # a dataset that another version of OpenCV made, as its dataset.json says
    build(images, tmp_path / "older", "name=older")
    made_with = json.loads((tmp_path / "older" / "dataset.json").read_text())["made_with"]
    assert made_with["copies"] == version
    text = (tmp_path / "older" / "dataset.json").read_text().replace(version, "local-1/opencv-4.0.0")
    digest = hashlib.sha256((tmp_path / "older" / "dataset.json").read_bytes()).hexdigest()
    (tmp_path / "older" / "dataset.json").write_text(text)
    sums = (tmp_path / "older" / "SHA256SUMS").read_text()
    (tmp_path / "older" / "SHA256SUMS").write_text(sums.replace(digest, hashlib.sha256(text.encode()).hexdigest()))
    again = build(tmp_path / "in", tmp_path / "newer", f'duplicates.against=["{tmp_path / "older"}"]')
    assert again["turned"]["reason"] == "published duplicate"
    [note] = [note for note in notes_of(tmp_path / "newer") if "were computed" in note]
    assert "the features of older are of local-1/opencv-4.0.0, so" in note


def notes_of(out: Path) -> list[str]:
    notes: list[str] = json.loads((out / "dataset.json").read_text())["notes"]
    return notes


def test_a_damaged_image_of_a_published_dataset_is_one_sentence(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "old")
    for shard in (tmp_path / "old" / "data").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "in" / "rin").mkdir(parents=True)
    cut(0.1, 0.0, 1.0, 0.95)(scene(2)).save(tmp_path / "in" / "rin" / "cut.png")
    with pytest.raises(UsageError, match=r"the image at byte \d+ cannot be compared"):
        build(tmp_path / "in", tmp_path / "new", f'duplicates.against=["{tmp_path / "old"}"]')


def test_hashes_of_two_kinds_are_never_compared(tmp_path: Path) -> None:
    for seed in range(5):
        folder = tmp_path / ("old" if seed < 4 else "new") / "miku"
        folder.mkdir(parents=True, exist_ok=True)
        scene(seed).save(folder / f"scene{seed}.png")
    jpeg(80)(scene(0).resize((80, 70))).save(tmp_path / "new" / "miku" / "copied.png")
    old = tmp_path / "published"
    off = "duplicates.copies=off"
    build(tmp_path / "old", old, "name=old", off, "duplicates.hash=dhash")
    verified = CliRunner().invoke(cli, ["verify", str(old)])
    assert verified.exit_code == 0, verified.output
    assert "copies are searched by the dhash of whole images" in " ".join(verified.output.split())
    against = f'duplicates.against=["{old}"]'
    with pytest.raises(UsageError, match=r'old was built with duplicates.hash = "dhash", which cannot be compared'):
        build(tmp_path / "new", tmp_path / "whash", off, against, "duplicates.hash=whash")
    for kind in ("dhash", "phash"):  # every dataset has pHashes
        rows = build(tmp_path / "new", tmp_path / kind, off, against, f"duplicates.hash={kind}")
        assert rows["copied"]["reason"] == "published duplicate"
        assert rows["scene4"]["kept"]
    # another hash in the same folder: its features are computed again
    recipe = animesion.load_recipe("folder", [f'source.path="{tmp_path / "old"}"', off, "duplicates.hash=whash"])
    animesion.build(recipe, old, workers=1, replace=True)
    features = pq.read_table(old / "features" / "part-00000.parquet").to_pylist()
    assert {row["hash_kind"] for row in features} == {"whash"}
    assert {row["hash"] for row in features} == {other_hashes.compute("whash", scene(seed)) for seed in range(4)}


def test_another_hash_adds_candidates_that_are_verified(images: Path, tmp_path: Path) -> None:
    rows = build(images, tmp_path / "out", "duplicates.copies=hash", "duplicates.hash=dhash")
    assert (rows["cut"]["reason"], rows["cut"]["verdict"]) == ("near duplicate", "copy")
    assert rows["other"]["kept"]
    features = pq.read_table(tmp_path / "out" / "features" / "part-00000.parquet", columns=["hash_kind", "hash"])
    assert set(features["hash_kind"].to_pylist()) == {"dhash"}
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_a_build_that_grows_compares_its_new_images_only(images: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(images, tmp_path / "in")
    build(grown, tmp_path / "out")
    first, images_searched = compared(tmp_path / "out"), searched(tmp_path / "out")
    assert first > 0
    # one more image that comes first, and one that is gone
    cut(0.0, 0.05, 0.95, 1.0)(scene(4)).save(grown / "miku" / "a cut.png")
    (grown / "rin" / "mirrored.png").unlink()
    gone, added = Notes(), Notes()
    build(grown, tmp_path / "out", progress=gone)
    assert any("all images are searched for copies again" in text for text in gone.texts)
    assert 0 < compared(tmp_path / "out") < first
    assert searched(tmp_path / "out") == images_searched
    # none is gone: the new image alone is looked up, also where another has the pixels of one with a later key
    cut(0.05, 0.0, 1.0, 0.95)(scene(5)).save(grown / "rin" / "b cut.png")
    scene(0).save(grown / "miku" / "a scene0.png")
    build(grown, tmp_path / "out", progress=added)
    assert not any("again" in text for text in added.texts)
    build(grown, tmp_path / "fresh")
    assert (searched(tmp_path / "out"), searched(tmp_path / "fresh")) == (1, images_searched + 1)
    assert 0 < compared(tmp_path / "out") < compared(tmp_path / "fresh")
    for name in ("SHA256SUMS", *(f"features/{name}.parquet" for name in ("pairs", "compared", "searched"))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name
    # other settings that find fewer candidates keep the verdicts, too; files of another origin do not count
    build(grown, tmp_path / "out", "duplicates.radius=2")
    assert compared(tmp_path / "out") == 0
    table = pq.read_table(tmp_path / "out" / "features/pairs.parquet")
    pq.write_table(table, tmp_path / "out" / "features/pairs.parquet")
    build(grown, tmp_path / "out")
    assert compared(tmp_path / "out") == compared(tmp_path / "fresh")
    assert pq.read_table(tmp_path / "out" / "features/pairs.parquet") == pq.read_table(
        tmp_path / "fresh" / "features/pairs.parquet"
    )


def compared(out: Path) -> int:
    """How many pairs the last build compared."""
    return int(json.loads((out / ".receipts" / "compare.json").read_text())["facts"]["compared"])


def searched(out: Path) -> int:
    """How many images the last build looked up."""
    return int(json.loads((out / ".receipts" / "compare.json").read_text())["facts"]["searched"])


@pytest.fixture(scope="module")
def local(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    build(images, out)
    return out


def stems(dataset: Path, pairs: list[dict[str, Any]]) -> list[set[str]]:
    rows = {row["key"]: Path(row["source_id"]).stem for row in pq.read_table(dataset / "curated.parquet").to_pylist()}
    return [{rows[pair[side]["key"]] for side in ("first", "second")} for pair in pairs]


def test_the_report_shows_pairs_in_one_frame_with_the_difference_lit(local: Path) -> None:
    shown = facts.of_dataset(animesion.open_dataset(local))
    pairs = shown["pairs"]
    assert stems(local, pairs["items"]["conflict"]) == [{"scene1", "mislabelled"}]
    assert {pairs["items"]["conflict"][0][side]["label"] for side in ("first", "second")} == {"miku", "rin"}
    [alternate] = [pair for pair in pairs["items"]["alternate"] if {"scene0", "other"} == stems(local, [pair])[0]]
    strip = Image.open(io.BytesIO(base64.b64decode(shown["images"][alternate["image"]]))).convert("RGB")
    side = (strip.width - 2 * 4) // 3
    first, second, lit = (np.asarray(strip)[:, i * (side + 4) : i * (side + 4) + side].astype(int) for i in range(3))
    # the ellipse of the alternate is at (60..76, 80..90) of 220 x 180
    height = strip.height
    inside = np.s_[int(height * 82 / 180) : int(height * 88 / 180), int(side * 63 / 220) : int(side * 73 / 220)]
    orange = lit[..., 0] - lit[..., 2]
    assert orange[inside].mean() > 100
    assert orange.mean() < 15
    assert np.abs(first - second)[inside].mean() > 3 * np.abs(first - second).mean()
    copies = {
        frozenset(names): pair
        for names, pair in zip(stems(local, pairs["items"]["copy"]), pairs["items"]["copy"], strict=True)
    }
    turned_copy = copies[frozenset({"scene0", "turned"})]
    assert "turned" in turned_copy["how"]
    strip = Image.open(io.BytesIO(base64.b64decode(shown["images"][turned_copy["image"]]))).convert("RGB")
    side = (strip.width - 8) // 3
    panels = [np.asarray(strip)[:, i * (side + 4) : i * (side + 4) + side].astype(int) for i in range(3)]
    assert np.abs(panels[0] - panels[1])[4:-4, 4:-4].mean() < 12
    assert pairs["totals"] == {kind: len(items) for kind, items in pairs["items"].items()}


def test_a_report_of_thousands_of_pairs_stays_small(local: Path, tmp_path: Path) -> None:
    out = shutil.copytree(local, tmp_path / "out")
    rows = pq.read_table(out / "features/pairs.parquet").to_pylist()
    before = len(page.render(facts.of_dataset(animesion.open_dataset(out))))
    many = [{**row, "residual": float(i)} for i in range(300) for row in rows]
    parquet.write(out / "features/pairs.parquet", pa.Table.from_pylist(many, schema=PAIRS))
    found = facts.of_dataset(animesion.open_dataset(out))
    assert sum(found["pairs"]["totals"].values()) == len(many)
    items = found["pairs"]["items"]
    assert all(len(items[kind]) <= most for kind, most in KINDS.items())
    assert items["copy"][0]["residual"] == 299.0  # the doubtful ones
    assert items["alternate"][0]["residual"] == 0.0
    assert len(page.render(found)) < before + 4 / 3 * facts.PAIR_BYTES + 1000 * sum(KINDS.values())


@pytest.mark.parametrize(
    "change",
    [
        {"transform": [float("nan")] * 6},
        {"transform": [1e30, 0, 0, 0, 1e30, 0]},
        {"transform": [0.0] * 6},
        {"residual": float("inf")},
        {"verdict": "</script>"},
        {"first": "unknown"},
        {"how": None},
    ],
)
def test_pairs_that_no_search_writes_are_not_drawn(local: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = shutil.copytree(local, tmp_path / "out")
    rows = pq.read_table(out / "features/pairs.parquet").to_pylist()
    harmed = [{**rows[0], "how": "</script><img src=x>" + "x" * 9999}, *({**row, **change} for row in rows[1:])]
    parquet.write(out / "features/pairs.parquet", pa.Table.from_pylist(harmed, schema=PAIRS))
    found = facts.of_dataset(animesion.open_dataset(out))
    [shown] = [pair for pairs in found["pairs"]["items"].values() for pair in pairs]
    assert len(shown["how"]) == facts.MOST_TEXT
    assert "</script><img" not in page.render(found)
    (out / "features/pairs.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UsageError, match="is damaged: delete it, or run"):
        facts.of_dataset(animesion.open_dataset(out))
    (out / "features/pairs.parquet").unlink()
    assert facts.of_dataset(animesion.open_dataset(out))["pairs"]["totals"]["alternate"] == 0


def test_a_curator_turns_verdicts_and_the_next_build_applies_them(images: Path, local: Path, tmp_path: Path) -> None:
    browser = live.Browser(animesion.open_dataset(local), tmp_path / "decisions.toml")
    before = {Path(row["source_id"]).stem: row for row in pq.read_table(local / "curated.parquet").to_pylist()}
    with served(live.application(browser, "token")) as port:
        site = f"http://127.0.0.1:{port}"
        asked = {kind: requests.get(f"{site}/api/pairs?kind={kind}", timeout=10).json() for kind in KINDS}
        pairs = {
            frozenset(names): pair
            for answer in asked.values()
            for names, pair in zip(stems(local, answer["items"]), answer["items"], strict=True)
        }
        wanted = {("scene0", "cut"): "alternate", ("scene0", "other"): "copy", ("scene1", "mislabelled"): "different"}
        turned_pairs = [
            {"images": pairs[frozenset(names)]["ids"], "verdict": verdict} for names, verdict in wanted.items()
        ]
        answer = requests.get(f"{site}/api/pairs/{pairs[frozenset({'scene0', 'cut'})]['number']}", timeout=10)
        assert Image.open(io.BytesIO(answer.content)).width > 3 * 200
        for wrong in ("x", "-1", "9999", "../image/x"):
            assert requests.get(f"{site}/api/pairs/{wrong}", timeout=10).status_code in (400, 404)
        headers = {live.TOKEN_HEADER: "token"}
        body = {"decisions": {"pairs": turned_pairs}, "revision": ""}
        assert requests.put(f"{site}/api/decisions", json=body, headers=headers, timeout=10).status_code == 200
    text = (tmp_path / "decisions.toml").read_text()
    assert before["cut"]["sha256"] in text
    # digests and not keys: the decisions hold where files have other names
    renamed = shutil.copytree(images, tmp_path / "in")
    (renamed / "rin" / "cut.png").rename(renamed / "rin" / "another name.png")
    decided = f'curate.decisions="{tmp_path / "decisions.toml"}"'
    after = build(renamed, tmp_path / "out", decided)
    assert after["another name"]["kept"]
    assert after["another name"]["group"] == after["scene0"]["group"]
    assert (after["other"]["reason"], after["other"]["keeper"]) == ("duplicate by decision", after["scene0"]["key"])
    assert (after["other"]["verdict"], after["other"]["how"].partition(";")[0]) == ("copy", "by decision")
    assert after["scene1"]["kept"]
    assert after["mislabelled"]["kept"]
    assert before["mislabelled"]["reason"] == "label conflict"
    shown = facts.of_dataset(animesion.open_dataset(tmp_path / "out"))["pairs"]
    assert {
        frozenset(names): pair["decided"]
        for kind in KINDS
        for names, pair in zip(stems(tmp_path / "out", shown["items"][kind]), shown["items"][kind], strict=True)
        if pair["decided"]
    } == {
        frozenset({"scene0", "another name"}): "alternate",
        frozenset({"scene0", "other"}): "copy",
        frozenset({"scene1", "mislabelled"}): "different",
    }
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_a_build_that_only_reports_prints_what_it_found(images: Path, tmp_path: Path) -> None:
    command = [
        "build",
        "folder",
        "--set",
        f"source.path={images}",
        "--set",
        "duplicates.action=report",
        "--workers",
        "1",
    ]
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    [note] = [line for line in done.stdout.splitlines() if "duplicates were found and kept" in line]
    pairs = pq.read_table(tmp_path / "out" / "features/pairs.parquet").to_pylist()
    plain = [row["verdict"] for row in pairs if not row["mirrored"]]
    assert f"{plain.count('copy')} copy" in note
    assert f"{sum(row['mirrored'] and row['verdict'] == 'copy' for row in pairs)} mirrored copy" in note
    [examples] = [line for line in done.stdout.splitlines() if line.startswith("note: for example ")]
    assert "two labels: folder-" in examples
    assert " under miku" in examples
    assert " under rin" in examples
    assert "alternate: folder-" in examples
