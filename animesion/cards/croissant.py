"""Croissant 1.1 metadata of a built dataset, as JSON-LD (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html).

Each shard is a file object, the images in the shards are a file set, and records join an image to its label and split
in `index.parquet` by key. Paths are relative to the file, so that copies of the dataset stay valid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from animesion.cards import statements
from animesion.config.card import CardSection, given
from animesion.config.recipe import Recipe

VERSION = "http://mlcommons.org/croissant/1.1"
RAI_VERSION = "http://mlcommons.org/croissant/RAI/1.0"

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
    "duo": "http://purl.obolibrary.org/obo/DUO_",
    "odrl": "http://www.w3.org/ns/odrl/2/",
    "prov": "http://www.w3.org/ns/prov#",
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

#: Statements of the vocabulary for responsible AI that are one text; the others are lists.
_ONE = frozenset(
    {
        "dataAnnotationProtocol",
        "dataCollection",
        "dataCollectionMissingData",
        "dataReleaseMaintenancePlan",
        "dataSocialImpact",
    }
)


class _Use(NamedTuple):
    """A term of use: its place in an offer, its identifier and its name."""

    role: str
    term: str
    name: str


#: `card.use` in the terms of DUO (https://github.com/EBISPOT/DUO) and ODRL (https://www.w3.org/TR/odrl-vocab/).
_USES = {
    "no-restriction": _Use("action", "duo:0000004", "No restriction"),
    "research": _Use("action", "duo:0000042", "General research use"),
    "non-commercial": _Use("constraint", "duo:0000046", "Non-commercial use only"),
    "not-for-profit": _Use("constraint", "duo:0000018", "Not for profit, non-commercial use only"),
    "publication-required": _Use("constraint", "duo:0000019", "Publication required"),
    "ethics-approval": _Use("constraint", "duo:0000021", "Ethics approval required"),
    "attribution": _Use("duty", "odrl:attribute", "Attribution"),
    "no-redistribution": _Use("prohibition", "odrl:distribute", "Distribution"),
}

_UPPER = """
afl-3.0 agpl-3.0 bsl-1.0 cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl
ncsa ofl-1.1 osl-3.0 wtfpl
"""
#: SPDX identifiers (https://spdx.org/licenses/) of the Hub's licences that are in that list.
_SPDX = {name: name.upper() for name in _UPPER.split()} | {
    "apache-2.0": "Apache-2.0",
    "artistic-2.0": "Artistic-2.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-3-clause-clear": "BSD-3-Clause-Clear",
    "c-uda": "C-UDA-1.0",
    "cdla-permissive-1.0": "CDLA-Permissive-1.0",
    "cdla-permissive-2.0": "CDLA-Permissive-2.0",
    "cdla-sharing-1.0": "CDLA-Sharing-1.0",
    "etalab-2.0": "etalab-2.0",
    "lgpl-lr": "LGPLLR",
    "lppl-1.3c": "LPPL-1.3c",
    "odbl": "ODbL-1.0",
    "odc-by": "ODC-By-1.0",
    "pddl": "PDDL-1.0",
    "postgresql": "PostgreSQL",
    "unlicense": "Unlicense",
    "zlib": "Zlib",
}

_MEDIA = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def croissant(facts: Mapping[str, Any], recipe: Recipe, digests: Mapping[str, str]) -> str:
    """Render `croissant.json`.

    Args:
        facts: content of `dataset.json`.
        recipe: the resolved recipe.
        digests: SHA-256 of `index.parquet`, `classes.csv` and, if samples carry tags, `tags.csv`.
    """
    card = recipe.card
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": facts["name"],
        "description": card.summary or facts["summary"] or "No summary was given in the recipe.",
        "conformsTo": [VERSION, RAI_VERSION],
        "license": _licence(card),
        "keywords": list(dict.fromkeys(["webdataset", "fine-grained", "long-tail", *card.tags])),
        "isLiveDataset": False,
    }
    optional = {
        "alternateName": card.title,
        "url": given(card.homepage),
        "version": given(card.version),
        "datePublished": given(card.published),
        "dateCreated": given(card.created),
        "creator": _creators(card),
        "publisher": _organisation(card),
        "citeAs": given(card.citation),
        "inLanguage": list(card.languages),
        "usageInfo": _usage(card),
        "rai:dataCollectionTimeframe": [given(day) for day in card.collected if given(day)],
    }
    document |= {name: value for name, value in optional.items() if value}
    for name, sentences in statements.responsible_use(facts, recipe).items():
        document[f"rai:{name}"] = " ".join(sentences) if name in _ONE else sentences
    if (share := statements.synthetic_share(recipe)) is not None:
        document["rai:hasSyntheticData"] = share > 0
    document |= _provenance(facts, recipe)
    document["distribution"] = _distribution(facts, digests)
    document["recordSet"] = [_classes(), *([_tags()] if "tags.csv" in digests else []), _samples()]
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _licence(card: CardSection) -> str | dict[str, Any]:
    """The URL of a licence that SPDX lists, or the name of another with its URL."""
    if spdx := _SPDX.get(card.licence.lower()):
        return f"https://spdx.org/licenses/{spdx}.html"
    if url := given(card.licence_url):
        return {"@type": "CreativeWork", "name": card.licence, "url": url}
    return card.licence


def _creators(card: CardSection) -> list[dict[str, Any]]:
    people = [{"@type": "Person", "name": name} for name in card.creators if given(name)]
    return people or _organisation(card)


def _organisation(card: CardSection) -> list[dict[str, Any]]:
    name = given(card.publisher)
    return [{"@type": "Organization", "name": name}] if name else []


def _usage(card: CardSection) -> str | dict[str, Any]:
    """The terms of use: an offer of ODRL with terms of DUO, as in the specification, or the text alone."""
    if not card.use:
        return card.terms
    uses = [_USES[use] for use in card.use]
    actions = [use for use in uses if use.role == "action"] or [_Use("action", "odrl:use", "Use")]
    permission: dict[str, Any] = {
        "@type": "odrl:Permission",
        "odrl:action": [{"@id": use.term, "name": use.name} for use in actions],
    }
    constraints = [
        {
            "@type": "odrl:Constraint",
            "name": use.name,
            "odrl:operator": {"@id": "odrl:eq"},
            "odrl:rightOperand": {"@id": use.term},
        }
        for use in uses
        if use.role == "constraint"
    ]
    duties = [{"@type": "odrl:Duty", "name": use.name, "odrl:action": {"@id": use.term}}
              for use in uses if use.role == "duty"]  # fmt: skip
    prohibitions = [{"@type": "odrl:Prohibition", "name": use.name, "odrl:action": {"@id": use.term}}
                    for use in uses if use.role == "prohibition"]  # fmt: skip
    permission |= {"odrl:constraint": constraints} if constraints else {}
    permission |= {"odrl:duty": duties} if duties else {}
    offer: dict[str, Any] = {"@type": ["CreativeWork", "odrl:Offer"], "name": "Terms of use"}
    offer |= {"description": card.terms} if card.terms else {}
    offer |= {"odrl:permission": permission}
    return offer | ({"odrl:prohibition": prohibitions} if prohibitions else {})


def _provenance(facts: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What the dataset was made from, and the stages of the build as activities of PROV."""
    from animesion_scrapers import sites

    sources = []
    for each in facts["provenance"]:
        kind = each["source"]
        entity = {"@type": "prov:Entity", "@id": f"sources/{quote(kind)}", "prov:label": kind,
                  "description": f"{each['images']:,} of the kept images."}  # fmt: skip
        if kind in sites.names() and not recipe.source.kind.startswith("sample"):
            entity["url"] = sites.load(kind).info.url
        sources.append(entity)
    if published := statements.derived_from(recipe):
        sources = [{"@type": "prov:Entity", "@id": f"sources/{published.name}", "prov:label": published.title,
                    "description": published.what, "url": published.homepage}]  # fmt: skip
    known = {"original", "extended"}
    sources += [
        {"@type": "prov:Entity", "@id": f"https://huggingface.co/datasets/{name}", "prov:label": name}
        for name in (each.removeprefix("extended|") for each in recipe.card.source_datasets)
        if name not in known
    ]
    activities: list[dict[str, Any]] = []
    for stage in statements.stages(facts, recipe):
        software = [f"Animesion {facts['made_with']['animesion']}", *stage.tools]
        activity: dict[str, Any] = {
            "@type": "prov:Activity",
            "@id": f"stages/{stage.name}",
            "prov:label": stage.name,
            "description": stage.did,
            "prov:wasAssociatedWith": [{"@type": "prov:SoftwareAgent", "prov:label": name} for name in software],
        }
        if activities:
            activity["prov:wasInformedBy"] = {"@id": activities[-1]["@id"]}
        else:
            activity["prov:used"] = [{"@id": entity["@id"]} for entity in sources]
        activities.append(activity)
    return {"prov:wasDerivedFrom": sources, "prov:wasGeneratedBy": activities}


