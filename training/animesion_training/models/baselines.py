"""The baselines by their short names, and how a name becomes timm's.

The short names leave the image size out, because any size can be asked of any of them.
"""

from __future__ import annotations

import difflib
import re

import timm

from animesion.errors import UsageError

#: Short name -> timm's architecture. The papers' baselines: DAF:re trained ResNet-18/152 and ViT B/16 to L/32.
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
    """The timm name for a short name (`vit_base_patch16`, also with a tag) or for one of timm's own.

    Raises:
        UsageError: no such model; the nearest names are given.
    """
    if re.search(r"[:/\\]", name):
        raise UsageError(
            f"model {name!r}: give the architecture's name here and where its weights are separately (pretrained=PATH)"
        )
    architecture, dot, tag = name.partition(".")
    architecture = BASELINES.get(architecture, architecture)
    if not timm.is_model(architecture):
        known = sorted({*BASELINES, *timm.list_models()})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`animesion models` lists them"
        raise UsageError(f"no model is called {name!r}: {hint}")
    if dot and f"{architecture}.{tag}" not in timm.list_pretrained(f"{architecture}.*"):
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
        raise UsageError(f"model {architecture} has no weights tagged {tag!r}; it has: {', '.join(tags) or 'none'}")
    return f"{architecture}{dot}{tag}"
