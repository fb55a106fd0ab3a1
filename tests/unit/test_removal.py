"""Removal of images on request: what goes, what stays byte for byte, what later builds refuse, and interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import animesion
from animesion import publishing
from animesion.cli.remove import remove as command
from animesion.errors import UsageError
from animesion.images import codec
from animesion.pipeline import removal, removal_plan
from animesion.storage import removed
from animesion.verification import checks
from tests.conftest import draw, draw_folders


@pytest.fixture
def dataset(small_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_dataset, tmp_path / "small")


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", ".removal.lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def row_of(folder: Path, key: str) -> dict[str, Any]:
    return next(row for row in animesion.open_dataset(folder).curated.to_pylist() if row["key"] == key)


def a_sample(folder: Path, split: str = "train") -> str:
    return str(next(animesion.open_dataset(folder).samples(split)).key)


def assert_gone(folder: Path, row: dict[str, Any]) -> None:
    """No file has the image's bytes or names it, but the log, which has digests only."""
    texts = [row["key"], row["source_id"], row["md5"], row["sha256"], row["pixels_blake3"]]
    for name, content in contents(folder).items():
        if name.endswith(".parquet"):
            content = repr(pq.read_table(folder / name).to_pylist()).encode()
        for text in texts:
            assert name == removed.REMOVED or text.encode() not in content, (name, text)


def test_only_the_shards_concerned_are_written_again(dataset: Path) -> None:
    before, key = contents(dataset), a_sample(dataset)
    opened = animesion.open_dataset(dataset)
    row = row_of(dataset, key)
    samples = {each.key: (each.split, each.label, each.image) for each in opened.samples()}
    plan = removal.remove(dataset, [key], note="request 12")
    after = contents(dataset)
    assert [image.key for image in plan.images] == [key]
    assert plan.rewritten
    assert plan.untouched
    assert not plan.emptied
    for name in (name for name in before if name.startswith("data/") and name.endswith(".tar")):
        assert (after[name] != before[name]) == (name in plan.rewritten)
    left = animesion.open_dataset(dataset)
    del samples[key]
    assert {each.key: (each.split, each.label, each.image) for each in left.samples()} == samples
    assert [info.name for info in left.classes] == [info.name for info in opened.classes]
    assert_gone(dataset, row)
    assert removed.Removal(row["sha256"], row["pixels_blake3"], "", "request 12") in removed.read(dataset)
    assert checks.verify(left, workers=1).faults == {name: [] for name in checks.CHECKS}
    assert not (dataset / removal_plan.STAGE).exists()
    assert f"  {removed.REMOVED}\n" in (dataset / "SHA256SUMS").read_text()


def test_an_image_is_named_by_id_url_or_digest_and_nothing_else(dataset: Path) -> None:
    key = a_sample(dataset)
    row = row_of(dataset, key)
    digests = (row["md5"].upper(), row["sha256"], row["pixels_blake3"])
    for text in (key, row["source_id"], f"folder:{row['source_id']}", *digests):
        assert [each.key for each in removal.remove(dataset, [text], dry_run=True).images] == [key]
    before = contents(dataset)
    for text in ("nosuch", "", "https://example.org/1", "0" * 64, key[:-1]):
        with pytest.raises(UsageError, match="has no image"):
            removal.remove(dataset, [text])
    with pytest.raises(UsageError, match="nothing by the author"):
        removal.remove(dataset, [], ["nobody"])
    with pytest.raises(UsageError, match="nothing to remove"):
        removal.remove(dataset, [])
    with pytest.raises(UsageError, match="nothing would be left"):
        removal.remove(dataset, [row["key"] for row in animesion.open_dataset(dataset).curated.to_pylist()])
    assert contents(dataset) == before


