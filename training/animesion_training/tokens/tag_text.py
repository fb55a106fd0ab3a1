"""Tags of an image as tokens beside its patches: text embeddings, and the head that predicts masked tags (ViLT).

One transformer reads class token, patches and tags. `animesion_training.text` makes token ids from the names of tags,
and masks them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.options import in_range, whole_number
from animesion_training.text.masking import no_tags, unknown_tags
from animesion_training.text.tokenizer import SPECIAL_TOKENS
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens


class TagText(Plugin):
    """Token ids as further tokens of a vision transformer, as in Animesion's ViLT (its README, 2022).

    A token is the layer norm of the sum of its word, position and type embedding, as in BERT (arXiv 1810.04805, section
    3). It is appended to the patches, without a position among them. There is one type, and no token is masked in the
    attention, padding neither.

    Args:
        width: D, width of the transformer.
        vocab_size: V, number of token ids, special tokens included; 13,504 for DAF:re.
        length: T, largest number of token ids of an image, the begin and the end included.
        tagging: whether there is a head that predicts tags.
        dropout: probability of dropout after the layer norm, in training.
        eps: epsilon of the layer norms.

    Raises:
        UsageError: an argument out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        vocab_size: int = 13504,
        length: int = 16,
        tagging: bool = True,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.vocab_size = whole_number("vocab_size", vocab_size, low=len(SPECIAL_TOKENS) + 1)
        self.length = whole_number("length", length, low=3)
        self.words = nn.Embedding(self.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(1, self.length, width))
        self.token_type = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.drop = nn.Dropout(in_range("dropout", dropout, low=0, high=1, high_open=True))
        for weight in (self.words.weight, self.positions, self.token_type):
            nn.init.trunc_normal_(weight, std=0.02)
        self.tagger = TagHead(width, self.vocab_size, eps) if tagging else None
        # an image whose tags are unknown: all of them masked, or none for a network that has never seen a masked one
        self.unknown: Tensor
        unknown = unknown_tags(self.length) if tagging else no_tags(self.length)
        self.register_buffer("unknown", unknown, persistent=False)

    def embed(self, text: Tensor) -> Tensor:
        """Token ids (B, n), int64, with n of at most `length`, to tokens (B, n, D).

        Raises:
            UsageError: another shape or type.
        """
        if text.ndim != 2 or text.shape[1] > self.length or text.dtype != torch.int64:
            raise UsageError(
                f"the text of a batch is int64 (B, n) with n of at most {self.length}, not {text.dtype} "
                f"{tuple(text.shape)}: make it with a TagTokenizer of this length"
            )
        embedded = self.words(text) + self.positions[:, : text.shape[1]] + self.token_type
        tokens: Tensor = self.drop(self.norm(embedded))
        return tokens

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`: append the text, or that of unknown tags."""
        # no test for None, because torch.fx passes a stand-in, and its traces are of images alone
        text = tokens.text if isinstance(tokens.text, Tensor) else self.unknown.expand(tokens.x.shape[0], -1)
        tokens.append(self.embed(text).to(tokens.x.dtype))

    def tag_logits(self, tokens: Tokens) -> Tensor:
        """The last tokens (B, n, D), as the last block left them, to logits of token ids (B, n, V).

        Raises:
            UsageError: there is no head for tags.
        """
        if self.tagger is None:
            raise UsageError("this network reads tags and does not predict them: build it with tagging = true")
        logits: Tensor = self.tagger(tokens.x[:, tokens.x.shape[1] - tokens.extra :], self.words.weight)
        return logits

    def no_weight_decay(self) -> set[str]:
        """See `Plugin.no_weight_decay`: embeddings."""
        return {"words.weight", "positions", "token_type"}


class TagHead(nn.Module):
    """The masked-language head of BERT: a linear layer, GELU, layer norm, and a decoder that shares the word embedding.

    Args:
        width: D.
        vocab_size: V.
        eps: epsilon of the layer norm.

    Shape:
        (B, n, D) and word embedding (V, D) to (B, n, V).
    """

    def __init__(self, width: int, vocab_size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """See the class."""
        return functional.linear(self.norm(self.act(self.dense(x))), words, self.bias)
