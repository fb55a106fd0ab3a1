"""IFA on a timm VisionTransformer, and its registered names (`vit_base_patch16_ifa` ...).

The backbone's `forward_intermediates` returns the class token of each block, so no code of timm's model is repeated.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animesion.errors import UsageError
from animesion_training.models.baselines import BASELINES
from animesion_training.models.factory import backbone_configs, build_on_backbone
from animesion_training.models.heads import IFAHead
from animesion_training.tokens.annotations import with_types

_BACKBONE = "backbone."


class IFAVisionTransformer(nn.Module):
    """A vision transformer that classifies from the class tokens of all its blocks.

    The tokens are the outputs of the blocks, without a norm. The final norm of the backbone is dropped with its head,
    so that every parameter has a gradient.

    Args:
        backbone: a timm VisionTransformer with a class token (plain, DeiT, CLIP, DINO, MAE, with registers or not).
        num_classes: number of classes; 0 for features alone.

    Raises:
        UsageError: the backbone does not support the head.

    Shape:
        (B, C, H, W) to logits (B, num_classes).
    """

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UsageError(
                f"head ifa needs a plain vision transformer of timm, {type(backbone).__name__} has no class token "
                "in each block to gather"
            )
        if backbone.cls_token is None:
            raise UsageError("head ifa needs a class token, and this vision transformer pools its patches")
        backbone.reset_classifier(0, "token")
        backbone.norm = nn.Identity()
        backbone.fc_norm = nn.Identity()
        self.backbone = backbone
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self.embed_dim = self.num_features = self.head_hidden_size = backbone.embed_dim
        self.in_chans: int = backbone.in_chans
        self.feature_info = [dict(info, module=f"{_BACKBONE}{info['module']}") for info in backbone.feature_info]
        self.feature_dim = 1  # axis of the channels in the output of `forward_features`, as timm's networks state it
        self.head = IFAHead(len(backbone.blocks), self.embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the class tokens of all blocks (B, D, L), first block first."""
        # the blocks are run here, because timm's `forward_intermediates` returns pairs, which TorchScript cannot list
        host = self.backbone
        x = host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(x))))
        class_tokens = []
        for block in host.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            class_tokens.append(x[:, 0])
        return torch.stack(class_tokens, dim=-1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class tokens (B, D, L) to logits (B, num_classes), or to the input of the last layer (B, D)."""
        return self.head.features(x) if pre_logits else self.head(x)

    @with_types
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **options: Any) -> Any:
        """The maps of the backbone's `forward_intermediates`, see timm, and the output of `forward_features`."""
        maps = self.backbone.forward_intermediates(x, intermediates_only=True, **options)
        return maps if intermediates_only else (self.forward_features(x), maps)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Convert weights of ours or of the bare backbone, in any layout that timm reads, for this model.

        Position embeddings are resampled to this model's grid. Classifier and final norm of a bare backbone are left
        out, so its weights have no head. `model` is unused: it is part of the signature of timm's filters.
        """
        if any(key.startswith(_BACKBONE) for key in state_dict):
            host = {
                key.removeprefix(_BACKBONE): value for key, value in state_dict.items() if key.startswith(_BACKBONE)
            }
            head = {key: value for key, value in state_dict.items() if not key.startswith(_BACKBONE)}
        else:
            host, head = state_dict, {}
        host = checkpoint_filter_fn(host, self.backbone)
        dropped = ("norm.", "fc_norm.", "head.", "head_dist.", "pre_logits.")
        return {f"{_BACKBONE}{key}": value for key, value in host.items() if not key.startswith(dropped)} | head

    # -- timm's interface ----------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f"{_BACKBONE}{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer decay."""
        return {
            "stem": r"^backbone\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None)],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the blocks of the backbone."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The IFA head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one for another number of classes.

        Raises:
            UsageError: a pooling other than `token` is requested.
        """
        if global_pool not in (None, "", "token"):
            raise UsageError(f"head ifa gathers class tokens, and cannot pool by {global_pool!r}")
        self.num_classes = num_classes
        self.head.reset(num_classes, next(self.backbone.parameters()))

    def set_input_size(self, img_size: tuple[int, int] | None = None, **options: Any) -> None:
        """Change the input size; position embeddings are resampled."""
        self.backbone.set_input_size(img_size=img_size, **options)


#: Our registered name -> the backbone's name in timm.
IFA_MODELS = {f"{short}_ifa": BASELINES[short] for short in BASELINES if short.startswith("vit_")}


def _default_cfgs() -> dict[str, Any]:
    configs: dict[str, Any] = {}
    for name, host in IFA_MODELS.items():
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{host}.*")]
        configs |= backbone_configs(name, host, tags, prefix=_BACKBONE, classifier="head.fc")
    return dict(generate_default_cfgs({key: config for key, config in configs.items() if config.hf_hub_id}))


default_cfgs = _default_cfgs()


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    def make(num_classes: int = 1000, **host_options: Any) -> IFAVisionTransformer:
        host = timm.create_model(IFA_MODELS[name], pretrained=False, num_classes=0, **host_options)
        return IFAVisionTransformer(host, num_classes)

    return build_on_backbone(make, name, pretrained, **options)


@register_model
def vit_tiny_patch16_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-Ti/16 with the IFA head."""
    return _create("vit_tiny_patch16_ifa", pretrained, **options)


@register_model
def vit_small_patch16_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-S/16 with the IFA head."""
    return _create("vit_small_patch16_ifa", pretrained, **options)


@register_model
def vit_base_patch16_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-B/16 with the IFA head."""
    return _create("vit_base_patch16_ifa", pretrained, **options)


@register_model
def vit_large_patch16_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-L/16 with the IFA head, the best of DAF:re at 128 pixels."""
    return _create("vit_large_patch16_ifa", pretrained, **options)


@register_model
def vit_base_patch32_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-B/32 with the IFA head."""
    return _create("vit_base_patch32_ifa", pretrained, **options)


@register_model
def vit_large_patch32_ifa(pretrained: bool = False, **options: Any) -> Any:
    """ViT-L/32 with the IFA head."""
    return _create("vit_large_patch32_ifa", pretrained, **options)