def _distribution(facts: Mapping[str, Any], digests: Mapping[str, str]) -> list[dict[str, Any]]:
    shards = [shard for split in facts["splits"].values() for shard in split["shards"]]
    kinds = {"index.parquet": "application/x-parquet", "classes.csv": "text/csv", "tags.csv": "text/csv"}
    files = [_file(name, kind, digests[name]) for name, kind in kinds.items() if name in digests]
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
    return _names("classes", "classes.csv", "The class map.", "class", "class_id", {})


def _tags() -> dict[str, Any]:
    more = {"category": "general, character, copyright, artist or meta."}
    return _names("tags", "tags.csv", "The vocabulary of the tags.", "tag", "tag_id", more)


def _names(name: str, file: str, description: str, what: str, key: str, more: Mapping[str, str]) -> dict[str, Any]:
    """The record set of a table of names.

    Args:
        name: of the record set.
        file: the table.
        description: of the record set.
        what: what a row is.
        key: column of its id.
        more: description by further column of text.
    """

    def field(field_name: str, column: str, kind: str, about: str) -> dict[str, Any]:
        source = {"fileObject": {"@id": file}, "extract": {"column": column}}
        return {"@type": "cr:Field", "@id": f"{name}/{field_name}", "name": field_name, "description": about,
                "dataType": kind, "source": source}  # fmt: skip

    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": f"{name}/id"},
        "field": [
            field("id", key, "sc:Integer", f"{what.capitalize()} id, from 0."),
            field("name", "name", "sc:Text", f"{what.capitalize()} name."),
            *(field(column, column, "sc:Text", about) for column, about in more.items()),
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
