"""The ViLT of Animesion v2: the vision transformer of `animesion_vit` that reads tags, with or without a tag head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.create import ModelSpec
from animesion_training.models.heads import IFAHead
from animesion_training.models.methods import Methods
from animesion_training.originals.animesion_vit import (
    VIT_EPS,
    bare_vit,
    describe_vit,
    fit_size,
    short_name,
    split_vit,
    vit_settings,
)
from animesion_training.originals.base import Config, Converter, StateDict, load_all, register_converter
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.tag_text import TagText

_WORDS = "text_embeddings.word_embeddings.weight"
_TYPES = "text_embeddings.token_type_embeddings.weight"
_DECODER = "text_decoder.weight"
#: Name in the original -> name in `TagText`.
_TEXT_NAMES = {
    _WORDS: "words.weight",
    "text_embeddings.position_embeddings.weight": "positions",
    _TYPES: "token_type",
    "text_embeddings.LayerNorm.weight": "norm.weight",
    "text_embeddings.LayerNorm.bias": "norm.bias",
}
_TAGGER_NAMES = {
    "mlm_head.0.weight": "tagger.dense.weight",
    "mlm_head.0.bias": "tagger.dense.bias",
    "mlm_head.2.weight": "tagger.norm.weight",
    "mlm_head.2.bias": "tagger.norm.bias",
    "decoder_bias": "tagger.bias",
}
#: Buffers of BERT's embeddings that follow from their sizes, in checkpoints of some versions.
_COUNTERS = ("text_embeddings.position_ids", "text_embeddings.token_type_ids")


def _is_vilt(config: Config, weights: StateDict) -> bool:
    return _WORDS in weights


def _build_vilt(config: Config, weights: StateDict, reference_compat: bool) -> nn.Module:
    settings = vit_settings(config)
    renamed, others = split_vit({key: value for key, value in weights.items() if key not in _COUNTERS})
    text, options = _text_weights(others)
    eps = float(settings.get("layer_norm_eps") or VIT_EPS)
    options |= {"dropout": float(settings.get("hidden_dropout_prob") or 0.0), "eps": eps}
    ifa = "head.layers.weight" in renamed
    last = renamed.get("head.fc.weight" if ifa else "head.weight")
    if last is None:
        raise UsageError("this checkpoint has no classifier: it contains neither `class_head` nor `inter_class_head`")
    num_classes = last.shape[0]
    activation = settings.get("hidden_act") or "gelu"
    if activation != "gelu":
        raise UsageError(f"this checkpoint has the activation {activation!r}: this family has gelu alone")
    host: Any = bare_vit(renamed, settings)
    depth, width = len(host.blocks), host.embed_dim
    for module in host.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps

    def ifa_head(classes: int) -> nn.Module:
        return IFAHead(depth, width, classes, eps=eps)

    model = TokenVisionTransformer(
        host,
        {"text": TagText(width, **options)},
        num_classes,
        ifa_head if ifa else None,
        range(depth) if ifa else (),
    )
    ours = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in renamed.items()}
    load_all(model, ours | {f"plugins.text.{key}": value for key, value in text.items()}, "ViLT of Animesion")
    side = fit_size(host, settings)
    methods = Methods(text="vilt", options={"text": options})
    head = "ifa" if ifa else "linear"
    head_options = {"eps": eps} if ifa else {}
    describe_vit(model, ModelSpec(short_name(host), num_classes, side, head, head_options, eps, methods=methods))
    return model


def _text_weights(given: StateDict) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of `TagText` under its names, and its sizes.

    Args:
        given: the weights that are not those of the transformer or its classifier.

    Raises:
        UsageError: some are missing or unknown, or the decoder is not the word embedding.
    """
    tagging = any(key in given for key in (*_TAGGER_NAMES, _DECODER))
    names = {**_TEXT_NAMES, **(_TAGGER_NAMES if tagging else {})}
    if missing := sorted(names.keys() - given.keys()):
        raise UsageError(f"this checkpoint of a ViLT lacks {', '.join(missing[:3])}")
    if unknown := sorted(given.keys() - names.keys() - {_DECODER}):
        raise UsageError(
            f"this checkpoint has {len(unknown)} parameters beyond the ViLT of Animesion: {', '.join(unknown[:3])}"
        )
    words = given[_WORDS]
    # some files hold shared weights once
    if not torch.equal(given.get(_DECODER, words), words):
        raise UsageError(f"{_DECODER} differs from {_WORDS}: this family predicts tags with its word embedding")
    text = {ours: given[name] for name, ours in names.items()}
    text["positions"] = text["positions"][None]  # (1, T, D)
    text["token_type"] = text["token_type"][0]  # the second of BERT's types is never used
    sizes = {"vocab_size": len(words), "length": text["positions"].shape[1], "tagging": tagging}
    return text, sizes


register_converter(Converter("ViLT of Animesion", _is_vilt, _build_vilt))
