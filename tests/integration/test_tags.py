"""Tags of a dump travel with the samples: normalised, counted, cut down, verified, removed, trained on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

import animesion
from animesion.cli.stats import stats
from animesion.dataset.tags import read_vocabulary
from animesion.errors import UsageError
from animesion.pipeline import removal, runner
from animesion.report.boxes import Boxes
from animesion.report.details import Details
from animesion.report.images import Images
from animesion.verification import checks
from tests.conftest import draw
from tests.sharing import made_once

EVERY = 'tags.categories=["general", "character", "copyright", "artist", "meta"]'
LONG = "very_" + "long_" * 120
CODES = {"general": "0", "artist": "1", "copyright": "3", "character": "4", "meta": "5"}


def post(number: int, character: str, **tags: Sequence[str]) -> dict[str, Any]:
    listed = [{"id": "1", "name": name, "category": CODES[kind]} for kind, names in tags.items() for name in names]
    listed.append({"id": "2", "name": character, "category": "4"})
    return {"id": str(number), "rating": "g", "file_ext": "png", "tags": listed}


def posts() -> list[dict[str, Any]]:
    """24 posts of two characters: 12 with long hair, some of which call it by its alias."""
    found = []
    for i in range(24):
        general = ["solo", "solo"] if i % 2 else ["solo", "hair_long" if i % 4 else "long_hair"]
        general += ["serafuku"] if i < 6 else []
        general += ["tagme"] if i < 8 else []
        general += [f"rare_{i}", '=cmd|"calc"!A1', "ひらがな", LONG, "\u202efake\x07"]
        meta = ["highres"] if i < 20 else []
        artist = ["one_artist"] if i == 5 else ["someone"]
        found.append(post(i + 1, "miku" if i < 12 else "rin", general=general, artist=artist, meta=meta))
    # a category that most posts contradict
    found[3]["tags"].append({"name": "someone", "category": "0"})
    return found


def write_dump(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for record in records:
        number = int(record["id"])
        path = folder / "images" / f"{number % 1000:04d}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        draw(number).save(path)
    (folder / "posts.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = "\ufeffantecedent_name,consequent_name,status\n"
    (folder / "aliases.csv").write_text(rows + "hair_long,long_hairs,active\nlong_hairs,long_hair,active\n")
    # a chain of three, whose end no post lists
    chain = "serafuku,school_uniform,active\nschool_uniform,uniform,active\nuniform,clothes,deleted\n"
    (folder / "implications.csv").write_text(rows + chain + "serafuku,uniform,active\n")
    return [
        "source={kind='dump'}",
        f"source.metadata={folder / 'posts.jsonl'}",
        f"source.images={folder / 'images'}",
        f"source.aliases={folder / 'aliases.csv'}",
        f"source.implications={folder / 'implications.csv'}",
        "crop.detector=none",
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        settings = [*write_dump(folder, posts()), EVERY, "tags.min_images=2", "tags.exclude=['tag*']"]
        animesion.build(animesion.load_recipe("folder", settings), folder / "built", workers=1)

    return made_once(tmp_path_factory, "tags", make) / "built"


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_page_shows_the_tags_of_a_sample(built: Path) -> None:
    images = Images(animesion.open_dataset(built))
    details = Details(images, Boxes(images))
    sample = next(images.dataset.samples("train"))
    facts = dict(details.of(images.places[sample.key])["facts"])
    assert {name.removeprefix("tags: "): text for name, text in facts.items() if name.startswith("tags: ")} == {
        category: ", ".join(tags) for category, tags in sample.tags.items() if tags
    }
    assert "solo" in facts["tags: general"].split(", ")


def test_the_vocabulary_counts_normalised_tags(built: Path) -> None:
    header, *listed = rows(built / "tags.csv")
    assert header == ["tag_id", "name", "category", "train", "val", "test", "total"]
    # by category, then by number of samples, then by name; implied tags have the category of what implies them
    assert (
        [(row[1], row[2], int(row[6])) for row in listed]
        == [
            ('\'=cmd|"calc"!A1', "general", 24),  # as a cell that no spreadsheet program runs
            ("fake", "general", 24),
            ("solo", "general", 24),
            (LONG[:500], "general", 24),
            ("ひらがな", "general", 24),
            ("long_hair", "general", 12),
            ("school_uniform", "general", 6),
            ("serafuku", "general", 6),
            ("uniform", "general", 6),
            ("miku", "character", 12),
            ("rin", "character", 12),
            ("someone", "artist", 23),
            ("highres", "meta", 20),
        ]
    )
    assert [int(row[0]) for row in listed] == list(range(13))
    assert all(int(row[3]) + int(row[4]) + int(row[5]) == int(row[6]) for row in listed)
    assert read_vocabulary(built).names[0] == '=cmd|"calc"!A1'


def test_a_curator_sees_what_was_dropped_and_why(built: Path) -> None:
    listed = [tuple(row) for row in rows(built / "dropped_tags.csv")]
    rare = sorted([("one_artist", "artist", "1", "rare"), *((f"rare_{i}", "general", "1", "rare") for i in range(24))])
    assert listed == [("name", "category", "images", "reason"), ("tagme", "general", "8", "excluded"), *rare]
    facts = json.loads((built / "dataset.json").read_text())["tags"]
    assert facts["dropped"] == {"excluded": {"tags": 1, "assignments": 8}, "rare": {"tags": 25, "assignments": 25}}
    # hair_long of 6 posts; school_uniform and uniform for 6 posts of serafuku
    assert (facts["aliased"], facts["implied"], facts["tags"]) == (6, 12, 13)
    assert facts["assignments"] == 5 * 24 + 12 + 3 * 6 + 24 + 23 + 20
    assert facts["categories"]["meta"] == {"tags": 1, "assignments": 20}
    card = (built / "README.md").read_text()
    assert "13 tags" in card
    assert "| rare | 25 | 25 |" in card
    assert "1 tags are listed in several categories" in card
    result = CliRunner().invoke(stats, [str(built), "--json"])
    assert json.loads(result.stdout)["tags"]["artist"] == {"tags": 1, "uses": 23, "most_frequent": {"someone": 23}}


def test_each_sample_carries_its_tags_by_category(built: Path) -> None:
    dataset = animesion.open_dataset(built)
    sample = dataset["danbooru-1"]  # hair_long is an alias, and serafuku implies two more
    assert sample.tags == sample.meta["tags"] == {
        "general": ['=cmd|"calc"!A1', "fake", "solo", LONG[:500], "ひらがな", "long_hair", "school_uniform", "serafuku",
                    "uniform"],
        "character": ["miku"],
        "artist": ["someone"],
        "meta": ["highres"],
    }  # fmt: skip
    assert dataset["danbooru-24"].tags["meta"] == []  # the same fields in every sample
    header = yaml.safe_load((built / "README.md").read_text().split("---\n")[1])
    features = next(each for each in header["dataset_info"]["features"] if each["name"] == "json")["struct"]
    assert features[-1] == {
        "name": "tags",
        "struct": [{"name": name, "sequence": "string"} for name in ("general", "character", "artist", "meta")],
    }


def test_verify_finds_tags_that_disagree(built: Path, tmp_path: Path) -> None:
    assert checks.verify(animesion.open_dataset(built), workers=1, decode=False).clean
    folder = shutil.copytree(built, tmp_path / "copy")
    table = pq.read_table(folder / "sample_tags.parquet")
    tags = table["tags"].to_pylist()
    changed = tags[0].pop()
    pq.write_table(table.set_column(1, "tags", [tags]), folder / "sample_tags.parquet")
    found = checks.verify(animesion.open_dataset(folder), workers=1, decode=False).faults["labels"]
    assert [fault.keys for fault in found if fault.keys] == [(table["key"][0].as_py(),)]
    assert any("tags.csv: the counts of" in fault.text for fault in found)
    tags[0].append(len(read_vocabulary(built)) + changed)
    pq.write_table(table.set_column(1, "tags", [tags]), folder / "sample_tags.parquet")
    [fault] = checks.verify(animesion.open_dataset(folder), workers=1, decode=False).faults["labels"]
    assert "lists tags that tags.csv does not have" in fault.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("tag_id", "id", 1), "does not have the columns"),
        (lambda text: text.replace("solo,general", "fake,general"), "lists a tag twice"),
        (lambda text: text.replace("miku,character", "miku,general"), ""),
        (lambda text: text.replace("fake,general", "fake,meta"), "categories out of order"),
        (lambda text: text.replace("solo,general", "solo,unknown"), "line 4 is not a tag"),
        (lambda text: text.replace("solo,", "\x1b[31msolo,"), "line 4 is not a tag"),
        (lambda text: re.sub(r"solo,general,\d+", "solo,general,-1", text), "line 4 is not a tag"),
        (lambda text: text + '"', "cannot be read"),
    ],
)
def test_a_damaged_vocabulary_is_refused(built: Path, tmp_path: Path, change: Any, message: str) -> None:
    text = (built / "tags.csv").read_text(encoding="utf-8")
    (tmp_path / "tags.csv").write_text(change(text), encoding="utf-8")
    if not message:
        assert len(read_vocabulary(tmp_path)) == 13
        return
    with pytest.raises(UsageError, match=message):
        read_vocabulary(tmp_path)


def test_a_removal_takes_the_tags_of_the_image_with_it(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "copy")
    removal.remove(folder, ["danbooru-6"], note="")
    counts = {row[1]: int(row[6]) for row in rows(folder / "tags.csv")[1:]}
    assert [counts[name] for name in ("solo", "serafuku", "someone")] == [23, 5, 23]
    everything = b"".join(
        repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    )
    assert b"one_artist" not in everything  # of this post alone
    assert checks.verify(animesion.open_dataset(folder), workers=1, decode=False).clean


def test_without_tags_a_build_is_as_ever_and_tags_can_be_switched_on_and_off(built: Path, tmp_path: Path) -> None:
    settings = [*write_dump(tmp_path, posts()[:16])]
    out = tmp_path / "out"
    animesion.build(animesion.load_recipe("folder", settings), out, workers=1)
    plain = {path.name: path.read_bytes() for path in (out / "data").glob("*.tar")}
    fetched = {path: path.stat().st_mtime_ns for path in out.glob("raw/part-*.tar")}
    assert not list(out.rglob("*tags*"))
    assert "tags" not in json.loads((out / "dataset.json").read_text())
    with_tags = animesion.load_recipe("folder", [*settings, 'tags.categories=["meta"]', "tags.min_images=1"])
    animesion.build(with_tags, out, workers=1, replace=True)
    assert animesion.open_dataset(out)["danbooru-1"].tags == {"meta": ["highres"]}
    assert {path: path.stat().st_mtime_ns for path in out.glob("raw/part-*.tar")} == fetched  # nothing is fetched again
    animesion.build(animesion.load_recipe("folder", settings), out, workers=1, replace=True)
    assert {path.name: path.read_bytes() for path in (out / "data").glob("*.tar")} == plain
    assert not list(out.glob("*tags*"))


def test_settings_that_leave_no_tag_or_have_no_source_are_refused(tmp_path: Path) -> None:
    settings = write_dump(tmp_path, posts()[:8])
    with pytest.raises(UsageError, match=r"no tag is left of \d+ .*tags.min_images"):
        animesion.build(animesion.load_recipe("folder", [*settings, EVERY, "tags.min_images=99"]), tmp_path / "a")
    recipe = animesion.load_recipe("folder", [f"source.path={tmp_path / 'images'}", EVERY])
    with pytest.raises(UsageError, match=r"tags.categories: source 'folder' lists no tags"):
        animesion.build(recipe, tmp_path / "b")
    (tmp_path / "aliases.csv").write_text("antecedent_name,consequent_name\na,b\nb,a\n")
    with pytest.raises(UsageError, match=r"source.aliases: .* has a cycle \(a -> b -> a\)"):
        animesion.build(animesion.load_recipe("folder", [*settings, EVERY]), tmp_path / "c")


@pytest.mark.slow
def test_an_update_keeps_the_vocabulary_and_compact_makes_another(tmp_path: Path) -> None:
    every = posts()
    for each in every[16:]:
        each["tags"].append({"name": "newcomer", "category": "0"})
    settings = [*write_dump(tmp_path, every[:16]), EVERY, "tags.min_images=3", "classes.minimum=1"]
    recipe, out = animesion.load_recipe("folder", settings), tmp_path / "out"
    animesion.build(recipe, out, workers=1)
    before = read_vocabulary(out).names
    write_dump(tmp_path, every)
    result = animesion.build(recipe, out, workers=1, update=True)
    assert read_vocabulary(out).names == before
    assert ["newcomer", "general", "8", "new"] in rows(out / "dropped_tags.csv")
    assert any("--update --compact makes another" in note for note in result.notes)
    runner.run(recipe, out, workers=1, update=True, compact=True)
    assert "newcomer" in read_vocabulary(out).names
    assert checks.verify(animesion.open_dataset(out), workers=1, decode=False).clean


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from animesion_training.engine import loop
    from animesion_training.recipe import load

    def make(folder: Path) -> None:
        overrides = ["model.img_size=32", "schedule.epochs=2", "run.batch_size=8", "model.name=test_resnet"]
        recipe = load("tagger", [*overrides, "tags.threshold_images=2", "augment.mixup=0.2"])
        outcome = loop.train(recipe, built, folder / "run", device="cpu")
        assert outcome.best_metric == "val_map"
        assert outcome.tagging is not None
        assert outcome.test is None

    return made_once(tmp_path_factory, "tagger", make) / "run"


def test_a_run_on_tags_keeps_names_categories_and_thresholds(run: Path, built: Path) -> None:
    from animesion_training.weights import read_card

    card, vocabulary = read_card(run / "best.safetensors"), read_vocabulary(built)
    assert (card.classes, card.categories) == (vocabulary.names, vocabulary.categories)
    assert len(card.thresholds) == card.num_classes == 13
    assert card.facts["train_counts"] == vocabulary.counts["train"].tolist()
    report = json.loads((run / "report" / "evaluation.json").read_text())
    assert report["task"] == "tags"
    assert report["overall"]["tags"] == 13
    # every image has these, so any order is right
    always = [row for row in rows(run / "report" / "per_tag.csv") if row[0] == "solo"]
    assert [row[4] for row in always] == ["1.000000"]


def test_commands_on_a_tagger(run: Path, built: Path, tmp_path: Path) -> None:
    from animesion.cli.report import report as report_command
    from animesion_training.cli.eval import eval_
    from animesion_training.cli.predict import predict
    from animesion_training.model_card import model_card

    weights = str(run / "best.safetensors")
    result = CliRunner().invoke(eval_, ["--checkpoint", weights, "--data", str(built), "--device", "cpu", "--json"])
    document = json.loads(result.stdout)
    assert document["overall"] == json.loads((run / "report" / "evaluation.json").read_text())["overall"]
    assert len(document["per_tag"]) == 13
    result = CliRunner().invoke(eval_, ["--checkpoint", weights, "--data", str(built), "--device", "cpu"])
    assert "base rate" in result.stdout
    image = tmp_path / "image.png"
    draw(3).save(image)
    result = CliRunner().invoke(predict, [str(image), "--checkpoint", weights, "--device", "cpu", "--json"])
    tags = json.loads(result.stdout)["tags"]
    assert list(tags) == ["general", "character", "artist", "meta"]
    assert "solo" in [each["name"] for each in tags["general"]]
    probabilities = [each["probability"] for each in tags["general"]]
    assert probabilities == sorted(probabilities, reverse=True)
    result = CliRunner().invoke(
        predict, [str(image), "--checkpoint", weights, "--device", "cpu", "--json", "--top", "1"]
    )
    assert len(json.loads(result.stdout)["tags"]["general"]) == 1
    assert "| artist | 1 | 1 |" in model_card(run)
    assert CliRunner().invoke(report_command, [str(run), "--out", str(tmp_path / "run.html")]).exit_code == 0
    assert "base_rate" in (tmp_path / "run.html").read_text()


def test_what_training_on_tags_refuses(built: Path, small_dataset: Path, tmp_path: Path) -> None:
    from animesion_training.engine import loop
    from animesion_training.recipe import load

    for data in (small_dataset, tmp_path):
        with pytest.raises(UsageError, match=r"has no tags"):
            loop.train(load("tagger"), data, tmp_path / "x", device="cpu")
    with pytest.raises(UsageError, match=r"trains on tags: leave teacher"):
        loop.train(
            load("tagger", ["model.name=vit_tiny_patch16", "model.selector=cal", "model.img_size=32"]),
            built,
            tmp_path / "y",
            device="cpu",
        )


@pytest.mark.slow
def test_an_onnx_export_has_names_categories_and_thresholds(run: Path, tmp_path: Path) -> None:
    import onnx

    from animesion_training.export import export
    from animesion_training.weights import read_card

    found = export(run / "best.safetensors", "onnx", tmp_path / "tagger.onnx")
    metadata = {each.key: each.value for each in onnx.load(found.path).metadata_props}
    card, described = read_card(run / "best.safetensors"), json.loads(metadata["animesion"])
    assert tuple(described["classes"]) == card.classes
    assert described["tag_categories"] == dict(card.tag_categories)
    assert tuple(described["thresholds"]) == card.thresholds
