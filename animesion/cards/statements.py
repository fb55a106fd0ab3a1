"""What the card and `croissant.json` say about responsible use: the recipe's answers, and what a build has counted.

The names of the statements are those of Croissant's vocabulary for responsible AI
(https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from animesion.config.card import given, unanswered
from animesion.config.recipe import Recipe
from animesion.schemas import DropReason
from animesion.sources.published_facts import PUBLISHED, PublishedSet

_ORDER = list(DropReason)
_FETCH = frozenset(_ORDER[_ORDER.index(DropReason.UNSAFE_PATH) : _ORDER.index(DropReason.EMPTY_FILE)])
_INSPECT = frozenset(_ORDER[_ORDER.index(DropReason.EMPTY_FILE) : _ORDER.index(DropReason.TOO_LARGE)])
_SMALL_CLASS = 20


@dataclass(frozen=True)
class Stage:
    """One stage of a build.

    Attributes:
        name: such as `fetch`.
        did: what it did, with counts.
        tools: software that it ran, besides Animesion.
    """

    name: str
    did: str
    tools: tuple[str, ...] = ()


def synthetic_share(recipe: Recipe) -> float | None:
    """Share of the images that a program or a model made; None if nobody knows."""
    if isinstance(recipe.card.synthetic, float):
        return recipe.card.synthetic
    return 1.0 if recipe.source.kind.startswith("sample") else None


def derived_from(recipe: Recipe) -> PublishedSet | None:
    """The published set that the source reads; None for other sources."""
    found = PUBLISHED.get(str(recipe.source.options.get("set", recipe.source.kind)))
    return found if found and found.source == recipe.source.kind else None


def open_questions(recipe: Recipe) -> list[str]:
    """Keys of `[card]` that the recipe leaves open, and a build cannot answer."""
    from animesion_scrapers import sites

    kind = recipe.source.kind
    origin_known = kind in sites.names() or kind.startswith("sample") or derived_from(recipe) is not None
    return unanswered(recipe.card, origin_known=origin_known)


def responsible_use(facts: Mapping[str, Any], recipe: Recipe) -> dict[str, list[str]]:
    """Sentences by name of the vocabulary; a name without any is left out.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
    """
    card = recipe.card
    found = {
        "dataCollection": [*_text(card.collection), *_collected(facts, recipe)],
        "dataCollectionType": _collection_type(recipe),
        "dataCollectionMissingData": _missing(facts),
        "dataPreprocessingProtocol": [stage.did for stage in stages(facts, recipe) if stage.name in ("curate", "pack")],
        "dataAnnotationProtocol": _labels(facts, recipe),
        "machineAnnotationTools": _detectors(recipe),
        "dataUseCases": _text(card.purpose),
        "dataLimitations": [*_text(card.limits), *_limits(facts)],
        "dataBiases": [*_text(card.biases), *_imbalance(facts)],
        "personalSensitiveInformation": [*_text(card.privacy), *_authors(facts)],
        "dataSocialImpact": _text(card.impact),
        "dataReleaseMaintenancePlan": [*_text(card.maintenance), *_takedown(recipe)],
    }
    return {name: sentences for name, sentences in found.items() if sentences}


def stages(facts: Mapping[str, Any], recipe: Recipe) -> list[Stage]:
    """The stages of the build, in order, and a removal after it.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
    """
    funnel, split = facts["funnel"], recipe.split
    dropped = funnel["dropped"]
    shards = sum(len(each["shards"]) for each in facts["splits"].values())
    rest = {reason: count for reason, count in dropped.items() if reason not in _FETCH | _INSPECT}
    shares = ", ".join(f"{name} {each['samples']:,}" for name, each in facts["splits"].items())
    detectors = _detectors(recipe)
    boxes = f" Boxes come from {recipe.crop.described}." if recipe.crop.detector != "none" else ""
    size = f"{recipe.pack.size} pixels ({recipe.pack.fit})" if recipe.pack.size else "their own size"
    found = [
        Stage("list", f"The source {recipe.source.kind} listed {funnel['seen']:,} images and their labels."),
        Stage(
            "fetch",
            f"{funnel['fetched']:,} files of {funnel['fetched_bytes']:,} bytes were fetched."
            + _counts(" Not used", dropped, _FETCH),
        ),
        Stage(
            "inspect",
            f"Each file was decoded once and measured.{boxes}" + _counts(" Dropped", dropped, _INSPECT),
            tuple(f"detector {name}" for name in detectors),
        ),
        Stage(
            "curate",
            f"{funnel['kept']:,} of {funnel['seen']:,} images were kept. {_duplicates(facts, recipe)}"
            f"{_counts(' Dropped', rest, rest)} Split {facts['split_strategy']}: {shares}; seed {split.seed}.",
        ),
        Stage(
            "pack",
            f"Images were packed as {facts['image_field']} at {size} into {shards:,} shards, in an order of "
            f"seed {recipe.pack.seed}.",
        ),
    ]
    if facts.get("removed_digests"):
        found.append(
            Stage("remove", f"Images were removed on request: {facts['removed_digests']:,} digests in removed.csv.")
        )
    return found


def _text(answer: str) -> list[str]:
    return [" ".join(answer.split())] if answer.strip() else []


def _counts(what: str, dropped: Mapping[str, int], reasons: Iterable[str]) -> str:
    listed = [f"{count:,} {reason}" for reason, count in dropped.items() if reason in set(reasons)]
    return f"{what}: {', '.join(listed)}." if listed else ""


def _collected(facts: Mapping[str, Any], recipe: Recipe) -> list[str]:
    sources = ", ".join(f"{each['images']:,} from {each['source']}" for each in facts["provenance"])
    sentences = [f"Kept images by source: {sources}."]
    share = synthetic_share(recipe)
    if share is not None:
        sentences.append(f"{100 * share:.3g}% of the images are synthetic, made by a program or a model.")
    if published := derived_from(recipe):
        sentences.append(f"They are those of {published.title}, which others have published.")
    return sentences


def _collection_type(recipe: Recipe) -> list[str]:
    """The recommended value for a source; nothing for files whose origin only their owner knows."""
    from animesion_scrapers import sites

    kind = recipe.source.kind
    if kind in sites.names():
        return ["Web API"]
    if kind == "urls":
        return ["Web Scraping"]
    if kind.startswith("sample"):
        return ["Others"]
    return ["Secondary Data analysis"] if derived_from(recipe) else []


def _missing(facts: Mapping[str, Any]) -> list[str]:
    sentence = _counts("Images that were listed, but not fetched or not decoded", facts["funnel"]["dropped"],
                       _FETCH | _INSPECT)  # fmt: skip
    return [sentence] if sentence else []


def _duplicates(facts: Mapping[str, Any], recipe: Recipe) -> str:
    near = f", and near duplicates by {recipe.duplicates.hash}" if recipe.duplicates.near else ""
    did = "all images but one of each were dropped" if recipe.duplicates.action == "drop" else "they were kept"
    return f"{facts['duplicate_clusters']:,} clusters of duplicates by bytes and pixels{near}: {did}."


def _labels(facts: Mapping[str, Any], recipe: Recipe) -> list[str]:
    decided = recipe.curate.decisions
    by_hand = f" A curator changed {len(decided.label):,} labels." if decided.label else ""
    return [
        f"Labels are those of the source {recipe.source.kind}; the build does not check them against images.{by_hand} "
        f"{facts['label_conflicts']:,} clusters of duplicates had several labels."
    ]


def _detectors(recipe: Recipe) -> list[str]:
    """Names of the detectors that looked for boxes, without paths of files."""
    names = [name.partition(":")[0] for name in recipe.crop.detectors if name not in ("none", "boxes")]
    return ["anime, unless the source has boxes" if name == "auto" else name for name in names]


def _limits(facts: Mapping[str, Any]) -> list[str]:
    smallest = min((sum(counts.values()) for counts in facts["class_counts"]), default=0)
    if smallest >= _SMALL_CLASS:
        return []
    return [f"The smallest class has {smallest:,} images: metrics of individual tail classes are uncertain."]


def _imbalance(facts: Mapping[str, Any]) -> list[str]:
    factor = facts["long_tail"]["imbalance_factor"]
    return [f"Class imbalance: the largest class has {factor:.0f} times as many images as the smallest."]


def _authors(facts: Mapping[str, Any]) -> list[str]:
    named = sum(each["images"] - each["without_author"] for each in facts["provenance"])
    return [f"The metadata of {named:,} images names an author."] if named else []


def _takedown(recipe: Recipe) -> list[str]:
    address = given(recipe.card.takedown) or given(recipe.card.contact)
    return [f"To have an image removed: {address}."] if address else []
