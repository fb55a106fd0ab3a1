"""Write the reference pages of the documentation from the code: `python docs/make_reference.py`.

Recipe keys and source options come from their pydantic models, tables from `animesion.schemas` and the comments beside
their columns, drop reasons from `animesion.schemas.DropReason`. A test compares the committed pages with `render()`.
"""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from animesion import schemas, sources
from animesion.config.recipe import Recipe, builtin_names, load
from animesion_training import recipe as training

HERE = Path(__file__).parent
ROOT = HERE.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TREE_START, TREE_END = "<!-- tree: docs/make_reference.py -->", "<!-- end of tree -->"
NOTICE = "<!-- Written by docs/make_reference.py: change the code and run it, not this page. -->"

#: Meaning of recipe keys whose model says nothing because code needs no more words.
KEYS = {
    "name": "name of the dataset",
    "summary": "one line for `animesion recipes` and the card",
    "split.train": "share of training images in percent; the three add up to 100",
    "split.val": "share of validation images in percent",
    "split.test": "share of test images in percent",
    "split.seed": "another seed gives another split, and another choice under `classes.cap`",
    "pack.format": "format and extension of every packed image",
    "pack.shard_samples": "most samples of a shard",
    "pack.shard_bytes": "most bytes of a shard",
    "card.title": "heading of the card; the recipe's name when left out",
    "card.summary": "first paragraph of the card",
    "card.homepage": "where the dataset is at home",
    "card.contact": "whom to ask",
    "card.citation": "BibTeX",
    "card.tags": "tags of the card, besides those that every card has",
}

#: Defaults that are filled in by code, or too long for a table.
DEFAULTS = {
    "name": "the recipe file's name",
    "family": "see `animesion sources folder`",
    "curate.decisions": "nothing decided",
}

SECTIONS = {
    "source": "Where the images come from; keys besides `kind` belong to [the source](sources-reference.md).",
    "label": "Which of an image's candidate labels counts.",
    "filter": "Limits on single images; 0 or an empty list switches a limit off.",
    "duplicates": "What is the same image, and what happens to it: see [Duplicates](duplicates.md).",
    "crop": "What part of an image is the sample: see [Quality and crops](quality.md).",
    "quality": "Limits on what is measured of the sample; 0 switches a limit off: see [Quality and crops](quality.md).",
    "curate": "What a person decided about single images: see [Reports](report.md).",
    "classes": "How many images a class needs and may have.",
    "split": "How kept images are divided: see [Splits](splits.md).",
    "pack": "How samples are encoded and sharded: see [Formats](formats.md).",
    "card": "What the dataset card cannot know by itself.",
}

TABLES = {
    "PLAN": "`raw/part-*.plan.parquet`: what a source listed, one row an image.",
    "RAW": "`raw/part-*.parquet`: the same after fetching; `md5` and `bytes` are those of the file that came.",
    "FEATURES": "`features/part-*.parquet`: what one decode tells, one row an image that has bytes.",
    "EMBEDDINGS": "`features/embeddings-part-*.parquet`: embeddings, where `duplicates.embedding.model` asks for them.",
    "CURATED": "`curated.parquet`: every image ever seen, kept or dropped and why.",
    "INDEX": "`index.parquet`: where each sample lies in the shards, one row a sample.",
}

#: Meaning of columns that have no comment in `animesion.schemas`, by table or for all.
COLUMNS = {
    "rating": "the source's rating, such as `g` or `s`; empty where it has none",
    "md5": "MD5 of the original file",
    "bytes": "size of the original file",
    "page_url": "the image's page",
    "file_url": "the file's address",
    "licence": "as the source tells it",
    "author": "as the source tells it",
    "detail": "the reason's particulars, such as a size or an error",
    "sha256": "SHA-256 of the original file",
    "pixels_blake3": "BLAKE3 of the upright RGB image's size and pixels",
    "phash": "64-bit perceptual hash of the crop, or of the whole image",
    "extension": "of the original, sniffed from its bytes",
    "label": "class name",
    "width": "of the upright original in pixels",
    "height": "of the upright original in pixels",
    "crop": "left, top, right, bottom in pixels of the upright original",
    "key": "the sample's key, `[a-z0-9_-]+`",
    "FEATURES.format": "the sniffed extension",
    "FEATURES.thumbnail": "16x16 RGB thumbnail for the fine duplicate check",
    "PLAN.md5": "as the source announces it; empty when it does not",
    "PLAN.bytes": "as the source announces it; 0 when it does not",
    "PLAN.detail": "the failure's particulars",
    "CURATED.kept": "whether it is in the shards",
    "CURATED.reason": "empty when kept, else one of the [drop reasons](drop-reasons.md)",
    "CURATED.label": "class name; all candidates joined by `|` where there is not exactly one",
    "CURATED.split": "train, val or test; empty when dropped",
    "CURATED.part": "the part that holds the original",
    "CURATED.offset": "of the original's bytes inside the part's tar",
    "INDEX.split": "train, val or test",
    "INDEX.shard": "path relative to the dataset, such as `data/train-00000.tar`",
    "INDEX.offset": "of the packed image's bytes inside the shard",
    "INDEX.size": "of the packed image in bytes",
    "INDEX.label": "class id",
}


