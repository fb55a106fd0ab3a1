"""The section `[card]` of a recipe: what only the authors of a dataset can say about it.

The card (`README.md`) and `croissant.json` state these answers beside what a build has counted. `unanswered` lists what
is left open; "none known" or "none" is an answer.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from animesion.config.settings import Section

_NONE = frozenset({"none", "none known"})
# Semantic Versioning 2.0.0
_VERSION = re.compile(
    r"(?:0|[1-9]\d{0,8})(?:\.(?:0|[1-9]\d{0,8})){2}(?:-[0-9A-Za-z.-]{1,64})?(?:\+[0-9A-Za-z.-]{1,64})?"
)
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_DATASET = re.compile(
    r"original|extended|(?:extended\|)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
)


def given(answer: str) -> str:
    """An answer that is a fact, such as a URL; empty if the answer is that there is none."""
    return "" if answer.strip().casefold() in _NONE else answer.strip()


def _dated(value: Any) -> Any:
    """TOML has dates; a recipe has their text."""
    return value.isoformat() if type(value) is datetime.date else value


def _is_date(text: str) -> str:
    if found := given(text):
        try:
            proper = datetime.date.fromisoformat(found).isoformat() == found
        except ValueError:
            proper = False
        if not proper:
            raise ValueError(f"{found[:40]!r} is not a day: write YYYY-MM-DD")
    return text


def _is_url(text: str) -> str:
    if found := given(text):
        try:
            parts = urlsplit(found)
            proper = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", found)
        except ValueError:
            proper = False
        if not proper:
            raise ValueError(f"{found[:80]!r} is not a URL: write one that starts with https://")
    return text


Day = Annotated[str, BeforeValidator(_dated), AfterValidator(_is_date)]
Url = Annotated[str, AfterValidator(_is_url)]


class GateSection(Section):
    """Conditions that users of the Hub accept before they get the files."""

    access: Literal["off", "auto", "manual"] = Field(
        "off",
        description="whom `publish` admits to the Hub repository: all who accept the conditions (`auto`), or those "
        "whose request is granted (`manual`); `off` leaves its setting as it is",
    )
    prompt: str = Field("", description="the conditions, as Markdown")
    fields: dict[str, str | list[str]] = Field(
        {},
        description="questions of the request: `text`, `checkbox`, `country` or `date_picker` by question, or a list "
        "of choices",
    )
    heading: str = Field("", description="heading of the request; empty for the Hub's own")
    button: str = Field("", description="text of the button that sends the request; empty for the Hub's own")

    @field_validator("fields")
    @classmethod
    def _kinds_of_the_hub(cls, value: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for question, kind in value.items():
            if isinstance(kind, str) and kind not in ("text", "checkbox", "country", "date_picker"):
                raise ValueError(
                    f"the kind of {question[:40]!r} is text, checkbox, country, date_picker or a list of choices, "
                    f"not {kind[:40]!r}"
                )
            if not kind:
                raise ValueError(f"the list of choices of {question[:40]!r} is empty")
        return value

    @model_validator(mode="after")
    def _is_on(self) -> Self:
        if self.access == "off" and (self.prompt or self.fields):
            raise ValueError("prompt and fields are shown only if access is 'auto' or 'manual': set access")
        return self


class CardSection(Section):
    """Answers that a program cannot know."""

    title: str = ""
    summary: str = ""
    licence: str = Field("other", description="licence identifier as the Hugging Face hub spells it")
    licence_url: Url = Field("", description="URL of the licence, for one that the hub does not know")
    version: str = Field("", description="version of the dataset, such as `1.0.0`")
    creators: list[str] = Field([], description="names of the people who made the dataset")
    publisher: str = Field("", description="the organisation that publishes it, and made it if `creators` is empty")
    published: Day = Field("", description="day of its publication, YYYY-MM-DD")
    created: Day = Field("", description="day on which it was made")
    collected: list[Day] = Field([], description="first and last day on which its images were collected")
    homepage: Url = ""
    contact: str = ""
    citation: str = ""
    tags: list[str] = Field([], description="additional tags for the hub")
    languages: list[str] = Field(
        [], description="ISO 639 codes of the languages of names and captions, such as `ja`; or `multilingual`"
    )
    purpose: str = Field("", description="intended use of the dataset, and uses to avoid")
    terms: str = Field("", description="terms under which the sources allow use of their images")
    use: list[
        Literal[
            "no-restriction",
            "research",
            "non-commercial",
            "not-for-profit",
            "publication-required",
            "ethics-approval",
            "attribution",
            "no-redistribution",
        ]
    ] = Field([], description="terms of use for programs, as DUO and ODRL name them")
    collection: str = Field("", description="how the images came to be, and where they come from")
    privacy: str = Field("", description="people who are shown or named, and whether they consented")
    biases: str = Field("", description="what is over- and under-represented")
    limits: str = Field("", description="limitations beyond those that the card counts")
    impact: str = Field("", description="effects on society, good and bad, and what was done about them")
    synthetic: float | Literal["", "unknown"] = Field(
        "", description="share of the images that a program or a model made, 0 to 1, or `unknown`"
    )
    maintenance: str = Field("", description="who maintains the dataset, how often, and until when")
    takedown: str = Field("", description="where to request removal of an image, if not from the contact")
    annotations_creators: list[
        Literal["found", "crowdsourced", "expert-generated", "machine-generated", "no-annotation", "other"]
    ] = Field([], description="where the labels come from; by default `found`, as a source has them")
    source_datasets: list[str] = Field(
        [], description="`original`, or the datasets that it was made from, such as `user/name` of the hub"
    )
    gate: GateSection = Field(
        GateSection(), description="keys `access`, `prompt`, `fields`, `heading`, `button`: who gets the files"
    )

    @field_validator("version")
    @classmethod
    def _semantic(cls, value: str) -> str:
        if given(value) and not _VERSION.fullmatch(given(value)):
            raise ValueError(f"{value[:40]!r} is not a version: write MAJOR.MINOR.PATCH, such as '1.0.0'")
        return value

    @field_validator("collected")
    @classmethod
    def _first_and_last(cls, value: list[str]) -> list[str]:
        if len(value) > 2 or sorted(value) != value:
            raise ValueError("collected is the first day and the last day, in this order")
        return value

    @field_validator("languages")
    @classmethod
    def _codes(cls, value: list[str]) -> list[str]:
        for code in value:
            if not _LANGUAGE.fullmatch(code):
                raise ValueError(f"{code[:40]!r} is not a code of two or three letters, such as 'ja'")
        return value

    @field_validator("source_datasets")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not _DATASET.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not 'original', 'extended' or the name of a dataset")
        return value

    @field_validator("synthetic")
    @classmethod
    def _share(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"{value:g} is not a share from 0 to 1")
        return value

    @model_validator(mode="after")
    def _uses_agree(self) -> Self:
        if "no-restriction" in self.use and set(self.use) - {"no-restriction", "attribution"}:
            raise ValueError(f"use: 'no-restriction' contradicts {', '.join(self.use)}")
        return self


def unanswered(card: CardSection, *, origin_known: bool) -> list[str]:
    """Keys of the questions that are left open, in the order of the section.

    These are what Croissant 1.1 requires or its validator recommends, the minimal set of its vocabulary for responsible
    AI, and the terms of use.

    Args:
        card: the answers.
        origin_known: whether the build knows where the images come from, as it crawled or drew them.
    """
    names = [
        "version",
        "published",
        "homepage",
        "citation",
        "purpose",
        "terms",
        "privacy",
        "biases",
        "limits",
        "impact",
    ]
    found = {name for name in names if not getattr(card, name).strip()}
    found |= {"licence"} if card.licence == "other" and not card.licence_url else set()
    found |= {"creators"} if not card.creators and not card.publisher.strip() else set()
    found |= {"collection"} if not card.collection.strip() and not origin_known else set()
    found |= {"synthetic"} if card.synthetic == "" else set()
    return [name for name in CardSection.model_fields if name in found]
