"""Spatial feature maps of timm networks: what shape they have, and which parameters they depend on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError

#: Sizes in pixels that the probe tries next, for networks with windows that were built for another size.
_PROBE_SIZES = ((256, 256), (128, 128), (192, 192), (384, 384), (448, 448), (512, 512))


class FeatureMapProbe:
    """One pass of a copy without memory (device meta): which map features have, and which parameters they use."""

    def __init__(self, backbone: nn.Module) -> None:
        config = getattr(backbone, "pretrained_cfg", None) or {}
        channels, *size = config.get("input_size") or (3, 224, 224)
        given = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        self.in_chans: int = getattr(backbone, "in_chans", channels)
        self.nhwc = getattr(backbone, "output_fmt", None) == "NHWC"
        shadow, features = self._run(backbone, [tuple(given or size), *_PROBE_SIZES])
        self.channels = int(features.shape[1])
        used = _leaves(features)
        pairs = zip(backbone.parameters(), shadow.parameters(), strict=True)
        self._used = {id(parameter) for parameter, shade in pairs if id(shade) in used}

    def _run(self, backbone: nn.Module, sizes: list[tuple[int, int]]) -> tuple[nn.Module, Tensor]:
        """The copy and its feature map of images of the first size that it takes: some have windows that must fit."""
        reasons = []
        with torch.inference_mode(False), torch.enable_grad():
            shadow: Any = _on_meta(backbone)
            for size in sizes:
                images = torch.empty(2, self.in_chans, *size, device="meta")
                try:
                    return shadow, as_feature_map(shadow, shadow.forward_features(images), size, nhwc=self.nhwc)
                except (AttributeError, RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
                    reasons.append((str(error).splitlines() or [type(error).__name__])[0])
        raise UsageError(f"{type(backbone).__name__} gives no feature map to attend to: {reasons[0]}")

    def drop_unused(self, module: nn.Module) -> None:
        """Put an identity in the place of modules whose parameters features do not pass through."""
        for name, child in list(module.named_children()):
            own = {id(parameter) for parameter in child.parameters()}
            if own and not own & self._used:
                setattr(module, name, nn.Identity())
            else:
                self.drop_unused(child)


def remove_classifier(backbone: Any) -> None:
    """Drop pooling and classifier of a timm network; a norm that it applies after pooling is applied to each patch.

    Raises:
        UsageError: it is no network of timm's kind, or it cannot be used without pooling.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "reset_classifier") or not hasattr(backbone, "forward_features"):
        raise UsageError(f"a CAL classifier needs a network of timm's kind, {name} has no forward_features")
    try:
        backbone.reset_classifier(0, "")
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"{name} cannot do without its pooling, so it gives no feature map: {error}") from error
    norm, after_pool = getattr(backbone, "norm", None), getattr(backbone, "fc_norm", None)
    if isinstance(norm, nn.Identity) and after_pool is not None and not isinstance(after_pool, nn.Identity):
        backbone.norm, backbone.fc_norm = after_pool, norm


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes and no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo).eval()


def _leaves(result: Tensor) -> set[int]:
    """Ids of the parameters that a result comes from."""
    leaves, seen, open_nodes = set(), set(), [result.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def as_feature_map(backbone: Any, features: Any, size: tuple[int, ...], *, nhwc: bool) -> Tensor:
    """What `forward_features` gave for images of a size (H, W), as (B, C, h, w)."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.permute(0, 3, 1, 2) if nhwc else features
    if not isinstance(features, Tensor) or features.ndim != 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"{type(backbone).__name__} gives no feature map to attend to, but {shape}")
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) or 0 :]
    batch, count, channels = patches.shape
    return patches.transpose(1, 2).reshape(batch, channels, *_grid(backbone, count, size))


def _grid(backbone: Any, count: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of so many patches."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(size)
        if height * width == count:
            return height, width
    # reduced on the way, or of another kind: the grid has the image's aspect
    height = max(1, round((count * size[0] / size[1]) ** 0.5))
    if count % height:
        raise UsageError(
            f"{type(backbone).__name__} gives {count} tokens for images of {size[0]}x{size[1]}, which make no grid"
        )
    return height, count // height
