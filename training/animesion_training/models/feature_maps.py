"""Spatial feature maps of timm networks: their shape, and the parameters that they depend on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError

#: Sizes in pixels that the probe tries next, for networks with windows that were built for another size.
_PROBE_SIZES = ((256, 256), (128, 128), (192, 192), (384, 384), (448, 448), (512, 512))


class FeatureMapProbe:
    """The result of one forward pass of a copy on the meta device: shape and parameters of the feature map.

    Args:
        backbone: the network; not changed.

    Attributes:
        in_chans: channels of images.
        channels: C, channels of the feature map.
        nhwc: whether the network returns channels last.

    Raises:
        UsageError: the network has no feature map.
    """

    def __init__(self, backbone: nn.Module) -> None:
        config = getattr(backbone, "pretrained_cfg", None) or {}
        channels, *size = config.get("input_size") or (3, 224, 224)
        given = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        self.in_chans: int = getattr(backbone, "in_chans", channels)
        self.nhwc = getattr(backbone, "output_fmt", None) == "NHWC"
        copied, features = self._run(backbone, [tuple(given or size), *_PROBE_SIZES])
        self.channels = int(features.shape[1])
        used = _leaves(features)
        # the copy has its parameters in the same order
        pairs = zip(backbone.parameters(), copied.parameters(), strict=True)
        self._used = {id(parameter) for parameter, copied_parameter in pairs if id(copied_parameter) in used}

    def _run(self, backbone: nn.Module, sizes: list[tuple[int, int]]) -> tuple[nn.Module, Tensor]:
        """Return the copy, and its feature map (2, C, h, w) for the first size that it accepts.

        Networks with windows accept only sizes that these divide.
        """
        reasons = []
        # the graph of gradients is needed, even where the caller has switched it off
        with torch.inference_mode(False), torch.enable_grad():
            copied: Any = _on_meta(backbone)
            for size in sizes:
                images = torch.empty(2, self.in_chans, *size, device="meta")
                try:
                    return copied, as_feature_map(copied, copied.forward_features(images), size, nhwc=self.nhwc)
                except (AttributeError, RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
                    reasons.append((str(error).splitlines() or [type(error).__name__])[0])
        raise UsageError(f"{type(backbone).__name__} has no feature map to attend to: {reasons[0]}")

    def drop_unused(self, module: nn.Module) -> None:
        """Replace modules by identities if the feature map depends on none of their parameters."""
        for name, child in list(module.named_children()):
            own = {id(parameter) for parameter in child.parameters()}
            if own and not own & self._used:
                setattr(module, name, nn.Identity())
            else:
                self.drop_unused(child)


def remove_classifier(backbone: Any) -> None:
    """Drop pooling and classifier of a timm network; a norm that it applies after pooling is applied to each patch.

    Raises:
        UsageError: it does not have the interface of timm's networks, or does not work without pooling.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "reset_classifier") or not hasattr(backbone, "forward_features"):
        raise UsageError(f"a CAL classifier needs a network with timm's interface, {name} has no forward_features")
    try:
        backbone.reset_classifier(0, "")
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"{name} does not work without pooling, so it has no feature map: {error}") from error
    norm, after_pool = getattr(backbone, "norm", None), getattr(backbone, "fc_norm", None)
    if isinstance(norm, nn.Identity) and after_pool is not None and not isinstance(after_pool, nn.Identity):
        backbone.norm, backbone.fc_norm = after_pool, norm


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode on the meta device: its tensors have shapes and use no memory."""
    # deepcopy takes the tensors from its memo, so the weights are never duplicated
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo).eval()


def _leaves(result: Tensor) -> set[int]:
    """Ids of the parameters that a result depends on, by its graph of gradients."""
    leaves, seen, open_nodes = set(), set(), [result.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf that accumulates a gradient
            leaves.add(id(node.variable))
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def as_feature_map(backbone: Any, features: Any, size: tuple[int, ...], *, nhwc: bool) -> Tensor:
    """Reshape the output of `forward_features` for images of a size (H, W) to (B, C, h, w).

    Args:
        backbone: the network.
        features: a map (B, C, h, w) or (B, h, w, C), or tokens (B, T, C).
        size: (H, W) of the images in pixels.
        nhwc: whether maps have channels last.

    Raises:
        UsageError: another shape, or tokens that form no grid.
    """
    embed: Any = getattr(backbone, "patch_embed", None)
    grid = embed.dynamic_feat_size(size) if hasattr(embed, "dynamic_feat_size") else None
    prefix = getattr(backbone, "num_prefix_tokens", 0) or 0
    return _as_map(features, size, grid, prefix, nhwc, type(backbone).__name__)


@torch.fx.wrap
def _as_map(
    features: Any, size: tuple[int, ...], grid: tuple[int, int] | None, prefix: int, nhwc: bool, name: str
) -> Tensor:
    """Do what `as_feature_map` does, from the grid and the prefix of the backbone; fx does not trace into it."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.permute(0, 3, 1, 2) if nhwc else features
    if not isinstance(features, Tensor) or features.ndim != 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"{name} has no feature map to attend to: its features are {shape}")
    patches = features[:, prefix:]
    batch, count, channels = patches.shape
    if grid is None or grid[0] * grid[1] != count:
        # the network reduces the grid, or has another embedding: the grid has the aspect ratio of the image
        height = max(1, round((count * size[0] / size[1]) ** 0.5))
        if count % height:
            raise UsageError(f"{name} returns {count} tokens for images of {size[0]}x{size[1]}, which form no grid")
        grid = (height, count // height)
    return patches.transpose(1, 2).reshape(batch, channels, *grid)
