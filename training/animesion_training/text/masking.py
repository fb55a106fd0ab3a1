"""Mask the tags of texts: how many by the progress of a run, which ones by the seed of each sample, and the loss.

The schedules are those of Animesion v2 (its README, 2022), masked-language modelling is that of BERT (arXiv
1810.04805, section 3.1).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from animesion_training.data import seeds
from animesion_training.options import one_of
from animesion_training.text.tokenizer import CLS, MASK, PAD, SEP, SPECIAL_TOKENS

Schedule = Literal["none", "bert", "sigmoid", "full"]
#: Target of a place that is not predicted.
IGNORED = -100

_BERT = 0.15


def mask_share(schedule: Schedule, progress: float, *, warmup: float = 0.1, cooldown: float = 0.5) -> float:
    """The probability that a tag is masked.

    `sigmoid` is 0 during the warm-up, 1 during the cool-down, and `(1 - cos(pi t)) / 2` in between, where t goes from 0
    to 1.

    Args:
        schedule: `none` for 0, `bert` for 0.15, `sigmoid`, or `full` for 1.
        progress: share of the steps of the run that are done, 0..1.
        warmup: share of the steps of `sigmoid` without masks, at the start.
        cooldown: share of its steps with all tags masked, at the end.
    """
    one_of("schedule", schedule, get_args(Schedule))
    if schedule != "sigmoid":
        return {"none": 0.0, "bert": _BERT, "full": 1.0}[schedule]
    if progress < warmup:
        return 0.0
    if progress >= 1 - cooldown:
        return 1.0
    return (1 - math.cos(math.pi * (progress - warmup) / (1 - cooldown - warmup))) / 2


class Masked(NamedTuple):
    """Masked texts.

    Attributes:
        text: token ids for the network, (B, T), int64.
        targets: the tag at each masked place, `IGNORED` elsewhere, (B, T), int64.
    """

    text: Tensor
    targets: Tensor


def mask_tags(
    text: Tensor,
    sample_seeds: Tensor,
    share: float,
    *,
    vocab_size: int,
    unknown: float = 0.0,
    replace: Literal["constant", "random"] = "constant",
) -> Masked:
    """Mask each tag with the same probability; the special tokens are never masked, `UNK` neither.

    A text of which every tag is masked is that of an image without known tags: masks from begin to end, whatever their
    number. It would otherwise tell how many tags there are, which nothing tells at inference.

    Args:
        text: (B, T), int64.
        sample_seeds: (B,), int64, on the same device.
        share: probability that a tag is masked, 0..1.
        vocab_size: V, number of token ids.
        unknown: probability that all tags of an image are masked, so that a network learns to do without.
        replace: what a masked place has: the mask, or the id of a random tag.
    """
    one_of("replace", replace, ("constant", "random"))
    first = len(SPECIAL_TOKENS)
    u = seeds.tensor_uniforms(sample_seeds, 2 * text.shape[1] + 1, seeds.TAG_MASK)
    draws, others, whole = u[:, : text.shape[1]], u[:, text.shape[1] : -1], u[:, -1:]
    everything = (whole < unknown) | (share >= 1)  # (B, 1)
    masked = (text >= first) & (everything | (draws < share))
    targets = torch.where(masked, text, IGNORED)
    drawn = first + (others * (vocab_size - first)).long() if replace == "random" else MASK
    text = torch.where(masked, drawn, text)
    return Masked(torch.where(everything, unknown_tags(text.shape[1], text.device), text), targets)


def unknown_tags(length: int, device: torch.device | None = None) -> Tensor:
    """The text of an image whose tags are all unknown, (1, length), int64."""
    text = torch.full((1, length), MASK, device=device)
    text[0, 0], text[0, -1] = CLS, SEP
    return text


def no_tags(length: int) -> Tensor:
    """The text of an image that has no tags, (1, length), int64."""
    text = torch.full((1, length), PAD)
    text[0, 0], text[0, 1] = CLS, SEP
    return text


def tag_loss(tag_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the masked tags: the mean over those of an image, then over the images.

    Args:
        tag_logits: (B, T, V).
        targets: (B, T), int64, from `mask_tags`.

    Returns:
        A scalar; an image without masked tags adds 0.
    """
    losses = functional.cross_entropy(tag_logits.float().transpose(1, 2), targets, reduction="none")  # 0 where ignored
    counts = (targets != IGNORED).sum(1)
    return (losses.sum(1) / counts.clamp(min=1)).sum() / max(1, len(targets))
