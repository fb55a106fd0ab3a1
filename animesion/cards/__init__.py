"""Dataset cards for the Hugging Face Hub, rendered from the facts of a build.

Cards state what is not known instead of leaving it out. All untrusted text is escaped for Markdown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from animesion.cards import hub, statements
from animesion.config.card import given
from animesion.config.recipe import Recipe
from animesion.errors import UsageError
from animesion.schemas import MEANINGS, TAG_MEANINGS

if TYPE_CHECKING:  # a build that has nothing to do renders no card
    import jinja2

    from animesion.verification.diff import Difference

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
    import yaml

    shards = [shard for split in facts["splits"].values() for shard in split["shards"]]
    return (
        environment()
        .get_template("dataset.md.j2")
        .render(
            header=yaml.safe_dump(
                hub.header(facts, recipe, urls_only=urls_only), sort_keys=False, allow_unicode=True, width=10_000
            ),
            facts=facts,
            recipe=recipe,
            recipe_toml=recipe.to_toml(),
            reasons=MEANINGS,
            tag_reasons=TAG_MEANINGS,
            largest=_largest(facts),
            said=statements.responsible_use(facts, recipe),
            synthetic=statements.synthetic_share(recipe),
            grid=[] if urls_only else facts.get("grid", []),
            urls_only=urls_only,
            changes=changes,
            changed=_changed(changes),
            since=since,
            shards=[] if urls_only else shards[:_SHARDS_SHOWN],
            more_shards=0 if urls_only else max(0, len(shards) - _SHARDS_SHOWN),
        )
    )


@functools.cache  # so that a template is compiled once
def environment() -> jinja2.Environment:
    """The Jinja environment of this package's templates; untrusted values go through its filter `md`."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates.filters["md"] = escape_markdown
    templates.filters["given"] = given
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
    from animesion.sources.published_facts import PUBLISHED

    if name not in PUBLISHED:
        raise UsageError(f"recipe '{name}' reads no published set; --card is for {', '.join(PUBLISHED)}")
    template = environment().get_template("published.md.j2")
    return template.render(published=PUBLISHED[name], recipe_toml=recipe.builtin_text(name))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows literally, on one line."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", text)


def _changed(changes: Difference | None) -> list[str]:
    """Lines of a changelog: the number of each kind of change, changed recipe values, then the totals."""
    if changes is None:
        return []
    counts: dict[str, Sequence[object]] = {
        "samples added": changes.added,
        "samples removed": changes.removed,
        "samples with another label": changes.relabelled,
        "samples in another split": changes.moved,
        "images with different bytes": changes.repainted,
        "images with a different verdict or drop reason": changes.reasons,
        "classes added, removed or with another id": changes.classes,
        "recipe values changed": changes.recipe,
    }
    lines = [f"{what}: {len(entries):,}" for what, entries in counts.items() if entries]
    lines += [f"recipe: {each.what} from {each.before or 'nothing'} to {each.after or 'nothing'}"
             for each in changes.recipe[:20]]  # fmt: skip
    totals = ", ".join(f"{each.what} {each.before or 'none'} -> {each.after or 'none'}" for each in changes.totals)
    return [*lines, f"samples: {totals}"]


def _largest(facts: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    pairs = list(zip(facts["class_names"], facts["class_counts"], strict=True))
    return sorted(pairs, key=lambda pair: (-sum(pair[1].values()), pair[0]))[:10]
