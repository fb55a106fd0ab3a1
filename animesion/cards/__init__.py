"""Dataset cards for the Hugging Face Hub, rendered from the facts of a build.

Cards state what is not known instead of leaving it out. All untrusted text is escaped for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from animesion.config.recipe import Recipe
from animesion.errors import UsageError
from animesion.schemas import MEANINGS

if TYPE_CHECKING:
    from animesion.verification.diff import Difference

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


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

_SHARDS_SHOWN = 20


def dataset_card(
    facts: dict[str, Any],
    recipe: Recipe,
    *,
    changes: Difference | None = None,
    since: str = "",
    urls_only: bool = False,
) -> str:
    """Render the card of a built dataset.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
        changes: differences from an earlier build; None for no comparison.
        since: name of that build.
        urls_only: whether URLs are published instead of images; the card then omits the image grid and shards.

    Returns:
        Markdown with a YAML header.
    """
    shards = [shard for split in facts["splits"].values() for shard in split["shards"]]
    return (
        environment()
        .get_template("dataset.md.j2")
        .render(
            header=yaml.safe_dump(_header(facts, recipe, urls_only), sort_keys=False, allow_unicode=True, width=10_000),
            facts=facts,
            recipe=recipe,
            recipe_toml=recipe.to_toml(),
            reasons=MEANINGS,
            largest=_largest(facts),
            smallest=min((sum(counts.values()) for counts in facts["class_counts"]), default=0),
            grid=[] if urls_only else facts.get("grid", []),
            urls_only=urls_only,
            changes=changes,
            changed=_changed(changes),
            since=since,
            shards=[] if urls_only else shards[:_SHARDS_SHOWN],
            more_shards=0 if urls_only else max(0, len(shards) - _SHARDS_SHOWN),
        )
    )


def environment() -> jinja2.Environment:
    """The Jinja environment of this package's templates; untrusted values go through its filter `md`."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates.filters["md"] = escape_markdown
    templates.filters["thousands"] = lambda number: f"{number:,}"
    templates.filters["code"] = lambda text: f"`{text}`"
    return templates


def published_card(name: str) -> str:
    """Render the card of a published set that a built-in recipe reads, from the facts that check its downloads.

    Args:
        name: name of the recipe, such as `cotton80`.

    Raises:
        UsageError: there is no card for the recipe.
    """
    from animesion.config import recipe
    from animesion.sources.published_sets import PUBLISHED

    if name not in PUBLISHED:
        raise UsageError(f"recipe '{name}' reads no published set; --card is for {', '.join(PUBLISHED)}")
    template = environment().get_template("published.md.j2")
    return template.render(published=PUBLISHED[name], recipe_toml=recipe.builtin_text(name))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows literally, on one line."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", text)


def _header(facts: dict[str, Any], recipe: Recipe, urls_only: bool) -> dict[str, Any]:
    """The YAML header; without it Hugging Face `datasets` loads the JSON files next to the shards as the data."""
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
    licence = recipe.card.licence.lower()
    named = {"license": licence} if licence in LICENCES else {"license": "other", "license_name": _slug(licence)}
    about = {
        "pretty_name": recipe.card.title or recipe.name,
        **named,
        "task_categories": ["image-classification"],
        "tags": ["webdataset", "fine-grained", "long-tail", *recipe.card.tags],
        "size_categories": [next((name for bound, name in _SIZES if facts["images"] < bound), "n>1M")],
    }
    if urls_only:
        files = [{"split": name, "path": f"urls/{name}.parquet"} for name in splits]
        return {**about, "configs": [{"config_name": "default", "data_files": files}]}
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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or "not-stated"


def _changed(changes: Difference | None) -> list[str]:
    """Lines of a changelog: the number of each kind of change, changed recipe values, then the totals."""
    if changes is None:
        return []
    counts: dict[str, Sequence[object]] = {
        "sample(s) added": changes.added,
        "sample(s) removed": changes.removed,
        "sample(s) with another label": changes.relabelled,
        "sample(s) in another split": changes.moved,
        "image(s) with different bytes": changes.repainted,
        "image(s) with a different verdict or drop reason": changes.reasons,
        "class(es) added, removed or with another id": changes.classes,
        "recipe value(s) changed": changes.recipe,
    }
    lines = [f"{len(entries):,} {what}" for what, entries in counts.items() if entries]
    lines += [f"recipe: {each.what} from {each.before or 'nothing'} to {each.after or 'nothing'}"
             for each in changes.recipe[:20]]  # fmt: skip
    totals = ", ".join(f"{each.what} {each.before or 'none'} -> {each.after or 'none'}" for each in changes.totals)
    return [*lines, f"samples: {totals}"]


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
