"""The baselines by their short names, and the conversion of a name to timm's.

Short names leave out the image size, because each baseline can be built for any size.
"""

from __future__ import annotations

import re

import timm

from animesion.config.settings import similar
from animesion.errors import UsageError

#: Short name -> timm's architecture. Baselines of the papers: DAF:re trained ResNet-18/152 and ViT B/16 to L/32.
BASELINES = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_base_patch16": "vit_base_patch16_224",
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_base_patch32": "vit_base_patch32_224",
    "vit_large_patch32": "vit_large_patch32_224",
}


def timm_name(name: str) -> str:
    """Return the timm name of a short name (`vit_base_patch16`, also with a tag) or of a timm name.

    Raises:
        UsageError: unknown model or tag; the message has similar names or the known tags.
    """
    if re.search(r"[:/\\]", name):
        raise UsageError(
            f"model {name!r}: give the name of an architecture here, and the place of its weights as pretrained=PATH"
        )
    architecture, dot, tag = name.partition(".")
    architecture = BASELINES.get(architecture, architecture)
    if not timm.is_model(architecture):
        near = similar(name, [*BASELINES, *timm.list_models()], 3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`animesion models` lists them"
        raise UsageError(f"there is no model {name!r}; {hint}")
    if dot and f"{architecture}.{tag}" not in timm.list_pretrained(f"{architecture}.*"):
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
        raise UsageError(f"model {architecture} has no weights tagged {tag!r}; it has: {', '.join(tags) or 'none'}")
    return f"{architecture}{dot}{tag}"
