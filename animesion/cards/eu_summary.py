"""The part of the EU's public summary of training content that the tables of a dataset can answer.

The template of the AI Office (Regulation (EU) 2024/1689, Article 53(1)(d), 24 July 2025) has three sections: general
information, data sources, data processing. It is for providers of general-purpose models, so several answers are not in
any dataset. An answer is either counted from tables and the recipe, or None: nothing is inferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from animesion.cards import escape_markdown
from animesion.config.card import given
from animesion.config.recipe import Recipe
from animesion.schemas import DropReason

#: The template asks for the domains with the most content: this share of all, by bytes.
TOP_DOMAINS = 0.1
#: Most domains that the Markdown lists; JSON has all of the share.
_LISTED = 50
#: Reasons that are a site's or an author's refusal.
_REFUSALS = (
    DropReason.REFUSED,
    DropReason.ROBOTS_OPT_OUT,
    DropReason.USAGE_OPT_OUT,
    DropReason.TDM_OPT_OUT,
    DropReason.METADATA_OPT_OUT,
    DropReason.C2PA_OPT_OUT,
    DropReason.REMOVED,
)
_MISSING = "**Missing**: neither the tables nor the recipe of the dataset say."


def summary(facts: Mapping[str, Any], recipe: Recipe, curated: pa.Table) -> dict[str, Any]:
    """The answers by section and question; None where the dataset does not know.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
        curated: table with schema `animesion.schemas.CURATED`.

    Returns:
        JSON-ready. Sizes are in images and bytes of the original files.
    """
    from animesion_scrapers import sites

    crawled = set(sites.names())
    card = recipe.card
    kept = curated.filter(curated["kept"])
    kinds = kept["source"].to_pylist()
    per_kind: Counter[str] = Counter(kinds)
    sizes = Counter[str]()
    for kind, size in zip(kinds, kept["bytes"].to_pylist(), strict=True):
        sizes[kind] += size
    drawn = sorted(kind for kind in per_kind if kind.startswith("sample") or recipe.source.kind.startswith("sample"))
    online = sorted(kind for kind in per_kind if kind in crawled and kind not in drawn)
    by_url = sorted(kind for kind in per_kind if kind == "urls" and kind not in drawn)
    others = sorted(per_kind.keys() - {*drawn, *online, *by_url})

    of_web = pc.is_in(kept["source"], value_set=pa.array([*online, *by_url], pa.string()))

    def listed(names: list[str]) -> list[dict[str, Any]]:
        return [{"source": name, "images": per_kind[name], "bytes": sizes[name]} for name in names]

    def stated(text: str) -> str | None:
        return text or None

    return {
        "template": "Regulation (EU) 2024/1689, Article 53(1)(d)",
        "dataset": facts["name"],
        "general": {
            "provider": None,
            "contact": stated(card.contact),
            "model": None,
            "modalities": ["image", *(["text"] if recipe.pack.caption else [])],
            "images": len(kept),
            "bytes": sum(sizes.values()),
            "size_range": _size_range(len(kept)),
            "content": stated(card.summary or facts["summary"]),
            "classes": facts["classes"],
            "latest_date": stated(given(card.collected[-1])) if card.collected else None,
            "still_collected": None,
            "languages": list(card.languages) or None,
        },
        "sources": {
            # whether a folder or a table is a public dataset, only its owner knows
            "public_datasets": None if others else [],
            "private_datasets": None if others else [],
            "unassigned": listed(others),
            "crawled": listed([*online, *by_url]),
            "crawler": "animesion" if online or by_url else None,
            "crawler_contact": stated(str(recipe.source.options.get("contact", ""))),
            "period": " to ".join(card.collected) or None if online or by_url else None,
            "domains": _domains(kept.filter(of_web)),
            "top_domains_share": TOP_DOMAINS,
            "user_data": None,
            "synthetic": listed(drawn),
            "terms": stated(card.terms),
        },
        "processing": {
            "robots_obeyed": recipe.source.options.get("robots", True) if online or by_url else None,
            "not_used": _refused(curated),
            "removed_digests": facts.get("removed_digests", 0),
            "licences_allowed": list(recipe.filter.licences),
            "images_without_licence": sum(not licence for licence in kept["licence"].to_pylist()),
            "removal_requests": stated(card.takedown or card.contact),
            "illegal_content": None,
            "personal_data": stated(card.privacy),
        },
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The summary as Markdown; what is missing is named as missing.

    Args:
        found: result of `summary`.
    """
    return "\n".join([*_lines(found), ""])


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    general, sources, processing = found["general"], found["sources"], found["processing"]
    yield f"# Summary of training content: {escape_markdown(found['dataset'])}"
    yield f"\nAnswers for the template of {found['template']}, from the tables and the recipe of one dataset."
    yield "\n## 1. General information\n"
    yield f"- Provider, and its representative in the Union: {_text(general['provider'])}"
    yield f"- Contact: {_text(general['contact'])}"
    yield f"- Model, its versions, and the date of its placing on the market: {_text(general['model'])}"
    yield f"- Modalities: {', '.join(general['modalities'])}"
    yield f"- Size: {general['images']:,} images ({general['size_range']}), {general['bytes']:,} bytes before packing"
    yield f"- Type of content, {general['classes']:,} classes: {_text(general['content'])}"
    yield f"- Latest date of collection: {_text(general['latest_date'])}"
    yield f"- Whether data are still collected: {_text(general['still_collected'])}"
    yield f"- Languages and regions: {_text(', '.join(general['languages'] or ()) or None)}"
    yield "\n## 2. Data sources\n"
    yield f"- 2.1 Publicly available datasets: {_rows(sources['public_datasets'])}"
    yield f"- 2.2 Private datasets of third parties: {_rows(sources['private_datasets'])}"
    if sources["unassigned"]:
        yield f"  - of 2.1 or 2.2, which the recipe does not say: {_rows(sources['unassigned'])}"
    yield f"- 2.3 Crawled from online sources: {_rows(sources['crawled'])}"
    if sources["crawled"]:
        yield f"  - Crawler: {_text(sources['crawler'])}; its contact: {_text(sources['crawler_contact'])}"
        yield f"  - Period: {_text(sources['period'])}"
    if sources["domains"]:
        share = f"{sources['top_domains_share']:.0%}"
        yield f"  - The top {share} of the domains of files, by bytes:"
        for each in sources["domains"][:_LISTED]:
            yield f"    - {escape_markdown(each['domain'])}: {each['images']:,} images, {each['bytes']:,} bytes"
        if (more := len(sources["domains"]) - _LISTED) > 0:
            yield f"    - and {more:,} more, in the JSON"
    yield f"- 2.4 Data of users: {_text(sources['user_data'])}"
    yield f"- 2.5 Synthetic data: {_rows(sources['synthetic'])}"
    yield f"- Terms of the sources: {_text(sources['terms'])}"
    yield "\n## 3. Data processing\n"
    robots = processing["robots_obeyed"]
    obeyed = "not asked, as nothing was crawled" if robots is None else "obeyed" if robots else "not obeyed"
    yield f"- 3.1 Reservations of rights: robots.txt and X-Robots-Tag were {obeyed}"
    for each in processing["not_used"]:
        yield f"  - {escape_markdown(each['reason'])}: {each['images']:,} images were not used"
    yield f"  - Digests of images that were removed on request: {processing['removed_digests']:,}"
    yield f"  - Licences that the recipe allows: {escape_markdown(', '.join(processing['licences_allowed'])) or 'any'}"
    yield f"  - Images without a stated licence: {processing['images_without_licence']:,}"
    yield f"  - Where to request a removal: {_text(processing['removal_requests'])}"
    yield f"- 3.2 Removal of illegal content: {_text(processing['illegal_content'])}"
    yield f"- 3.3 Personal data: {_text(processing['personal_data'])}"


