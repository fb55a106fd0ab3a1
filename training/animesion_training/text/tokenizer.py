"""Token ids of the tags of images, for networks that read tags (`animesion_training.tokens.tag_text`).

A text is `[CLS]`, the tags, `[SEP]`, and padding up to a fixed length. A tag is one token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray
from animesion_training.options import one_of, whole_number

#: Ids of the special tokens, in front of those of the tags: padding, masked tag, begin, end, tag not in the vocabulary.
PAD, MASK, CLS, SEP, UNK = range(5)
#: Their names in Animesion; the second is the mask.
SPECIAL_TOKENS = ("[PAD]", "[UNUSED]", "[CLS]", "[SEP]", "[UNK]")

Order = Literal["shuffled", "vocabulary"]


class TagTokenizer:
    """Converts tags to token ids and back.

    Args:
        names: the vocabulary: unique names of tags, whose ids follow those of the special tokens.
        length: T, token ids of a text, begin and end included; further tags are left out.
        order: of the tags of a text with seeds: `shuffled`, where an image with too many tags shows others in each
            epoch, or by their ids as in `vocabulary`. A text without seeds is in the order of the vocabulary.

    Attributes:
        vocab_size: V, number of token ids.

    Raises:
        UsageError: no names, a name twice or the name of a special token, or an argument out of range.
    """

    def __init__(self, names: Sequence[str], length: int = 16, *, order: Order = "shuffled") -> None:
        one_of("order", order, get_args(Order))
        self.names = tuple(names)
        self.length = whole_number("length", length, low=3)
        self.order = order
        self.vocab_size = len(SPECIAL_TOKENS) + len(self.names)
        self._ids = {name: i for i, name in enumerate(self.names, len(SPECIAL_TOKENS))}
        if not self.names:
            raise UsageError("a vocabulary of tags needs one name or more, and this one is empty")
        if len(self._ids) < len(self.names) or not self._ids.keys().isdisjoint(SPECIAL_TOKENS):
            twice = next((name for i, name in enumerate(self.names) if self._ids[name] != len(SPECIAL_TOKENS) + i), "")
            found = twice or next(name for name in SPECIAL_TOKENS if name in self._ids)
            raise UsageError(f"the vocabulary of tags has {found!r} twice, or as a special token: leave it out")

    def ids(self, names: Iterable[str]) -> IntArray:
        """Return the token id of each name, shape (n,); `UNK` for a name that the vocabulary does not have."""
        return np.array([self._ids.get(name, UNK) for name in names], dtype=np.int64)

    def encode(self, names: Iterable[str]) -> Tensor:
        """Convert the tags of one image, in any order, to token ids (T,), int64, in the order of the vocabulary."""
        found = self.ids(names)
        return self.encode_batch(found, np.array([len(found)]))[0]

    def encode_batch(
        self, ids: npt.NDArray[np.integer], ends: IntArray, sample_seeds: IntArray | None = None
    ) -> Tensor:
        """Convert the tags of several images to texts.

        A token is in a text once: tags that the vocabulary does not have are one `UNK`, behind the others where the
        order is that of the vocabulary.

        Args:
            ids: token ids of the tags of all images, one image after the other.
            ends: shape (B,), where those of each image end.
            sample_seeds: seed of each image, (B,) int64, for the order; None for the order of the vocabulary.

        Returns:
            Token ids, (B, T), int64.
        """
        count = len(ends)
        row = np.repeat(np.arange(count), np.diff(ends, prepend=0))
        row, ids = _distinct(row, ids.astype(np.int64))
        if sample_seeds is not None and self.order == "shuffled":
            # a hash of image and tag, so that the order does not depend on that of the list
            rank = seeds.uniforms(_of_tags(sample_seeds[row], ids), 1, seeds.TAG_ORDER)[:, 0]
        else:
            rank = np.where(ids == UNK, self.vocab_size, ids).astype(np.float64)
        order = np.lexsort((ids, rank, row))
        row, ids = row[order], ids[order]
        counts = np.bincount(row, minlength=count)
        place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        room = self.length - 2
        kept = place < room
        text = np.full((count, self.length), PAD, dtype=np.int64)
        text[:, 0] = CLS
        text[row[kept], 1 + place[kept]] = ids[kept]
        text[np.arange(count), 1 + np.minimum(counts, room)] = SEP
        return torch.from_numpy(text)

    def decode(self, text: Tensor) -> list[list[str]]:
        """Return the tags of texts (B, T), each once, without special tokens.

        Raises:
            UsageError: ids that the vocabulary does not have.
        """
        if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < self.vocab_size:
            raise UsageError(f"these token ids are not of this vocabulary of {self.vocab_size}: use its own tokenizer")
        first = len(SPECIAL_TOKENS)
        return [list(dict.fromkeys(self.names[i - first] for i in row if i >= first)) for row in text.tolist()]

    def read(self, tag_logits: Tensor, text: Tensor, top: int = 10) -> list[list[tuple[str, float]]]:
        """Return the most probable tags at the masked places of texts.

        The score of a tag is the number of masked places that are expected to have it, at most 1. In a shuffled text,
        all places expect the same tags, so the most probable one of each would be the same tag again and again.

        Args:
            tag_logits: (B, T, V).
            text: what the network has read, (B, T).
            top: number of tags of each image.
        """
        first = len(SPECIAL_TOKENS)
        shares = tag_logits[..., first:].float().softmax(-1) * (text == MASK)[..., None]
        scores = shares.sum(1).clamp(max=1)
        best = scores.topk(min(top, len(self.names)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.names[i], value) for i, value in zip(*row, strict=True)] for row in rows]


def _distinct(row: IntArray, ids: IntArray) -> tuple[IntArray, IntArray]:
    """Pairs of row and id, each once."""
    if not len(ids):
        return row, ids
    width = int(ids.max()) + 1
    keys = np.unique(row * width + ids)
    return keys // width, keys % width


def _of_tags(sample_seeds: IntArray, ids: IntArray) -> seeds.Hashes:
    """One hash for each pair of a seed and a token id."""
    return seeds.hashes(0, seeds.TAG_ORDER, sample_seeds, ids)


@dataclass(frozen=True, eq=False)
class Texts:
    """The tags of the samples of a split as token ids.

    Attributes:
        tokenizer: makes texts of them.
        ids: token ids of all samples, one sample after the other.
        ends: shape (N,), where the ids of each sample end.
    """

    tokenizer: TagTokenizer
    ids: npt.NDArray[np.int32]
    ends: IntArray

    @classmethod
    def of(cls, tokenizer: TagTokenizer, names: Sequence[str], tags: npt.NDArray[np.integer], ends: IntArray) -> Texts:
        """Convert positions in a list of names, such as the vocabulary of a dataset.

        Args:
            tokenizer: its vocabulary may be another one.
            names: the list; names that are empty stand for tags that texts are made without.
            tags: positions of all samples, one sample after the other.
            ends: shape (N,), where those of each sample end.
        """
        left_out = np.array([not name for name in names], dtype=np.bool_)
        kept = ~left_out[tags]
        table = tokenizer.ids(names).astype(np.int32)
        # the number of kept tags up to each end
        return cls(tokenizer, table[tags[kept]], np.concatenate(([0], np.cumsum(kept)))[ends])

    def text(self, rows: IntArray, sample_seeds: IntArray | None = None) -> Tensor:
        """Return the texts of some samples, (B, T), int64; see `TagTokenizer.encode_batch`."""
        counts = np.diff(self.ends, prepend=0)[rows]
        ends = np.cumsum(counts)
        at = np.repeat(self.ends[rows] - ends, counts) + np.arange(ends[-1] if len(ends) else 0)
        return self.tokenizer.encode_batch(self.ids[at], ends, sample_seeds)


def readable(
    names: Sequence[str], categories: Sequence[str], chosen: Collection[str], classes: Collection[str]
) -> tuple[str, ...]:
    """Return a list of names in which those are empty that a network must not read.

    Args:
        names: of the vocabulary of a dataset.
        categories: category of each.
        chosen: categories that are read.
        classes: names of the classes: a tag that names a class would tell the network the answer.
    """
    known = set(classes)
    pairs = zip(names, categories, strict=True)
    return tuple(name if category in chosen and name not in known else "" for name, category in pairs)
