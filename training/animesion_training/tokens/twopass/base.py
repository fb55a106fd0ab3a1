"""Base of the methods that look twice: a first pass selects a part of the image, a second one encodes its crop.

A network wraps a `TokenVisionTransformer` and runs it twice with the same weights. Its plug-ins work in both passes as
long as patches keep their grid. What is selected is left to the subclasses in `glsim` and `rams_trans`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.tokens.annotations import with_types
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens
from animesion_training.tokens.twopass.similarity import BOXES, BoxRule

#: Name of the box in the trace: rows y0 to y1, columns x0 to x1, the ends exclusive.
BOX_TRACE = "crop_box_rows0_rows1_cols0_cols1"

_ENCODER = "encoder."
_CROP_TOKEN = "crop_class_token"


class TwoPassTransformer(nn.Module):
    """Base of GLSim and RAMS-Trans; a subclass selects the crop, and combines both passes.

    Args:
        encoder: the network of both passes; modified in place.
        method: name of the method, for messages.
        crop_class_token: whether the pass over the crops has a class token of its own, which starts as a copy of the
            encoder's.
        box: one of `similarity.BOXES`; None for `corrected`, or `reference` with `reference_compat`.
        test_flip: average the logits with those of the mirrored images in evaluation, at twice the cost.
        reference_compat: reproduce what we consider a fault of the original: its box leaves out the last selected row
            and column of patches.

    Raises:
        UsageError: the encoder drops, merges or samples patches, or the value of an option is unknown.
    """

    def __init__(
        self,
        encoder: TokenVisionTransformer,
        *,
        method: str,
        crop_class_token: bool,
        box: BoxRule | None,
        test_flip: bool,
        reference_compat: bool,
    ) -> None:
        super().__init__()
        for name, plugin in encoder.plugins.items():
            if isinstance(plugin, Plugin) and not plugin.keeps_grid:
                raise UsageError(
                    f"{method} crops around patches by their place in the grid, and {name} {type(plugin).__name__} "
                    f"leaves no grid: use one of {method} and {name}"
                )
        if encoder.backbone.cls_token is None:
            raise UsageError(f"{method} needs a class token, and this vision transformer pools its patches without one")
        if not isinstance(encoder.backbone.patch_drop, nn.Identity):
            raise UsageError(f"{method} crops around patches by their place in the grid: set patch_drop_rate to 0")
        if box is not None and box not in BOXES:
            raise UsageError(f"no box is called {box!r}: there are {', '.join(BOXES)}")
        self.encoder = encoder
        self.box: BoxRule = box or ("reference" if reference_compat else "corrected")
        self.test_flip = test_flip
        token = encoder.backbone.cls_token.detach().clone() if crop_class_token else None
        self.crop_class_token = None if token is None else nn.Parameter(token)
        self.num_classes = encoder.num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = encoder.embed_dim
        self.in_chans = encoder.in_chans
        self.feature_info = [dict(info, module=f"{_ENCODER}{info['module']}") for info in encoder.feature_info]
        self.pretrained_cfg = self.default_cfg = getattr(encoder.backbone, "pretrained_cfg", None) or {}

    # -- two passes --------------------------------------------------------------------------------------------------

    def _features(self, x: Tensor, *, trace: bool = False, targets: Tensor | None = None) -> tuple[Tensor, Tokens]:
        """Return features (B, n, ...) of n tokens or passes, and the tokens of the first pass.

        The latter have the losses and traces of both passes.
        """
        raise NotImplementedError

    def _patch_area(self, x: Tensor) -> tuple[int, int]:
        """Height and width in pixels of the area with patches; a border narrower than a patch has none."""
        patch = self.encoder.backbone.patch_embed.patch_size
        return x.shape[2] // patch[0] * patch[0], x.shape[3] // patch[1] * patch[1]

    def _second(self, crops: Tensor, first: Tokens) -> Tokens:
        """Encode crops, and add their losses and trace to those of the first pass."""
        replaces_token = self.crop_class_token is not None
        second = self.encoder.encode(
            crops,
            trace=first.trace is not None,
            embedded=self._begin_with_crop_token if replaces_token else None,
            targets=first.targets,
        )
        # a plug-in adds the same terms in both passes
        for name, loss in second.losses.items():
            first.losses[name] = first.losses[name] + loss if name in first.losses else loss
        if first.trace is not None:
            first.trace |= {f"crop.{key}": value for key, value in (second.trace or {}).items()}
        return second

    def _begin_with_crop_token(self, embedding: Tensor) -> Tensor:
        """Replace the class token of embedded crops (B, T, D)."""
        host: Any = self.encoder.backbone
        token: Any = self.crop_class_token
        if host.pos_embed is not None and not host.no_embed_class:
            token = token + host.pos_embed[:, :1]  # the position of the class token, as timm's embedding adds it
        # (1, 1, D) to (B, 1, D)
        token = host.pos_drop(token.expand(embedding.shape[0], -1, -1)).to(embedding.dtype)
        return torch.cat([token, embedding[:, 1:]], dim=1)

    def _record(self, first: Tokens, **found: Tensor) -> None:
        if first.trace is not None:
            first.trace |= {name: value.detach() for name, value in found.items()}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the input of the classifier, (B, n, width): one vector per token or pass."""
        return self._features(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, n, width) to logits (B, num_classes), or to one feature (B, width)."""
        raise NotImplementedError

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **options: Any) -> Any:
        """The feature maps of the first pass, see `TokenVisionTransformer`, and the output of `forward_features`."""
        maps = self.encoder.forward_intermediates(x, intermediates_only=True, **options)
        return maps if intermediates_only else (self.forward_features(x), maps)

    @property
    def has_losses(self) -> bool:
        """Whether a plug-in adds terms to the training loss."""
        return self.encoder.has_losses

    @property
    def needs_targets(self) -> bool:
        """Whether such a term needs targets."""
        return self.encoder.needs_targets

    @with_types
    def forward(self, x: Tensor, with_losses: bool = False, targets: Tensor | None = None) -> Any:
        """Images (B, C, H, W) to logits (B, num_classes).

        Args:
            x: the images.
            with_losses: return also the terms that plug-ins add to the training loss: weighted scalars by name, summed
                over both passes.
            targets: class ids (B,) or soft labels (B, num_classes), for terms that need them.
        """
        features, tokens = self._features(x, targets=targets)
        logits = self.forward_head(features)
        if self.test_flip and not self.training:
            # images are (B, C, H, W): axis 3 mirrors them
            logits = (logits + self.forward_head(self.forward_features(x.flip(3)))) / 2
        return (logits, tokens.losses) if with_losses is True else logits  # see `TokenVisionTransformer.forward`

    def trace(self, x: Tensor) -> tuple[Tensor, Tokens]:
        """Return the logits without `test_flip`, and the tokens of the first pass.

        Their trace has the selection, the choices of plug-ins, and with the prefix `crop.` those of the second pass.
        """
        features, tokens = self._features(x, trace=True)
        return self.forward_head(features), tokens

    # -- timm's interface --------------------------------------------------------------------------------------------

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Convert weights of ours, the encoder or its bare backbone, in any layout that timm reads, for this model.

        A missing class token for crops starts as a copy of the class token. `model` is unused: it is part of the
        signature of timm's filters.
        """
        own, rest = state_dict, {}
        if any(key.startswith(_ENCODER) for key in state_dict):
            own = {key.removeprefix(_ENCODER): value for key, value in state_dict.items() if key.startswith(_ENCODER)}
            rest = {key: value for key, value in state_dict.items() if not key.startswith(_ENCODER)}
        own = self.encoder.adapt_state_dict(own)
        here = self.encoder.state_dict().keys()
        norms = ("backbone.norm.", "backbone.fc_norm.")  # the one of the file may have been dropped from the encoder
        adapted = {f"{_ENCODER}{key}": value for key, value in own.items() if key in here or not key.startswith(norms)}
        if self.crop_class_token is not None and "backbone.cls_token" in own:
            adapted[_CROP_TOKEN] = own["backbone.cls_token"].clone()
        return adapted | rest

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        own = set() if self.crop_class_token is None else {_CROP_TOKEN}
        return own | {f"{_ENCODER}{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay: the encoder's groups; all layers after it are in the last one."""
        inner = self.encoder.group_matcher(coarse)
        blocks = [(_inside(pattern), place) for pattern, place in inner["blocks"]]
        return {
            "stem": rf"{_inside(inner['stem'])}|^{_CROP_TOKEN}",
            "blocks": [*blocks, (rf"^(?!{_CROP_TOKEN}|encoder\.)", (99999,))],
        }

    def backbone_parameters(self) -> set[str]:
        """Names of the parameters that `freeze backbone` freezes: those of the encoder."""
        return {f"{_ENCODER}{name}" for name in self.encoder.backbone_parameters()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the encoder."""
        self.encoder.set_grad_checkpointing(enable)


def _inside(pattern: str) -> str:
    """Turn a pattern for names within the encoder into one for names with its prefix."""
    return rf"^encoder\.(?:{pattern.removeprefix('^')})"
