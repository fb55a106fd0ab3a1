"""A build is compared with published datasets: the same images are dropped, also after recompression and mirroring."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

import animesion
from animesion.cli import cli
from animesion.config.recipe import Recipe
from animesion.dedup import reach
from animesion.errors import UsageError
from animesion.storage import checksums
from tests.conftest import draw

OURS = 6


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published dataset of twelve images."""
    root = tmp_path_factory.mktemp("old")
    for i in range(12):
        path = root / "images" / "miku" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i, 96).save(path)
    animesion.build(recipe(root / "images", "name=old"), root / "out", workers=1)
    return root / "out"


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: one copied, one saved again, one recompressed, one mirrored, and six of its own."""
    root = tmp_path_factory.mktemp("new")
    (root / "miku").mkdir()
    draw(0, 96).save(root / "miku" / "copied.png")
    draw(1, 96).save(root / "miku" / "saved.bmp")
    draw(2, 96).resize((70, 76)).save(root / "miku" / "smaller.jpg", quality=80)
    ImageOps.mirror(draw(3, 96)).save(root / "miku" / "mirrored.png")
    for i in range(OURS):
        draw(100 + i, 96).save(root / "miku" / f"own{i}.png")
    return root


def recipe(images: Path, *overrides: str) -> Recipe:
    return animesion.load_recipe("folder", [f'source.path="{images}"', "crop.detector=none", *overrides])


def verdicts(out: Path) -> dict[str, dict[str, str]]:
    rows = pq.read_table(out / "curated.parquet").to_pylist()
    return {Path(row["source_id"]).stem: row for row in rows}


def test_published_images_are_dropped_with_their_twin_as_keeper(old: Path, new: Path, tmp_path: Path) -> None:
    where = tmp_path / "out"
    command = ["build", "folder", "--set", f'source.path="{new}"', "--against", str(old), "--out", str(where), "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["dropped"] == {"published duplicate": 3}
    theirs = {name: row["key"] for name, row in verdicts(old).items()}
    ours = verdicts(where)
    for name, number, how in (("copied", 0, "equal bytes"), ("saved", 1, "equal pixels"), ("smaller", 2, "copy")):
        assert ours[name]["reason"] == "published duplicate"
        assert ours[name]["keeper"] == f"old:{theirs[str(number)]}"
        assert how in ours[name]["detail"]
    assert ours["mirrored"]["kept"]
    assert animesion.open_dataset(where).kept == OURS + 1
    notes = json.loads((where / "dataset.json").read_text())["notes"]
    assert f"published datasets: {reach.sentence('local')}" in notes


def test_mirrored_images_are_dropped_when_requested(old: Path, new: Path, tmp_path: Path) -> None:
    chosen = recipe(new, f'duplicates.against=["{old}"]', "duplicates.flip=true")
    assert animesion.build(chosen, tmp_path / "out", workers=1).dropped == {"published duplicate": 4}
    assert verdicts(tmp_path / "out")["mirrored"]["keeper"].startswith("old:")


def test_reporting_drops_nothing_and_adds_a_note(old: Path, new: Path, tmp_path: Path) -> None:
    chosen = recipe(new, f'duplicates.against=["{old}"]', "duplicates.action=report")
    result = animesion.build(chosen, tmp_path / "out", workers=1)
    assert result.dropped == {}
    assert "3 images are already in a published dataset" in result.notes


def test_the_digest_depends_on_the_datasets_content_and_not_its_path(old: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(old, tmp_path / "copy")
    first = recipe(tmp_path, f'duplicates.against=["{old}"]').digest()
    assert recipe(tmp_path, f'duplicates.against=["{copy}"]').digest() == first
    assert recipe(tmp_path).digest() != first
    with (copy / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  data/more.tar\n")
    assert recipe(tmp_path, f'duplicates.against=["{copy}"]').digest() != first


def test_a_build_carries_on_when_the_published_dataset_moved(old: Path, new: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(old, tmp_path / "copy")
    out = tmp_path / "out"
    animesion.build(recipe(new, f'duplicates.against=["{old}"]'), out, workers=1)
    before = (out / ".receipts" / "curate.json").read_bytes()
    animesion.build(recipe(new, f'duplicates.against=["{copy}"]'), out, workers=1)
    assert (out / ".receipts" / "curate.json").read_bytes() == before


def test_two_datasets_of_one_name_are_told_apart(old: Path, new: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "miku").mkdir(parents=True)
    ImageOps.mirror(draw(3, 96)).save(tmp_path / "images" / "miku" / "3.png")
    draw(100, 96).resize((80, 80)).save(tmp_path / "images" / "miku" / "own0.jpg", quality=85)
    draw(400, 96).save(tmp_path / "images" / "miku" / "else.png")
    animesion.build(recipe(tmp_path / "images", "name=old"), tmp_path / "second", workers=1)
    copy = shutil.copytree(old, tmp_path / "copy")  # one dataset in two places is one
    folders = ", ".join(f'"{each}"' for each in (old, tmp_path / "second", copy))
    animesion.build(recipe(new, f"duplicates.against=[{folders}]"), tmp_path / "out", workers=1)
    names = [f"old@{checksums.digest(each, '')[:8]}" for each in (old, tmp_path / "second")]
    ours = verdicts(tmp_path / "out")
    for name, dataset in (("copied", 0), ("saved", 0), ("smaller", 0), ("mirrored", 1), ("own0", 1)):
        assert ours[name]["keeper"].partition(":")[0] == names[dataset], name
    theirs = {name: row["key"] for name, row in verdicts(tmp_path / "second").items()}
    assert ours["own0"]["keeper"] == f"{names[1]}:{theirs['own0']}"


def faces_of(root: Path, boxes: dict[str, list[tuple[float, float, float, float]]], images: Path) -> Recipe:
    """A recipe of images whose faces are in a table, each face a sample."""
    root.mkdir(exist_ok=True)
    names = sorted(boxes)
    (root / "labels.csv").write_text("".join(f"0,{name}\n" for name in names))
    lines = [f"{name}\t7\t{','.join(map(str, box))},0.99" for name in names for box in boxes[name]]
    (root / "faces.tsv").write_text("\n".join(lines) + "\n")
    paths = {"labels": root / "labels.csv", "images": images, "faces": root / "faces.tsv"}
    settings = [f"source.{name}={path}" for name, path in paths.items()]
    return animesion.load_recipe(
        "folder", ["source={kind='labels'}", *settings, "crop.detector=boxes", "crop.faces=each", f"name={root.name}"]
    )


@pytest.mark.parametrize("copies", ["local", "off"])
def test_faces_of_one_image_are_told_apart_by_their_boxes(tmp_path: Path, copies: str) -> None:
    names = [f"{i:04}/{i}.png" for i in range(1, 5)]
    for i, name in enumerate(names):
        wide = Image.new("RGB", (300, 100))
        for at in range(3):
            wide.paste(draw(700 + 10 * i + at, 96).resize((100, 100)), (100 * at, 0))
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        wide.save(tmp_path / "images" / name)
    left, middle, right = ((at / 3, 0.0, (at + 1) / 3, 1.0) for at in range(3))
    first = faces_of(tmp_path / "old", {name: [left, middle] for name in names}, tmp_path / "images")
    first = first.model_copy(update={"duplicates": first.duplicates.model_copy(update={"copies": copies})})
    animesion.build(first, tmp_path / "first", workers=1)
    moved = (0.02, 0.0, 0.34, 1.0)  # the left face, as another detector boxes it
    second = faces_of(tmp_path / "new", {name: [moved, right] for name in names}, tmp_path / "images")
    settings = second.duplicates.model_copy(update={"copies": copies, "against": [str(tmp_path / "first")]})
    animesion.build(second.model_copy(update={"duplicates": settings}), tmp_path / "second", workers=1)
    rows = pq.read_table(tmp_path / "second" / "curated.parquet").to_pylist()
    assert len(rows) == 8
    for row in rows:
        is_right = row["crop"][0] >= 190
        assert row["kept"] == is_right, row
        if not is_right:
            assert (row["reason"], row["detail"]) == ("published duplicate", "equal bytes")
            theirs = {
                each["key"]: each["crop"] for each in pq.read_table(tmp_path / "first" / "curated.parquet").to_pylist()
            }
            assert theirs[row["keeper"].partition(":")[2]] == [0, 0, 100, 100]


def damage_features(folder: Path) -> None:
    shutil.rmtree(folder / "features")


def swap_features(folder: Path) -> None:
    path = folder / "features" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(
            table.column_names.index("phash"), "phash", table["phash"].take(list(range(len(table)))[::-1])
        ),
        path,
    )


def damage_table(folder: Path) -> None:
    table = pq.read_table(folder / "curated.parquet")
    pq.write_table(table, folder / "curated.parquet", compression="gzip")


def garble_features(folder: Path) -> None:
    (folder / "features" / "part-00000.parquet").write_bytes(b"PAR1 nothing PAR1")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_features, "features/ is missing"),
        (swap_features, "features/ is missing"),
        (garble_features, "features/ is missing"),
        (damage_table, "curated.parquet does not match its SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "not a finished dataset"),
        (lambda folder: (folder / "dataset.json").unlink(), "dataset.json"),
    ],
)
def test_a_damaged_dataset_is_refused(harm, message: str, old: Path, new: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(old, tmp_path / "copy")
    harm(copy)
    with pytest.raises(UsageError, match=message):
        animesion.build(recipe(new, f'duplicates.against=["{copy}"]'), tmp_path / "out", workers=1)


def test_a_build_is_not_compared_with_itself(old: Path, new: Path) -> None:
    with pytest.raises(UsageError, match="output folder itself"):
        animesion.build(recipe(new, f'duplicates.against=["{old}"]'), old, workers=1)


def test_images_of_the_fixture_are_as_described(new: Path) -> None:
    with Image.open(new / "miku" / "saved.bmp") as saved:
        assert saved.convert("RGB").tobytes() == draw(1, 96).tobytes()


def test_an_image_whose_post_is_published_in_another_split_is_reported(tmp_path: Path) -> None:
    posts = [f"{number:032x}" for number in range(12)]
    for folder, splits, faces in (("old", ("train", "val", "test"), (0,)), ("new", ("test", "train", "val"), (1,))):
        for number, post in enumerate(posts):
            for face in faces:
                path = tmp_path / folder / splits[number % 3] / "miku" / f"{post}-{face}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(300 + 20 * face + number, 96).save(path)
    animesion.build(recipe(tmp_path / "old", "name=old"), tmp_path / "first", workers=1)
    chosen = recipe(tmp_path / "new", f'duplicates.against=["{tmp_path / "first"}"]')
    result = animesion.build(chosen, tmp_path / "second", workers=1)
    [note] = [note for note in result.notes if "in another split" in note]
    assert note.startswith("12 images are from posts, works or files that old has in another split, such as folder-")
    again = recipe(tmp_path / "old", f'duplicates.against=["{tmp_path / "second"}"]', "split.strategy=single")
    notes = animesion.build(again, tmp_path / "third", workers=1).notes
    assert [note for note in notes if note.startswith("8 images are from posts")]


def test_names_that_differ_in_an_affix_only_are_noticed_and_not_joined(tmp_path: Path) -> None:
    for number in range(12):
        for place, affix in enumerate(("upper", "lower")):
            path = tmp_path / "images" / "oak" / f"tree{number}-{affix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(500 + 20 * place + number, 96).save(path)
    images = tmp_path / "images"
    result = animesion.build(recipe(images), tmp_path / "out", workers=1)
    [note] = [note for note in result.notes if "affix" in note]
    assert note.startswith("24 of 24 images have names that differ in a counter or affix only, such as 'tree")
    assert "of 12 such groups straddle splits: set source.family" in note
    joined = animesion.build(recipe(images, "source.family='(tree[0-9]+)-.*'"), tmp_path / "joined", workers=1)
    silent = animesion.build(recipe(images, "source.family=''"), tmp_path / "silent", workers=1)
    assert not [note for note in (*joined.notes, *silent.notes) if "affix" in note]
