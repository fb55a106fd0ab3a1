"""Dataset cards: a valid header for the Hub, every datasheet question, stated unknowns, and escaped text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

import animesion
from animesion import cards
from animesion.config.recipe import Recipe
from animesion_training.cli.card import card
from tests.conftest import draw_folders

HEADINGS = (
    "Motivation", "How it was built", "Sources and their terms", "Where every image went", "Long tail",
    "Splits", "Leak check", "Label noise", "Loading", "Known limits", "Biases", "Social impact",
    "Privacy, consent and removal",
    "Licence and contact", "Changes", "Checksums", "Citation", "Recipe",
)  # fmt: skip


def render_card(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(card, [str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def built(out: Path, *settings: str) -> Path:
    world = out.parent / f"{out.name}-world"
    if not world.exists():
        draw_folders(world)
    animesion.build(animesion.load_recipe("folder", [f"source.path={world}", *settings]), out, workers=1)
    return out


def test_the_hub_reads_the_header(small_dataset: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    read = hub.DatasetCard((small_dataset / "README.md").read_text(encoding="utf-8"))
    data = read.data.to_dict()
    dataset = animesion.open_dataset(small_dataset)
    assert data["license"] == "other"
    assert data["task_categories"] == ["image-classification"]
    splits = {each["name"]: each["num_examples"] for each in data["dataset_info"]["splits"]}
    assert splits == {name: info.samples for name, info in dataset.splits.items()}
    assert {each["split"] for each in data["configs"][0]["data_files"]} == set(dataset.splits)
    # a card written from the parsed header is the same card: no value is lost or changes its type
    again = hub.DatasetCard(f"---\n{hub.DatasetCardData(**data).to_yaml()}\n---\n")
    assert again.data.to_dict() == data


def test_the_header_has_the_answers_in_values_of_the_hub(small_dataset: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    facts = json.loads((small_dataset / "dataset.json").read_bytes())
    recipe = animesion.open_dataset(small_dataset).recipe
    answers: dict[str, Any] = {
        "licence": "My Own", "licence_url": "https://example.org/licence", "languages": ["ja"], "tags": ["anime"] * 2,
        "annotations_creators": ["crowdsourced"], "source_datasets": ["original"],
        "gate": {"access": "manual", "prompt": "No \u202eredistribution: # yes\n---", "heading": "Ask",
                 "fields": {"Affiliation": "text", "Purpose": ["research", "teaching"], "I agree: all": "checkbox"}},
    }  # fmt: skip
    values = recipe.model_dump(mode="json")
    recipe = Recipe.model_validate({**values, "card": values["card"] | answers})
    for images, size in ((37, "n<1K"), (1_000, "1K<n<10K"), (2_500_000, "1M<n<10M"), (10**9, "1B<n<10B")):
        data = hub.DatasetCard(cards.dataset_card({**facts, "images": images}, recipe)).data
        assert data.size_categories == [size]
    # as the options of huggingface_hub.DatasetCardData
    assert data.license == "other"
    assert (data.license_name, data.license_link) == ("my-own", "https://example.org/licence")
    assert (data.language, data.annotations_creators, data.source_datasets) == (["ja"], ["crowdsourced"], ["original"])
    assert data.tags == ["webdataset", "fine-grained", "long-tail", "anime"]
    assert data.extra_gated_prompt == answers["gate"]["prompt"]
    assert data.extra_gated_fields == {
        "Affiliation": "text",
        "Purpose": {"type": "select", "options": ["research", "teaching"]},
        "I agree: all": "checkbox",
    }
    for name, source in (("cotton80", ["extended"]), ("booru", ["original"]), ("folder", None)):
        other = animesion.load_recipe(name, ["source.path=x"] if name != "booru" else ["source.contact=a@example.org"])
        assert hub.DatasetCard(cards.dataset_card(facts, other)).data.source_datasets == source


def test_every_question_has_an_answer_or_is_stated_as_unknown(small_dataset: Path) -> None:
    text = render_card(small_dataset)
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [each for each in found if each in HEADINGS] == list(HEADINGS)
    assert text.count("Not stated in the recipe (`card.") == 8
    assert "not stated in the recipe (`card.synthetic`)" in text
    assert "error rate is not known" in text
    assert "no address is stated" in text


def test_texts_of_the_recipe_are_in_the_card(tmp_path: Path) -> None:
    folder = built(
        tmp_path / "set", 'card.licence="My Own Licence 2"', 'card.purpose="to test <b>cards</b>"',
        'card.privacy="drawn images"', 'card.takedown="takedown@example.org"',
    )  # fmt: skip
    text = render_card(folder)
    assert "license: other\nlicense_name: my-own-licence-2\n" in text
    assert "to test &lt;b&gt;cards&lt;/b&gt;" in text
    assert "drawn images" in text
    assert "To have an image removed: takedown@example.org." in text
    document = json.loads((folder / "croissant.json").read_text(encoding="utf-8"))
    assert document["rai:dataUseCases"] == ["to test <b>cards</b>"]


def test_counts_are_those_of_the_tables(small_dataset: Path) -> None:
    facts = json.loads((small_dataset / "dataset.json").read_bytes())
    rows = animesion.open_dataset(small_dataset).curated.to_pylist()
    kept = [row for row in rows if row["kept"]]
    (source,) = facts["provenance"]
    assert (source["source"], source["images"]) == ("folder", len(kept))
    assert source["without_licence"] == sum(not row["licence"] for row in kept)
    assert set(facts["leak_check"].values()) == {0}


def test_a_leak_is_counted(tmp_path: Path) -> None:
    world = tmp_path / "set-world"
    (world / "one").mkdir(parents=True)
    for i in range(10):
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(world / "one" / f"{i}.png")
    folder = built(tmp_path / "set", "duplicates.action=report", "split.strategy=legacy-dafre")
    leaks = json.loads((folder / "dataset.json").read_bytes())["leak_check"]
    assert leaks["equal original bytes"] == 1
    assert "| equal original bytes | 1 |" in render_card(folder)


def test_the_grid_shows_the_classes(small_dataset: Path) -> None:
    facts = json.loads((small_dataset / "dataset.json").read_bytes())
    assert sorted(facts["grid"]) == sorted(facts["class_names"])
    with Image.open(small_dataset / "plots" / "samples.jpg") as grid:
        assert grid.height > 96 * len(facts["grid"])
        assert len(grid.getcolors(1 << 24) or []) > 100


def test_changes_since_an_earlier_build(tmp_path: Path) -> None:
    old = built(tmp_path / "old")
    (tmp_path / "old-world").rename(tmp_path / "new-world")
    gone = next((tmp_path / "new-world").glob("plain*/*.png"))
    gone.unlink()
    new = built(tmp_path / "new")
    text = render_card(new, "--since", str(old))
    changes = text[text.index("## Changes") : text.index("## Checksums")]
    assert "Compared with old:" in changes
    assert "samples removed: 1" in changes
    assert "No differences from new." in render_card(new, "--since", str(new))


def test_a_dataset_of_an_earlier_version_has_a_card(small_dataset: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder)
    facts = json.loads((folder / "dataset.json").read_bytes())
    for name in ("provenance", "leak_check", "grid"):
        del facts[name]
    (folder / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "| folder | 37 |" in render_card(folder)