def render() -> dict[str, str]:
    """The text of every reference page by file name."""
    return {
        "recipes-reference.md": _page(_recipes()),
        "sources-reference.md": _page(_sources()),
        "tables-reference.md": _page(_tables()),
        "drop-reasons.md": _page(_reasons()),
        "training-reference.md": _page(_training()),
    }


def render_tree() -> str:
    """CONTRIBUTING.md with the tree of packages as it is: one line per package, from its docstring."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    before, rest = text.split(TREE_START)
    return before + TREE_START + "\n\n```text\n" + "\n".join(_tree()) + "\n```\n\n" + TREE_END + rest.split(TREE_END)[1]


def _tree() -> Iterator[str]:
    for top in (ROOT / "scrapers", ROOT, ROOT / "sample", ROOT / "training"):
        package = next(path.parent for path in sorted(top.glob("animesion*/__init__.py")))
        for init in sorted(package.rglob("__init__.py")):
            folder = init.parent
            depth = len(folder.relative_to(package).parts)
            summary = (ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            yield f"{'  ' * depth + folder.name + '/':<22} {' '.join(summary.split())}"
        yield ""


def main() -> None:
    """Write the pages that changed."""
    for name, text in [*render().items(), ("../CONTRIBUTING.md", render_tree())]:
        path = HERE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


def _page(lines: Iterable[str]) -> str:
    return "\n".join([NOTICE, "", *lines]).rstrip("\n") + "\n"


def _recipes() -> Iterator[str]:
    yield "# Recipe reference"
    yield ""
    yield "Every section and key of a recipe. Unknown keys are refused with the nearest valid name."
    yield ""
    top = {name: field for name, field in Recipe.model_fields.items() if name not in SECTIONS}
    yield from _keys(top, "")
    for section, intro in SECTIONS.items():
        model = Recipe.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        yield f"## [{section}]"
        yield ""
        yield intro
        yield ""
        yield from _keys(model.model_fields if section == "curate" else _flat(model.model_fields), f"{section}.")
    yield "## Built-in recipes"
    yield ""
    rows = []
    for name in builtin_names():
        recipe = load(name)
        rows.append((f"`{name}`", f"`{recipe.source.kind}`", recipe.summary))
    yield from _table(("recipe", "source", "what it is"), rows)


def _training() -> Iterator[str]:
    yield "# Training reference"
    yield ""
    yield "Every section and key of a training recipe. Unknown keys are refused with the nearest valid name."
    yield ""
    sections = {
        name: field.annotation
        for name, field in training.TrainRecipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    top = {name: field for name, field in training.TrainRecipe.model_fields.items() if name not in sections}
    yield from _keys(top, "")
    for section, model in sections.items():
        yield f"## [{section}]"
        yield ""
        yield (model.__doc__ or "").strip()
        yield ""
        yield from _keys(model.model_fields, f"{section}.")
    yield "## Built-in training recipes"
    yield ""
    rows = [(f"`{name}`", training.load(name).summary) for name in training.builtin_names()]
    yield from _table(("recipe", "what it is"), rows)


def _sources() -> Iterator[str]:
    yield "# Source reference"
    yield ""
    yield "Options of each source: keys of `[source]` besides `kind`, or `--set source.NAME=VALUE`."
    yield ""
    ours = [name for name in sources.names() if sources.source_class(name).__module__.startswith("animesion.")]
    first = [name for name in ("folder", "labels", "ultra-fgvc", "moeimouto", "dump", "danbooru") if name in ours]
    for name in [*first, *(name for name in ours if name not in first)]:
        found = sources.source_class(name)
        yield f"## {name}"
        yield ""
        yield f"{found.summary[0].upper()}{found.summary[1:]}."
        yield ""
        yield from _keys(found.Options.model_fields, "")


def _tables() -> Iterator[str]:
    yield "# Table reference"
    yield ""
    yield "Columns of the Parquet files of a build, from `animesion.schemas`. Unknown text is empty, never null."
    yield ""
    comments = _column_comments()
    described = _described(schemas.Item)
    for table, intro in TABLES.items():
        schema = getattr(schemas, table)
        yield f"## {intro.partition(':')[0].strip('`')}"
        yield ""
        meaning = intro.partition(": ")[2]
        yield f"{meaning[0].upper()}{meaning[1:]}"
        yield ""
        rows = []
        for field in schema:
            name = field.name
            said = COLUMNS.get(f"{table}.{name}") or comments.get((table, name)) or described.get(name)
            said = said or COLUMNS.get(name) or next((c for (_, column), c in comments.items() if column == name), "")
            if not said:
                raise LookupError(f"column {name} of {table} has no meaning: add a comment in animesion/records.py")
            rows.append((f"`{name}`", _code(_arrow(str(field.type))), said))
        yield from _table(("column", "type", "meaning"), rows)


def _reasons() -> Iterator[str]:
    yield "# Drop reasons"
    yield ""
    yield "Every reason an image can be dropped for, in the order in which they are looked at: the first that holds"
    yield "is the one that is written down. `curated.parquet` has it for each image, with a detail."
    yield ""
    yield from _table(("reason", "meaning"), [(f"`{reason}`", said) for reason, said in schemas.MEANINGS.items()])


# -- keys of a model -------------------------------------------------------------------------------------------------


def _keys(fields: dict[str, FieldInfo], prefix: str) -> Iterator[str]:
    rows = []
    for name, field in fields.items():
        meaning = field.description or KEYS.get(f"{prefix}{name}")
        if not meaning:
            raise LookupError(f"{prefix}{name} has no description: give its field one")
        default = DEFAULTS.get(f"{prefix}{name}", "")
        if not default:
            default = "required" if field.is_required() else _code(_toml(field.get_default(call_default_factory=True)))
        rows.append((f"`{name}`", _kind(field), default, meaning))
    yield from _table(("key", "value", "default", "meaning"), rows)


def _flat(fields: dict[str, FieldInfo], prefix: str = "") -> dict[str, FieldInfo]:
    """The keys of a section, those of a section within it by their path."""
    flat: dict[str, FieldInfo] = {}
    for name, field in fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            flat |= _flat(inner.model_fields, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = field
    return flat


def _kind(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " ".join(f"`{value}`" for value in get_args(annotation))
    bounds = []
    for item in field.metadata:
        for name, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below")):
            if getattr(item, name, None) is not None:
                bounds.append(f"{word} {getattr(item, name):,}")
    return " ".join([_word(annotation), *bounds])


def _word(annotation: Any) -> str:
    words: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    if isinstance(annotation, GenericAlias):
        inner = [_word(each) for each in get_args(annotation)]
        return f"list of {inner[0]}s" if get_origin(annotation) is list else "table of text to text"
    return "section"


def _toml(value: Any) -> str:
    return "{}" if isinstance(value, dict) else tomli_w.dumps({"value": value}).partition("=")[2].strip()


# -- tables ----------------------------------------------------------------------------------------------------------


def _column_comments() -> dict[tuple[str, str], str]:
    """Comments beside the columns of the schemas, by table and column."""
    path = Path(inspect.getfile(schemas))
    with path.open("rb") as file:
        said = {
            t.start[0]: t.string.lstrip("# ") for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT
        }
    found: dict[tuple[str, str], str] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            continue
        table = statement.targets[0].id
        for node in ast.walk(statement):
            if isinstance(node, ast.Tuple) and isinstance(node.elts[0], ast.Constant) and node.end_lineno in said:
                for owner in ("PLAN", "RAW") if table == "_LISTED" else (table,):
                    found[owner, str(node.elts[0].value)] = said[node.end_lineno]
    return found


def _described(owner: type) -> dict[str, str]:
    """The attributes of a docstring in Google's style."""
    text = (inspect.getdoc(owner) or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        match = re.fullmatch(r" {4}(\w+): (.+)", line)
        if match:
            name = match[1]
            found[name] = match[2].rstrip(".")
        elif line.strip() and name:
            found[name] += f" {line.strip().rstrip('.')}"
    return found


def _arrow(kind: str) -> str:
    if "struct<" in kind:
        return "list of (left, top, right, bottom, score)"
    kind = re.sub(r"fixed_size_list<\w+: (\w+)>\[(\d+)\]", r"list of \2 \1", kind)
    kind = re.sub(r"list<\w+: (\w+)>", r"list of \1", kind)
    return re.sub(r"fixed_size_binary\[(\d+)\]", r"\1 bytes", kind)


# -- Markdown --------------------------------------------------------------------------------------------------------


def _code(text: str) -> str:
    return f"`{text}`"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


def _cell(text: str) -> str:
    """Text with code spans as it may stand in a cell: no HTML, no bar that would end the cell."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        f"<code>{part[1:-1].replace('|', '&#124;')}</code>" if part.startswith("`") and "|" in part
        else part if part.startswith("`")
        else part.replace("<", "&lt;").replace("|", "&#124;")
        for part in parts
    )  # fmt: skip


if __name__ == "__main__":
    main()
