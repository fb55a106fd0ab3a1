"""`animesion verify` reports each kind of damage to a dataset by name, and no faults in an intact one."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import animesion
from animesion.cli.verify import verify
from animesion.dataset import shards
from animesion.dedup import reach
from animesion.errors import UsageError
from animesion.schemas import CURATED, INDEX
from animesion.storage import parquet
from tests.conftest import draw


def report(folder: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(verify, [str(folder), "--json", "--workers", "1", *options], catch_exceptions=False)
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if document["ok"] else 1)
    return document


def faults(folder: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """Faults by check, checks without any left out."""
    return {each["check"]: each["faults"] for each in report(folder, *options)["checks"] if each["faults"]}


def texts(folder: Path, check: str) -> list[str]:
    """The faults of the only check that fails."""
    found = faults(folder)
    assert set(found) == {check}, found
    return [fault["fault"] for fault in found[check]]


# -- breaking things -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(small_dataset: Path, tmp_path: Path) -> Path:
    """A copy to break, without what only the build needs."""
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy, ignore=shutil.ignore_patterns("raw", "features", "pack", ".receipts"))
    return copy


Samples = list[tuple[str, dict[str, bytes]]]


def unpack(path: Path) -> Samples:
    content = path.read_bytes()
    samples: dict[str, dict[str, bytes]] = {}
    for member in shards.members(path):
        samples.setdefault(member.key, {})[member.field] = content[member.offset : member.offset + member.size]
    return list(samples.items())


def repack(path: Path, samples: Samples) -> None:
    path.write_bytes(b"".join(shards.sample(key, fields) for key, fields in samples) + shards.END)


def seal(folder: Path) -> None:
    """Rewrite digests and sizes, as somebody who hides a fault would, so that only the deeper check can see it."""
    facts = json.loads((folder / "dataset.json").read_bytes())
    for split in facts["splits"].values():
        for shard in split["shards"]:
            content = (folder / shard["path"]).read_bytes()
            shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        split["bytes"] = sum(shard["bytes"] for shard in split["shards"])
    (folder / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    names = [line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def reindex(folder: Path) -> None:
    """Rewrite `index.parquet` from the shards."""
    rows = []
    for path in sorted((folder / "data").glob("*.tar")):
        content = path.read_bytes()
        for key, fields in unpack(path):
            sample = shards.sample(key, fields)
            start = content.index(sample)
            offset = content.index(shards.header(f"{key}.jpg", len(fields["jpg"])), start) + shards.BLOCK
            rows.append(
                {
                    "key": key,
                    "split": path.stem.partition("-")[0],
                    "shard": f"data/{path.name}",
                    "offset": offset,
                    "size": len(fields["jpg"]),
                    "label": int(fields["cls"]),
                    "sample_offset": start,
                    "sample_size": len(sample),
                    "sha256": hashlib.sha256(fields["jpg"]).hexdigest(),
                }
            )
    parquet.write(folder / "index.parquet", parquet.table(rows, INDEX))


def edit(folder: Path, shard: str, change: Callable[[Samples], None]) -> None:
    """Change the samples of one shard and leave every digest and the index right."""
    samples = unpack(folder / shard)
    change(samples)
    repack(folder / shard, samples)
    reindex(folder)
    seal(folder)


def edit_curated(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = pq.read_table(folder / "curated.parquet").to_pylist()
    change(rows)
    parquet.write(folder / "curated.parquet", parquet.table(rows, CURATED))
    seal(folder)


TRAIN, VAL, TEST = "data/train-00000.tar", "data/val-00000.tar", "data/test-00000.tar"


# -- whole -----------------------------------------------------------------------------------------------------------


def test_a_built_dataset_has_no_fault(small_dataset: Path) -> None:
    document = report(small_dataset)
    assert document["ok"]
    assert document["faults"] == 0
    assert document["samples"] == 37
    assert [each["check"] for each in document["checks"]] == [
        "checksums", "archives", "keys", "labels", "decode", "leaks", "accounting",
    ]  # fmt: skip
    assert document["reach"].startswith(reach.sentence("local"))
    assert document["reach"].endswith("whose split this is")
    result = CliRunner().invoke(verify, [str(small_dataset), "--no-decode"])
    assert f"leaks: {reach.sentence('local', decoded=False)}\n" in result.stdout
    assert result.exit_code == 0
    assert "no faults in 37 samples" in result.stdout


def test_a_rewrite_that_changes_nothing_is_no_fault(folder: Path) -> None:
    edit(folder, TRAIN, lambda samples: None)
    edit_curated(folder, lambda rows: None)
    assert faults(folder) == {}


def test_no_dataset_is_wrong_usage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError) as caught:
            CliRunner().invoke(verify, [str(path)], catch_exceptions=False)
        assert caught.value.exit_code == 2


# -- files and archives ----------------------------------------------------------------------------------------------


def test_flipped_byte_in_an_image(folder: Path) -> None:
    row = animesion.open_dataset(folder).index.to_pylist()[3]
    content = bytearray((folder / row["shard"]).read_bytes())
    content[row["offset"] + row["size"] // 2] ^= 0x10
    (folder / row["shard"]).write_bytes(content)
    found = faults(folder)
    assert [fault["fault"] for fault in found["checksums"]] == [
        f"{row['shard']} does not have the SHA-256 in SHA256SUMS",
        f"{row['shard']} does not have the SHA-256 in dataset.json",
    ]
    assert [fault["keys"] for fault in found["keys"]] == [[row["key"]]]
    assert set(found) <= {"checksums", "keys", "decode"}


def test_flipped_byte_in_a_header(folder: Path) -> None:
    content = bytearray((folder / TRAIN).read_bytes())
    content[3] ^= 0x01
    (folder / TRAIN).write_bytes(content)
    seal(folder)
    assert texts(folder, "archives") == [f"{TRAIN} has a damaged header at byte 0"]


@pytest.mark.parametrize("where", ["boundary", "middle"])
def test_cut_archive(folder: Path, where: str) -> None:
    row = animesion.open_dataset(folder).index.to_pylist()[4]
    place = row["sample_offset"] if where == "boundary" else row["offset"] + 10
    (folder / row["shard"]).write_bytes((folder / row["shard"]).read_bytes()[:place])
    assert set(faults(folder)) == {"checksums", "archives"}
    seal(folder)
    [text] = texts(folder, "archives")
    assert text.startswith(row["shard"])
    assert text.endswith("it was cut short")


def test_archive_that_lost_samples_but_has_an_end(folder: Path) -> None:
    samples = unpack(folder / TRAIN)
    repack(folder / TRAIN, samples[:-2])
    seal(folder)
    found = faults(folder)
    assert set(found) == {"archives", "keys", "labels"}
    assert "holds 8 samples" in found["archives"][0]["fault"]
    lost = [[key] for key, _ in samples[-2:]]
    assert [fault["keys"] for fault in found["keys"]] == lost
    assert [fault["keys"] for fault in found["labels"]] == lost


def test_hostile_size_in_a_header(folder: Path) -> None:
    content = bytearray((folder / TRAIN).read_bytes())
    content[124:135] = b"-0000001000"
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (folder / TRAIN).write_bytes(content)
    assert "damaged header at byte 0" in faults(folder)["archives"][0]["fault"]


def test_missing_shard(folder: Path) -> None:
    (folder / VAL).unlink()
    found = faults(folder)
    assert set(found) == {"checksums", "archives"}
    assert found["archives"][0]["fault"] == f"{VAL} is missing"


def test_extra_shard(folder: Path) -> None:
    shutil.copy(folder / TRAIN, folder / "data/train-00099.tar")
    assert texts(folder, "checksums") == [
        "data/train-00099.tar is not a shard of dataset.json, but readers would load it"
    ]


def test_missing_and_unlisted_files(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "classes.csv" not in line))
    (folder / "plots" / "lorenz.png").unlink()
    assert texts(folder, "checksums") == [
        "plots/lorenz.png is listed in SHA256SUMS but missing or unreadable",
        "classes.csv is not listed in SHA256SUMS",
    ]
    sums.write_text(sums.read_text() + f"{'0' * 64}  ../outside\n")
    assert any("is not a digest and a file inside the dataset" in text for text in texts(folder, "checksums"))


def test_side_files_of_other_readers(folder: Path) -> None:
    sizes = json.loads((folder / "data/sizes.json").read_bytes())
    (folder / "data/sizes.json").write_text(json.dumps(sizes | {"val-00000.tar": 1000}))
    (folder / "_info.json").write_text("[]")
    seal(folder)
    assert texts(folder, "archives") == [
        "_info.json is missing or not a JSON object",
        f"data/sizes.json does not list {sizes['val-00000.tar']:,} samples for {VAL}",
    ]


# -- keys and labels -------------------------------------------------------------------------------------------------


def test_duplicate_key_in_two_shards(folder: Path) -> None:
    key, fields = unpack(folder / VAL)[0]
    samples = unpack(folder / TRAIN)
    repack(folder / TRAIN, [*samples, (key, fields)])
    seal(folder)
    found = faults(folder)
    assert {"keys", "leaks"} <= set(found)
    assert f"key {key} is in {TRAIN} and in {VAL}" in [fault["fault"] for fault in found["keys"]]


def test_deleted_row_of_the_index(folder: Path) -> None:
    index = animesion.open_dataset(folder).index
    parquet.write(folder / "index.parquet", index.slice(1))
    seal(folder)
    key, shard = index["key"][0].as_py(), index["shard"][0].as_py()
    assert texts(folder, "keys") == [f"sample {key} in {shard} has no row in index.parquet"]


def test_shifted_offset_in_the_index(folder: Path) -> None:
    rows = animesion.open_dataset(folder).index.to_pylist()
    rows[5]["offset"] += 1
    parquet.write(folder / "index.parquet", parquet.table(rows, INDEX))
    seal(folder)
    [text] = texts(folder, "keys")
    assert rows[5]["key"] in text


def test_damaged_index(folder: Path) -> None:
    (folder / "index.parquet").write_bytes(b"PAR1 nothing PAR1")
    seal(folder)
    [text] = texts(folder, "keys")
    assert "index.parquet" in text


def test_sample_with_other_members(folder: Path) -> None:
    def drop_caption(samples: Samples) -> None:
        del samples[2][1]["txt"]

    edit(folder, TRAIN, drop_caption)
    [text] = texts(folder, "keys")
    assert "has the members cls,jpg,json instead of cls,jpg,json,txt" in text


def test_json_with_another_type(folder: Path) -> None:
    def change(samples: Samples) -> None:
        described = json.loads(samples[4][1]["json"])
        samples[4][1]["json"] = json.dumps(described | {"box": []}).encode()

    edit(folder, TRAIN, change)
    [text] = texts(folder, "keys")
    assert "has other fields or types in its json" in text


def test_swapped_label(folder: Path) -> None:
    def swap(samples: Samples) -> None:
        fields = samples[0][1]
        fields["cls"] = str((int(fields["cls"]) + 1) % 3).encode()

    key = unpack(folder / TRAIN)[0][0]
    samples = unpack(folder / TRAIN)
    swap(samples)
    repack(folder / TRAIN, samples)
    seal(folder)
    found = faults(folder)
    assert set(found) == {"labels"}
    [fault] = found["labels"]
    assert fault["keys"] == [key]
    assert "json has" in fault["fault"]
    assert "index.parquet has" in fault["fault"]
    assert "curated.parquet has" in fault["fault"]


@pytest.mark.parametrize("content", [b"", b"-1", b"one", b"7" * 4000, b"99"])
def test_labels_that_are_no_class(folder: Path, content: bytes) -> None:
    samples = unpack(folder / TRAIN)
    samples[1][1]["cls"] = content
    repack(folder / TRAIN, samples)
    seal(folder)
    found = faults(folder)
    assert {"labels"} <= set(found) <= {"labels", "keys"}  # a member of another length moves what follows it
    assert [fault["keys"] for fault in found["labels"]] == [[samples[1][0]]]


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000])
def test_broken_json(folder: Path, content: bytes) -> None:
    samples = unpack(folder / TRAIN)
    samples[-1][1]["json"] = content
    repack(folder / TRAIN, samples)
    reindex(folder)
    seal(folder)
    [text] = texts(folder, "labels")
    assert text.endswith("its json is not a JSON object")


def test_edited_classes(folder: Path) -> None:
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    rows[1][1], rows[2][1] = rows[2][1], rows[1][1]
    with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    assert set(faults(folder)) == {"checksums", "labels"}
    seal(folder)
    found = texts(folder, "labels")
    assert [text.split(" is ")[0] for text in found] == ["classes.csv line 2", "classes.csv line 3"]


# -- pixels and leaks ------------------------------------------------------------------------------------------------


def test_undecodable_image(folder: Path) -> None:
    def spoil(samples: Samples) -> None:
        samples[3][1]["jpg"] = samples[3][1]["jpg"][:200]

    edit(folder, TRAIN, spoil)
    [text] = texts(folder, "decode")
    assert "its image does not decode (truncated image" in text
    assert faults(folder, "--no-decode") == {}


def jpeg(content: bytes, quality: int, *, move: bool = False) -> bytes:
    image = Image.open(io.BytesIO(content))
    image.load()
    if move:
        image.putpixel((0, 0), (1, 2, 3))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def test_near_duplicate_in_another_split(folder: Path) -> None:
    key, fields = unpack(folder / VAL)[0]

    def plant(samples: Samples) -> None:
        samples[2][1]["jpg"] = jpeg(fields["jpg"], 80)

    edit(folder, TRAIN, plant)
    found = faults(folder)
    assert set(found) == {"leaks"}
    [fault] = found["leaks"]
    assert sorted(fault["splits"]) == ["train", "val"]
    assert set(fault["keys"]) == {key, unpack(folder / TRAIN)[2][0]}
    assert fault["fault"].endswith(": copy")
    assert faults(folder, "--no-decode") == {}


def test_equal_bytes_and_equal_pixels_in_another_split(folder: Path) -> None:
    content = unpack(folder / VAL)[0][1]["jpg"]
    commented = content[:2] + b"\xff\xfe\x00\x06note" + content[2:]  # a JPEG comment: other bytes, the same pixels

    def plant(samples: Samples) -> None:
        samples[0][1]["jpg"] = content

    edit(folder, TEST, plant)
    [text] = texts(folder, "leaks")
    assert text.endswith(": equal bytes")
    [fault] = faults(folder, "--no-decode")["leaks"]
    assert fault["fault"] == text

    def comment(samples: Samples) -> None:
        samples[0][1]["jpg"] = commented

    edit(folder, TEST, comment)
    [text] = texts(folder, "leaks")
    assert text.endswith(": equal pixels")


def test_group_and_source_image_across_splits(folder: Path) -> None:
    keys = unpack(folder / TRAIN)[0][0], unpack(folder / TEST)[0][0]

    def tie(rows: list[dict[str, Any]]) -> None:
        one, other = (next(row for row in rows if row["key"] == key) for key in keys)
        other["group"] = one["group"]

    edit_curated(folder, tie)
    found = faults(folder)
    assert set(found) == {"leaks"}
    [fault] = found["leaks"]
    assert set(fault["keys"]) == set(keys)
    assert fault["fault"].endswith(": same group")

    def tie_source(rows: list[dict[str, Any]]) -> None:
        one, other = (next(row for row in rows if row["key"] == key) for key in keys)
        other["source_id"] = one["source_id"]

    edit_curated(folder, tie_source)
    assert texts(folder, "leaks")[0].endswith(": same group, same source image")


def test_copies_by_name_across_published_splits_are_named_and_counted(tmp_path: Path) -> None:
    for number in range(6):
        for split, name in (
            ("train", f"leaf{number}"),
            ("test", f"aug_0_leaf{number}"),
            ("test", f"aug_1_leaf{number}"),
        ):
            path = tmp_path / "images" / split / "apel" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(700 + 10 * number + len(name) + int(name[4] == "1"), 96).save(path)
    options = [f"source.path={tmp_path / 'images'}", "duplicates.action=report", "duplicates.near=false"]
    animesion.build(animesion.load_recipe("folder", options), tmp_path / "out", workers=1)
    document = report(tmp_path / "out")
    [leaks] = [each["faults"] for each in document["checks"] if each["check"] == "leaks"]
    assert document["leaking"] == {"test": 12}
    assert len({key for fault in leaks for key in fault["keys"] if "-aug-" in key}) == 12
    for fault in leaks:
        assert "same family by name" in fault["fault"]
        assert fault["fault"].endswith("as the split strategy published allows")
    printed = CliRunner().invoke(verify, [str(tmp_path / "out"), "--workers", "1"]).stdout
    assert "in all, 12 of test are related to an image of an earlier split (train, val, test)" in printed
    # the search that the recipe says, and only figures that the documentation has
    assert f"leaks: {reach.sentence('off')}\n" in printed
    page = (Path(__file__).parents[2] / "docs" / "duplicates.md").read_text()
    for copies in ("local", "hash", "off"):
        figures = set(re.findall(r"0\.\d{3}", reach.sentence(copies)))
        assert all(figure in page for figure in figures)


def test_leaks_of_a_published_split_are_faults_that_are_marked_as_expected(folder: Path) -> None:
    content = unpack(folder / VAL)[0][1]["jpg"]

    def plant(samples: Samples) -> None:
        samples[0][1]["jpg"] = content

    edit(folder, TEST, plant)
    facts = json.loads((folder / "dataset.json").read_bytes())
    (folder / "dataset.json").write_text(json.dumps(facts | {"split_strategy": "legacy-dafre"}))
    seal(folder)
    assert texts(folder, "leaks")[0].endswith("equal bytes, as the split strategy legacy-dafre allows")


# -- accounting ------------------------------------------------------------------------------------------------------


def test_vanished_and_unaccounted_images(folder: Path) -> None:
    key = unpack(folder / TEST)[0][0]
    edit_curated(folder, lambda rows: rows.remove(next(row for row in rows if row["key"] == key)))
    found = faults(folder)
    assert set(found) == {"labels", "accounting"}
    assert "dataset.json: seen is 37, but 36 in curated.parquet" in [fault["fault"] for fault in found["accounting"]]
    assert found["labels"][0]["fault"].endswith("is not a kept row of curated.parquet")


def test_wrong_funnel(folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_bytes())
    facts["funnel"] |= {"seen": 38, "dropped": {"near duplicate": 2}}
    (folder / "dataset.json").write_text(json.dumps(facts))
    seal(folder)
    assert texts(folder, "accounting") == [
        "dataset.json: seen is 38, but 37 in curated.parquet",
        "dataset.json: dropped as 'near duplicate' is 2, but 0 in curated.parquet",
        "dataset.json: seen does not equal kept + dropped",
    ]


def test_people_see_the_first_faults_of_many(folder: Path) -> None:
    def spoil(samples: Samples) -> None:
        for _, fields in samples:
            fields["cls"] = b"x"

    for shard in (TRAIN, "data/train-00001.tar"):
        samples = unpack(folder / shard)
        spoil(samples)
        repack(folder / shard, samples)
    seal(folder)
    result = CliRunner().invoke(verify, [str(folder), "--no-decode"])
    assert result.exit_code == 1
    assert "20 faults" in result.stdout
    assert "and 10 more" in result.stdout
    assert "not run" in result.stdout
