"""The text that is published with a dataset: a Hugging Face card that any of the readers can load from.

Renders facts; what is not known says so. Every text from outside is escaped for the place where it stands.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
import yaml

from animesion.errors import UsageError
from animesion.recipe import Recipe
from animesion.records import REASONS

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(facts: dict[str, Any], recipe: Recipe) -> str:
    """The card of a built dataset.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template("dataset.md.j2").render(
        header=yaml.safe_dump(_header(facts, recipe), sort_keys=False, allow_unicode=True, width=10_000),
        facts=facts,
        recipe=recipe,
        recipe_toml=recipe.to_toml(),
        reasons=REASONS,
        largest=_largest(facts),
    )


def published_card(name: str) -> str:
    """The card of a published set that a built-in recipe reads, from the facts that downloads are checked against.

    Args:
        name: of the recipe, such as `cotton80`.

    Raises:
        UsageError: the recipe reads no published set that facts are kept of.
    """
    from animesion import recipe
    from animesion.sources.published import PUBLISHED

    if name not in PUBLISHED:
        raise UsageError(f"no published facts are kept for recipe '{name}'; there are cards of {', '.join(PUBLISHED)}")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["code"] = lambda text: f"`{text}`"
    template = environment.get_template("published.md.j2")
    return template.render(due=PUBLISHED[name], recipe_toml=recipe.builtin_text(name))


def escape_markdown(text: str) -> str:
    """Text as it is, shown literally: no markup, HTML or line breaks survive."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", text)


def _header(facts: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The YAML block: without it Hugging Face `datasets` takes a JSON beside the tars for the data."""
    splits = facts["splits"]
    features = [
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
        {"name": "cls", "dtype": {"class_label": {"names": dict(_numbered(facts["class_names"]))}}},
        {"name": facts["image_field"], "dtype": "image"},
        {"name": "json", "struct": _json_features()},
    ]
    if "txt" in facts["fields"]:
        features.append({"name": "txt", "dtype": "string"})
    return {
        "pretty_name": recipe.card.title or recipe.name,
        "license": recipe.card.licence,
        "task_categories": ["image-classification"],
        "tags": ["webdataset", "fine-grained", "long-tail", *recipe.card.tags],
        "size_categories": [next((name for bound, name in _SIZES if facts["images"] < bound), "n>1M")],
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


def _json_features() -> list[dict[str, Any]]:
    numbers = {"label", "width", "height"}
    texts = ["name", "split", "source", "source_id", "page_url", "file_url", "licence", "author", "rating", "md5"]
    names = ["label", *texts, "width", "height"]
    fields: list[dict[str, Any]] = [{"name": n, "dtype": "int64" if n in numbers else "string"} for n in names]
    return [*fields, {"name": "box", "sequence": "int64"}, {"name": "group", "dtype": "string"}]


def _numbered(names: list[str]) -> list[tuple[str, str]]:
    return [(str(i), name) for i, name in enumerate(names)]


def _largest(facts: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    pairs = list(zip(facts["class_names"], facts["class_counts"], strict=True))
    return sorted(pairs, key=lambda pair: (-sum(pair[1].values()), pair[0]))[:10]
