"""The interface of a method that works on the tokens of a vision transformer.

`TokenVisionTransformer` in `host` calls the hooks; the methods themselves are in the other modules of this package.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from animesion_training.tokens.attention import Attended
from animesion_training.tokens.state import Tokens


class Plugin(nn.Module):
    """A method on tokens. Every hook has a default that does nothing.

    Attributes:
        opens: blocks that it works inside of: `attention`, `parallel` and `between` are called in these only.
        keeps_grid: whether patch tokens form a grid after it.
        has_losses: whether it adds to `Tokens.losses` in training.
        needs_targets: whether it needs `Tokens.targets` for that.
        feature_width: width of the feature that `head_feature` returns, None for the transformer's own.
        also_trains: names of backbone parameters that are trained with it although the backbone is frozen.
    """

    opens: frozenset[int] = frozenset()
    keeps_grid: bool = True
    has_losses: bool = False
    needs_targets: bool = False
    feature_width: int | None = None
    also_trains: frozenset[str] = frozenset()

    def attach(self, backbone: Any) -> None:
        """Called once, when the plug-in is added to a timm transformer."""

    def reset_classes(self, num_classes: int, like: Tensor) -> None:
        """Called when the head is made or replaced, with its number of classes, 0 for none.

        Args:
            num_classes: the number of classes.
            like: a parameter of the transformer; new layers have its device and type.
        """

    def classifiers(self) -> nn.Module | None:
        """The container of all layers that `reset_classes` makes; None without such layers."""
        return None

    def extra_tokens(self) -> Tensor | None:
        """Learned tokens (1, n, D), positions included, that are appended to the patches before the first block."""
        return None

    def begin(self, tokens: Tokens) -> None:
        """Called with the embedded tokens, before the first block."""

    def before(self, block: int, tokens: Tokens) -> None:
        """Called before a block runs."""

    def attention(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """Called with the queries, keys and values of a block, before values are mixed.

        They may be replaced, and tokens dropped. A plug-in that drops queries must drop the same rows of `tokens.x`, to
        which the output is added, and of `attended.normed`.
        """

    def parallel(
        self, block: int, branch: Literal["attention", "mlp"], normed: Tensor, tokens: Tokens
    ) -> Tensor | None:
        """The output of a parallel branch, added to that of attention or MLP, from its normalised input (B, T, D)."""

    def between(self, block: int, tokens: Tokens, attended: Attended) -> None:
        """Called between attention and MLP of a block; tokens may be dropped or merged here."""

    def after(self, block: int, tokens: Tokens) -> None:
        """Called after a block."""

    def finish(self, tokens: Tokens) -> None:
        """Called after the last block, before the final norm."""

    def head_feature(self, feature: Tensor, tokens: Tokens) -> Tensor:
        """The input of the head, (B, `feature_width`), from the pooled feature (B, D)."""
        return feature

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of the plug-in without weight decay, in addition to biases and norms."""
        return set()