def _text(answer: Any) -> str:
    return _MISSING if answer is None else escape_markdown(str(answer))


def _rows(listed: list[dict[str, Any]] | None) -> str:
    if listed is None:
        return _MISSING
    rows = (f"{escape_markdown(row['source'])}, {row['images']:,} images, {row['bytes']:,} bytes" for row in listed)
    return "; ".join(rows) or "none"


def _size_range(images: int) -> str:
    """The range of the template that a number of images is in."""
    if images < 1_000_000:
        return "less than 1 million images"
    return "1 million to 1 billion images" if images <= 1_000_000_000 else "more than 1 billion images"


def _domains(kept: pa.Table) -> list[dict[str, Any]]:
    """The hosts of the kept files with the most bytes: `TOP_DOMAINS` of all hosts, and one at least."""
    images, size = Counter[str](), Counter[str]()
    for url, length in zip(kept["file_url"].to_pylist(), kept["bytes"].to_pylist(), strict=True):
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:  # such as `http://[`
            host = ""
        if host:
            images[host] += 1
            size[host] += length
    ranked = sorted(size, key=lambda host: (-size[host], host))
    top = ranked[: -int(-TOP_DOMAINS * len(ranked) // 1)]
    return [{"domain": host, "images": images[host], "bytes": size[host]} for host in top]


def _refused(curated: pa.Table) -> list[dict[str, Any]]:
    """Number of images that were not used as a site or an author refuses, by reason and its detail."""
    rows = zip(curated["reason"].to_pylist(), curated["detail"].to_pylist(), strict=True)
    counts = Counter(f"{why} ({detail})" if detail else why for why, detail in rows if why in _REFUSALS)
    return [{"reason": why, "images": count} for why, count in sorted(counts.items())]