def test_the_note_on_clusters_counts_what_is_left(tmp_path: Path) -> None:
    for number, names in enumerate((("a/1", "b/1"), ("a/2", "a/copy"), ("a/3",), ("b/3",), ("b/4",))):
        for name in names:  # the same bytes under two labels, and twice under one
            path = tmp_path / "images" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(number).save(path)
    recipe = animesion.load_recipe("folder", [f"source.path={tmp_path / 'images'}"])
    assert "1 of 2 duplicate clusters has several labels" in animesion.build(recipe, tmp_path / "out", workers=1).notes

    def keys(reason: str) -> list[str]:
        rows = animesion.open_dataset(tmp_path / "out").curated.to_pylist()
        return [row["key"] for row in rows if row["reason"] == reason]

    def notes() -> list[str]:
        notes: list[str] = json.loads((tmp_path / "out" / "dataset.json").read_bytes())["notes"]
        return [note for note in notes if "duplicate clusters" in note]

    removal.remove(tmp_path / "out", keys("exact duplicate"))
    assert notes() == ["1 of 1 duplicate clusters has several labels"]
    removal.remove(tmp_path / "out", keys("label conflict"))
    assert notes() == []


def test_a_dry_run_changes_nothing_and_prints_what_would_go(dataset: Path) -> None:
    before, key = contents(dataset), a_sample(dataset)
    result = CliRunner().invoke(command, [str(dataset), key, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert f"{key}: asked for; train" in result.output
    assert "1 image would be removed" in result.output
    assert contents(dataset) == before


def removed_until(folder: Path, key: str, stop: int) -> int:
    """The exit status of a process that removes an image and is killed at its nth rename."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count, replace = 0, Path.replace

    def killed(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = killed  # type: ignore[method-assign, assignment]
    try:
        removal.remove(folder, [key])
    finally:
        os._exit(0)


def test_a_removal_that_is_killed_leaves_the_old_dataset_or_completes(dataset: Path, tmp_path: Path) -> None:
    """Every file appears by a rename."""
    key = a_sample(dataset)
    whole = shutil.copytree(dataset, tmp_path / "whole")
    removal.remove(whole, [key])
    expected, before = contents(whole), contents(dataset)
    stable = {name for name in expected if not name.startswith(".receipts")}  # receipts have times of files
    ends = set()
    for stop in (4, *range(16, 90, 8)):
        folder = shutil.copytree(dataset, tmp_path / f"stopped{stop}")
        status = removed_until(folder, key, stop)
        if os.WIFEXITED(status):
            ends.add("done")
            assert {name: contents(folder)[name] for name in stable} == {name: expected[name] for name in stable}
            break
        if not (folder / "dataset.json").exists():
            with pytest.raises(UsageError, match="interrupted removal"):
                animesion.open_dataset(folder)
        done = removal.finished(folder, [key])
        after = contents(folder)
        if done is None:
            ends.add("old")
            assert {name: after[name] for name in before} == before
        else:
            ends.add("resumed")
            assert done.repeated
            assert [image.key for image in done.plan.images] == [key]
            assert {name: after[name] for name in stable} == {name: expected[name] for name in stable}
            assert after.keys() == expected.keys()
        shutil.rmtree(folder)
    assert ends == {"old", "resumed", "done"}


def test_later_builds_refuse_the_image(dataset: Path, tmp_path: Path) -> None:
    key = a_sample(dataset)
    row = row_of(dataset, key)
    removal.remove(dataset, [key])
    source = draw_folders(tmp_path / "again" / "world")
    original = source / row["source_id"]
    content = original.read_bytes()
    settings = [f'source.path="{source}"', "pack.shard_samples=10", "split.train=70", "split.test=20"]
    elsewhere = tmp_path / "elsewhere"
    recipe = animesion.load_recipe("folder", [*settings, f'curate.removed=["{dataset}"]'])
    # the bytes are never stored; then other bytes of the same pixels
    for again in (False, True):
        if again:
            original.unlink()
            codec.decode(content, codec.Limits()).image.save(original.with_suffix(".png"), compress_level=1)
        result = animesion.build(recipe, elsewhere, workers=1)
        assert result.dropped["removed"] >= 1
        curated = animesion.open_dataset(elsewhere).curated.to_pylist()
        dropped = next(each for each in curated if each["reason"] == "removed")
        assert dropped["key"] == "removed-00000"
        assert not dropped["source_id"]
        assert not dropped["sha256"]
        assert row["pixels_blake3"] not in {each["pixels_blake3"] for each in curated}
        assert not any(content in path.read_bytes() for path in (elsewhere / "raw").glob("*.tar"))
    assert checks.verify(animesion.open_dataset(elsewhere), workers=1).clean


def test_a_list_that_no_removal_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("sha256,pixels_blake3,post_sha256,note\nx,,,\n")
    with pytest.raises(UsageError, match="not three digests"):
        removed.read(tmp_path / "bad.csv")


def test_the_difference_is_published(dataset: Path, tmp_path: Path) -> None:
    to = publishing.destination(f"file://{tmp_path / 'published'}")
    publishing.publish(animesion.open_dataset(dataset), publishing.files_of(dataset), to)
    before = contents(tmp_path / "published")
    opened = animesion.open_dataset(dataset)
    # everything of one shard, so that it goes as a whole, but not of its split
    shard = opened.splits["train"].shards[-1].path
    keys = [row["key"] for row in opened.index.to_pylist() if row["shard"] == shard]
    plan = removal.remove(dataset, keys)
    assert plan.emptied == [shard]
    assert not (dataset / shard).exists()
    assert checks.verify(animesion.open_dataset(dataset), workers=1).clean
    done = publishing.publish(animesion.open_dataset(dataset), publishing.files_of(dataset), to)
    assert done.stale == [shard]
    sent = {file.name for file in done.sent}
    assert {name for name in sent if name.endswith(".tar")} == set(plan.rewritten)
    described = {
        "README.md", "SHA256SUMS", "_info.json", "classes.csv", "croissant.json", "curated.parquet", "data/sizes.json",
        "dataset.json", "index.parquet", "removed.csv", "report.html",
    }  # fmt: skip
    assert described <= sent
    assert {name.partition("/")[0] for name in sent - described - set(plan.rewritten)} <= {"plots"}
    published = contents(tmp_path / "published")
    untouched = {name for name in before if name.endswith(".tar")} - {*plan.rewritten, *plan.emptied}
    assert len(untouched) == plan.untouched > 0
    assert {name: published[name] for name in untouched} == {name: before[name] for name in untouched}
    assert published == {file.name: file.path.read_bytes() for file in done.files}
    assert json.loads(published["dataset.json"])["emptied_shards"] == [shard]


def test_posts_are_known_by_their_number_and_files_are_not() -> None:
    listed = removed.Removed.of([removed.Removal(post_sha256=removed.post_digest("danbooru", "12"))])
    assert listed.has(source="danbooru", source_id="12")
    assert not listed.has(source="gelbooru", source_id="12")
    assert not listed.has(source="danbooru", source_id="")
    assert not removed.post_digest("folder", "a/1.jpg")
    assert removed.Removed().digest() == "" != listed.digest()


def test_the_summary_for_the_eu_counts_what_is_known_and_names_what_is_not(small_dataset: Path) -> None:
    from animesion_training.cli.card import card

    printed = CliRunner().invoke(card, [str(small_dataset), "--eu-summary", "--json"])
    found = json.loads(printed.output)
    kept = [row for row in animesion.open_dataset(small_dataset).curated.to_pylist() if row["kept"]]
    assert found["general"]["images"] == len(kept)
    assert found["general"]["bytes"] == sum(row["bytes"] for row in kept)
    assert found["general"]["latest_date"] is None
    assert found["sources"]["unassigned"] == [
        {"source": "folder", "images": len(kept), "bytes": found["general"]["bytes"]}
    ]
    assert found["sources"]["crawled"] == found["sources"]["domains"] == []
    text = CliRunner().invoke(card, [str(small_dataset), "--eu-summary"]).output
    assert f"{len(kept):,} images (less than 1 million images)" in text
    assert "Latest date of collection: **Missing**" in text


def test_features_of_another_version_are_deleted(dataset: Path) -> None:
    path = dataset / "features/part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["phash"]), path)
    removal.remove(dataset, [a_sample(dataset)])
    assert not path.exists()
    assert checks.verify(animesion.open_dataset(dataset), workers=1, decode=False).clean
