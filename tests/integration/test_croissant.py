"""`croissant.json` is valid Croissant, and its records are the samples that `animesion.open_dataset` reads."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import animesion
from animesion.cards.croissant import croissant
from animesion.config.recipe import Recipe

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mlcroissant") is None, reason="mlcroissant is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


# mlcroissant keeps unpacked tars under their relative paths, so each dataset is read with a cache of its own
READ = """
import hashlib, json, sys
import mlcroissant
loaded = mlcroissant.Dataset(jsonld=sys.argv[1])
for row in loaded.records("samples"):
    pixels = hashlib.sha256(row["samples/image"].convert("RGB").tobytes()).hexdigest()
    print(json.dumps([row["samples/key"].decode(), row["samples/label"], row["samples/split"].decode(), pixels]))
for row in loaded.records("classes"):
    print(json.dumps([row["classes/id"], row["classes/name"].decode()]))
"""


def read(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CROISSANT_CACHE": str(cache)}
    command = [sys.executable, "-c", READ, str(folder / "croissant.json")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_it_is_valid_and_complete(small_dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlcroissant as mlc

    with caplog.at_level(logging.WARNING):
        loaded = mlc.Dataset(jsonld=str(small_dataset / "croissant.json"))
    assert not loaded.metadata.ctx.issues.errors
    assert "not standard" not in caplog.text
    document = json.loads((small_dataset / "croissant.json").read_text(encoding="utf-8"))
    listed = {each["@id"]: each["sha256"] for each in document["distribution"] if each["@type"] == "cr:FileObject"}
    shards = {f"data/{path.name}" for path in (small_dataset / "data").glob("*.tar")}
    assert listed.keys() == shards | {"index.parquet", "classes.csv"}
    for name, digest in listed.items():
        assert hashlib.sha256((small_dataset / name).read_bytes()).hexdigest() == digest


#: One answer for every question of `[card]`.
ANSWERS = {
    "licence": "cc-by-nc-4.0", "version": "1.2.0", "creators": ["Ann Author", "Bo <b>Writer</b>"], "publisher": "A Lab",
    "published": "2026-01-31", "created": "2026-01-30", "collected": ["2025-03-01", "2025-04-10"],
    "homepage": "https://example.org/set", "citation": "@misc{set, title={A set}}", "languages": ["ja", "en"],
    "purpose": "to test", "terms": "each its own",
    "use": ["research", "non-commercial", "attribution", "no-redistribution"],
    "collection": "drawn", "privacy": "none known", "biases": "none known", "limits": "drawn", "impact": "none known",
    "synthetic": 0.25, "maintenance": "none", "takedown": "takedown@example.org", "source_datasets": ["user/older"],
}  # fmt: skip


def rendered(dataset: Path, to: Path, **answers: object) -> dict[str, Any]:
    """The Croissant file of a dataset whose recipe had these answers; it is also written."""
    facts = json.loads((dataset / "dataset.json").read_bytes())
    values = animesion.open_dataset(dataset).recipe.model_dump(mode="json")
    recipe = Recipe.model_validate({**values, "card": values["card"] | answers})
    digests = {
        name: hashlib.sha256((dataset / name).read_bytes()).hexdigest() for name in ("index.parquet", "classes.csv")
    }
    to.write_text(croissant(facts, recipe, digests), encoding="utf-8")
    found: dict[str, Any] = json.loads(to.read_bytes())
    return found


@pytest.mark.parametrize("sample", [False, True])
def test_the_validator_prints_nothing_when_all_is_answered(
    small_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, sample: bool
) -> None:
    import mlcroissant as mlc

    drawn = animesion.load_recipe("daf-re", sample=True).card.model_dump(mode="json")
    answers = {**drawn, **{name: ANSWERS[name] for name in ("version", "published", "citation")}} if sample else ANSWERS
    rendered(small_dataset, tmp_path / "croissant.json", **answers)
    with caplog.at_level(logging.WARNING):
        loaded = mlc.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert loaded.metadata.ctx.issues.report() == ""
    assert caplog.text == ""
    assert loaded.metadata.version == "1.2.0"
    if not sample:
        assert [person.name for person in loaded.metadata.creators] == ["Ann Author", "Bo <b>Writer</b>"]
        assert loaded.metadata.data_social_impact == "none known"


def test_answers_and_counts_are_stated(small_dataset: Path, tmp_path: Path) -> None:
    found = rendered(small_dataset, tmp_path / "croissant.json", **ANSWERS)
    assert found["license"] == "https://spdx.org/licenses/CC-BY-NC-4.0.html"
    assert (found["datePublished"], found["dateCreated"]) == ("2026-01-31", "2026-01-30")
    assert found["rai:hasSyntheticData"] is True
    assert "25% of the images are synthetic" in found["rai:dataCollection"]
    assert found["rai:dataLimitations"] == [
        "drawn", "The smallest class has 11 images: metrics of individual tail classes are uncertain."
    ]  # fmt: skip
    permission = found["usageInfo"]["odrl:permission"]
    assert [each["@id"] for each in permission["odrl:action"]] == ["duo:0000042"]
    assert [each["odrl:rightOperand"]["@id"] for each in permission["odrl:constraint"]] == ["duo:0000046"]
    assert found["usageInfo"]["odrl:prohibition"][0]["odrl:action"] == {"@id": "odrl:distribute"}
    activities = found["prov:wasGeneratedBy"]
    assert [each["prov:label"] for each in activities] == ["list", "fetch", "inspect", "curate", "pack"]
    assert [each.get("prov:wasInformedBy", {}).get("@id") for each in activities] == [
        None, "stages/list", "stages/fetch", "stages/inspect", "stages/curate",
    ]  # fmt: skip
    assert "37 of 37 images were kept" in activities[3]["description"]
    used = {each["@id"] for each in activities[0]["prov:used"]}
    assert used == {each["@id"] for each in found["prov:wasDerivedFrom"]}
    assert used == {"sources/folder", "https://huggingface.co/datasets/user/older"}


def test_what_is_not_answered_is_left_out(small_dataset: Path, tmp_path: Path) -> None:
    """ "none" is an answer for people, and no URL, date or version for a program."""
    nothing = dict.fromkeys(("homepage", "version", "published", "citation", "publisher"), "none")
    for answers in ({}, nothing):
        found = rendered(small_dataset, tmp_path / "croissant.json", **answers)
        absent = {
            "url",
            "version",
            "datePublished",
            "citeAs",
            "creator",
            "publisher",
            "rai:hasSyntheticData",
            "usageInfo",
        }
        assert not absent & found.keys()


def test_records_are_the_samples(small_dataset: Path, tmp_path: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    done = read(small_dataset, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    samples = {tuple(row) for row in rows if len(row) == 4}
    assert samples == {
        (sample.key, sample.label, sample.split, hashlib.sha256(sample.decode().tobytes()).hexdigest())
        for sample in dataset.samples()
    }
    assert len(rows) == len(dataset) + len(dataset.classes)
    assert [row for row in rows if len(row) == 2] == [[info.id, info.name] for info in dataset.classes]


def test_a_changed_shard_does_not_pass(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder)
    index = folder / "index.parquet"
    index.write_bytes(index.read_bytes() + b" ")
    done = read(folder, tmp_path / "cache")
    assert done.returncode != 0
    assert "index.parquet" in done.stderr
