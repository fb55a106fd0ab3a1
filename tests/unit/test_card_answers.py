"""The section `[card]` of a recipe: what it accepts, and what it leaves open."""

from __future__ import annotations

import pytest

import animesion
from animesion.cards.statements import open_questions
from animesion.errors import UsageError

ANSWERED = [
    "card.licence=cc-by-4.0", "card.version=1.0.0", 'card.creators=["Ann"]', "card.published=2026-01-31",
    "card.homepage=https://example.org", "card.citation=none", "card.purpose=a", "card.terms=b", "card.collection=c",
    "card.privacy=none known", "card.biases=none known", "card.limits=d", "card.impact=none known", "card.synthetic=0",
]  # fmt: skip


def test_open_questions_are_listed_once_and_an_answer_silences_each() -> None:
    recipe = animesion.load_recipe("folder", ["source.path=x"])
    assert open_questions(recipe) == [setting.partition("=")[0].removeprefix("card.") for setting in ANSWERED]
    answered = animesion.load_recipe("folder", ["source.path=x", *ANSWERED])
    assert open_questions(answered) == []
    assert answered.card.published == "2026-01-31"  # a date of TOML
    assert answered.card.synthetic == 0
    unknown = animesion.load_recipe("folder", ["source.path=x", *ANSWERED, "card.synthetic=unknown"])
    assert open_questions(unknown) == []


def test_a_build_that_knows_the_origin_asks_less_and_a_drawn_sample_nothing() -> None:
    crawl = animesion.load_recipe("booru", ["source.contact=you@example.org"])
    assert "collection" not in open_questions(crawl)
    assert "synthetic" in open_questions(crawl)
    for name in ("daf-re", "cotton80", "folder"):
        assert open_questions(animesion.load_recipe(name, sample=True)) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("card.version=v1", "MAJOR.MINOR.PATCH"),
        ('card.version="1.0"', "MAJOR.MINOR.PATCH"),
        ("card.published=yesterday", "YYYY-MM-DD"),
        ("card.published=2026-02-30", "YYYY-MM-DD"),
        ("card.published=20260131", "string"),
        ("card.published=2026-01-31T00:00:00", "string"),
        ("card.collected=[2026-02-01, 2026-01-01]", "in this order"),
        ("card.homepage=example.org", "not a URL"),
        ("card.homepage=javascript://example.org", "not a URL"),
        ('card.homepage="https://[::1"', "not a URL"),
        ('card.languages=["Japanese"]', "two or three letters"),
        ('card.source_datasets=["../x"]', "name of a dataset"),
        ("card.synthetic=1.5", "share from 0 to 1"),
        ("card.synthetic=nan", "share from 0 to 1"),
        ('card.use=["no-restriction", "research"]', "contradicts"),
        ('card.use=["resarch"]', "card.use"),
        ('card.annotations_creators=["me"]', "card.annotations_creators"),
        ("card.gate.prompt=agree", "set access"),
        ('card.gate={access="auto", fields={Name="number"}}', "date_picker"),
        ('card.gate={access="auto", fields={Name=[]}}', "empty"),
        ("card.creator=Ann", "did you mean"),
    ],
)
def test_a_wrong_answer_is_refused_in_one_sentence(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        animesion.load_recipe("folder", ["source.path=x", setting])
    assert "\n" not in str(refused.value)


def test_answers_survive_the_resolved_recipe() -> None:
    """The recipe in the output folder is read back to the same answers."""
    from animesion.config.recipe import Recipe
    from animesion.config.settings import parse_toml

    gate = 'card.gate={access="auto", prompt="Agree", fields={Use=["a", "b"], Name="text"}}'
    recipe = animesion.load_recipe(
        "folder", ["source.path=x", *ANSWERED, gate, "card.collected=[2026-01-01, 2026-01-02]"]
    )
    assert Recipe.model_validate(parse_toml(recipe.to_toml(), "recipe")).card == recipe.card
