"""Croissant 1.1 metadata of a built dataset, as JSON-LD (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html).

Each shard is a file object, the images in the shards are a file set, and records join an image to its label and split
in `index.parquet` by key. Paths are relative to the file, so that copies of the dataset stay valid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from animesion.config.recipe import Recipe

VERSION = "http://mlcommons.org/croissant/1.1"

#: The context of the specification; readers warn about any other.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
} | {
    name: f"cr:{name}"
    for name in (
        "citeAs",
        "column",
        "containedIn",
        "equivalentProperty",
        "extract",
        "field",
        "fileProperty",
        "fileObject",
        "fileSet",
        "format",
        "includes",
        "isLiveDataset",
        "jsonPath",
        "key",
        "md5",
        "parentField",
        "path",
        "recordSet",
        "references",
        "regex",
        "repeated",
        "replace",
        "samplingRate",
        "separator",
        "source",
        "subField",
        "transform",
    )
}

_MEDIA = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def croissant(facts: Mapping[str, Any], recipe: Recipe, digests: Mapping[str, str]) -> str:
    """Render `croissant.json`.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
        digests: SHA-256 of `index.parquet` and `classes.csv`.
    """
    card = recipe.card
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": facts["name"],
        "description": card.summary or facts["summary"] or "No summary was given in the recipe.",
        "conformsTo": VERSION,
        "license": card.licence,
        "keywords": ["webdataset", "fine-grained", "long-tail", *card.tags],
        "isLiveDataset": False,
    }
    optional = {
        "alternateName": card.title,
        "url": card.homepage,
        "citeAs": card.citation.strip(),
        "usageInfo": card.terms,
        "rai:dataUseCases": card.purpose,
        "rai:dataLimitations": card.limits,
        "rai:dataBiases": card.biases,
        "rai:personalSensitiveInformation": card.privacy,
    }
    document |= {name: value for name, value in optional.items() if value}
    document["distribution"] = _distribution(facts, digests)
    document["recordSet"] = [_classes(), _samples()]
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _distribution(facts: Mapping[str, Any], digests: Mapping[str, str]) -> list[dict[str, Any]]:
    shards = [shard for split in facts["splits"].values() for shard in split["shards"]]
    kinds = {"index.parquet": "application/x-parquet", "classes.csv": "text/csv"}
    files = [_file(name, kind, digests[name]) for name, kind in kinds.items()]
    files += [_file(shard["path"], "application/x-tar", shard["sha256"], shard["bytes"]) for shard in shards]
    images = {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "containedIn": [{"@id": shard["path"]} for shard in shards],
        "encodingFormat": _MEDIA[facts["image_field"]],
        "includes": f"*.{facts['image_field']}",
    }
    return [*files, images]


def _file(name: str, kind: str, sha256: str, size: int | None = None) -> dict[str, Any]:
    optional = {} if size is None else {"contentSize": f"{size} B"}
    return {
        "@type": "cr:FileObject", "@id": name, "name": name, **optional, "contentUrl": name, "encodingFormat": kind,
        "sha256": sha256,
    }  # fmt: skip


def _classes() -> dict[str, Any]:
    def field(name: str, column: str, kind: str, description: str) -> dict[str, Any]:
        source = {"fileObject": {"@id": "classes.csv"}, "extract": {"column": column}}
        return {"@type": "cr:Field", "@id": f"classes/{name}", "name": name, "description": description,
                "dataType": kind, "source": source}  # fmt: skip

    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "The class map.",
        "key": {"@id": "classes/id"},
        "field": [
            field("id", "class_id", "sc:Integer", "Class id, from 0."),
            field("name", "name", "sc:Text", "Class name."),
        ],
    }


def _samples() -> dict[str, Any]:
    def field(name: str, kind: str | list[str], description: str, source: dict[str, Any]) -> dict[str, Any]:
        return {"@type": "cr:Field", "@id": f"samples/{name}", "name": name, "description": description,
                "dataType": kind, "source": source}  # fmt: skip

    def column(name: str) -> dict[str, Any]:
        return {"fileObject": {"@id": "index.parquet"}, "extract": {"column": name}}

    # in a shard, the key of a sample is the file name without its extension
    key = {
        "fileSet": {"@id": "images"},
        "extract": {"fileProperty": "filename"},
        "transform": {"regex": r"^([a-z0-9_-]+)(?:\.[a-z]+)?$"},
    }
    content = {"fileSet": {"@id": "images"}, "extract": {"fileProperty": "content"}}
    named = field("key", "sc:Text", "Key of the sample, unique in the dataset.", key)
    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "description": "One record per sample.",
        "key": {"@id": "samples/key"},
        "field": [
            {**named, "references": column("key")},
            field("image", "sc:ImageObject", "The image.", content),
            field("label", "sc:Integer", "Class id; `classes` has the names.", column("label")),
            field("split", ["sc:Text", "cr:Split"], "train, val or test.", column("split")),
        ],
    }
