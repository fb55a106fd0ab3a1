"""The YAML header of a dataset card, as the Hugging Face Hub reads it.

Keys and values are those of https://huggingface.co/docs/hub/datasets-cards and of gated datasets there.
"""

from __future__ import annotations

import re
from typing import Any

from animesion.cards.statements import derived_from
from animesion.config.card import CardSection, given
from animesion.config.recipe import Recipe

_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1
ncsa unlicense zlib pddl lgpl-lr unknown other
"""

#: Licence identifiers of the Hub; any other licence is listed there as `other`, with its name.
LICENCES = frozenset(_LICENCES.split())

#: Largest number of samples below each size category, from the smallest.
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)


def header(facts: dict[str, Any], recipe: Recipe, *, urls_only: bool) -> dict[str, Any]:
    """The header; without it Hugging Face `datasets` loads the JSON files next to the shards as the data.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
        urls_only: whether tables of URLs are published instead of shards.
    """
    card = recipe.card
    about: dict[str, Any] = {
        "pretty_name": card.title or recipe.name,
        **_licence(card),
        **({"language": card.languages} if card.languages else {}),
        "annotations_creators": list(card.annotations_creators) or ["found"],
        **({"source_datasets": found} if (found := _source_datasets(recipe)) else {}),
        "task_categories": ["image-classification"],
        "tags": list(dict.fromkeys(["webdataset", "fine-grained", "long-tail", *card.tags])),
        "size_categories": [next((name for bound, name in _SIZES if facts["images"] < bound), "1B<n<10B")],
        **_gate(card),
    }
    splits = facts["splits"]
    if urls_only:
        files = [{"split": name, "path": f"urls/{name}.parquet"} for name in splits]
        return {**about, "configs": [{"config_name": "default", "data_files": files}]}
    features = [
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
        {"name": "cls", "dtype": {"class_label": {"names": dict(_numbered(facts["class_names"]))}}},
        {"name": facts["image_field"], "dtype": "image"},
        {"name": "json", "struct": _json_features(facts)},
    ]
    if "txt" in facts["fields"]:
        features.append({"name": "txt", "dtype": "string"})
    return {
        **about,
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*.tar"} for name in splits],
            }
        ],
        "dataset_info": {
            "features": features,
            "splits": [
                {"name": name, "num_bytes": split["bytes"], "num_examples": split["samples"]}
                for name, split in splits.items()
            ],
            "download_size": sum(split["bytes"] for split in splits.values()),
            "dataset_size": sum(split["bytes"] for split in splits.values()),
        },
    }


def _licence(card: CardSection) -> dict[str, str]:
    licence = card.licence.lower()
    link = {"license_link": given(card.licence_url)} if given(card.licence_url) else {}
    if licence in LICENCES - {"other"}:
        return {"license": licence}
    return {"license": "other", "license_name": _slug(licence), **link}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or "not-stated"


def _source_datasets(recipe: Recipe) -> list[str]:
    """What the recipe says, or what its source implies; empty for files whose origin only their owner knows."""
    from animesion_scrapers import sites

    if recipe.card.source_datasets:
        return list(recipe.card.source_datasets)
    if derived_from(recipe) is not None:
        return ["extended"]
    return ["original"] if recipe.source.kind in sites.names() else []


def _gate(card: CardSection) -> dict[str, Any]:
    gate = card.gate
    if gate.access == "off":
        return {}
    fields = {
        question: kind if isinstance(kind, str) else {"type": "select", "options": list(kind)}
        for question, kind in gate.fields.items()
    }
    found: dict[str, Any] = {
        "extra_gated_heading": gate.heading,
        "extra_gated_prompt": gate.prompt,
        "extra_gated_button_content": gate.button,
        "extra_gated_fields": fields,
    }
    return {key: value for key, value in found.items() if value}


def _json_features(facts: dict[str, Any]) -> list[dict[str, Any]]:
    numbers = {"label", "width", "height"}
    texts = ["name", "split", "source", "source_id", "page_url", "file_url", "licence", "author", "rating", "md5"]
    names = ["label", *texts, "width", "height"]
    fields: list[dict[str, Any]] = [{"name": n, "dtype": "int64" if n in numbers else "string"} for n in names]
    fields += [{"name": "box", "sequence": "int64"}, {"name": "group", "dtype": "string"}]
    if "tags" in facts:
        categories = [{"name": name, "sequence": "string"} for name in facts["tags"]["categories"]]
        fields.append({"name": "tags", "struct": categories})
    return fields


def _numbered(names: list[str]) -> list[tuple[str, str]]:
    return [(str(i), name) for i, name in enumerate(names)]
