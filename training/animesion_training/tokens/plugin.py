"""The interface of a method that works on the tokens of a vision transformer.

`TokenVisionTransformer` in `host` calls the hooks; the methods themselves are in the other modules of this package.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from animesion_training.tokens.attention import Attended
from animesion_training.tokens.state import Tokens


class Plugin(nn.Module):
    """A method on tokens; every hook may be left as it is.

    Attributes:
        opens: the blocks whose inside it needs: `attention`, `between` and `beside` are called in these only.
        keeps_grid: whether patch tokens still form a grid after it.
        has_losses: whether it adds to `Tokens.losses` in training.
        needs_targets: whether it needs `Tokens.targets` for that.
        feature_width: width of the feature that `pooled` gives, None for the transformer's own.
        also_trains: names within the backbone that are trained with it although the backbone is frozen.
    """

    opens: frozenset[int] = frozenset()
    keeps_grid: bool = True
    has_losses: bool = False
    needs_targets: bool = False
    feature_width: int | None = None
    also_trains: frozenset[str] = frozenset()

    def attach(self, backbone: Any) -> None:
        """The plug-in is put on a timm transformer, once, before anything runs."""

    def appended(self) -> Tensor | None:
        """Learned tokens (1, n, D), positions included, to stand behind the patches from the start; None for none."""
        return None

    def begin(self, tokens: Tokens) -> None:
        """Tokens are embedded, no block has run."""

    def before(self, block: int, tokens: Tokens) -> None:
        """A block is about to run."""

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """Queries, keys and values are there, nothing was mixed yet: they may be replaced, and tokens dropped.

        Who drops queries drops the same rows of `tokens.x`, to which the output is added, and of `attended.normed`.
        """

    def beside(self, block: int, branch: Literal["attention", "mlp"], normed: Tensor, tokens: Tokens) -> Tensor | None:
        """What is added to a branch's output, from the branch's normalised input (B, T, D)."""

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """The attention's output was added, the MLP has not run: tokens may be dropped or merged."""

    def after(self, block: int, tokens: Tokens) -> None:
        """A block has run."""

    def finish(self, tokens: Tokens) -> None:
        """All blocks have run; the final norm has not."""

    def pooled(self, feature: Tensor, tokens: Tokens) -> Tensor:
        """What the head is given in place of the pooled feature (B, D): (B, `feature_width`)."""
        return feature

    def no_weight_decay(self) -> set[str]:
        """Names within the plug-in that weight decay leaves alone, beyond biases and norms."""
        return set()
