"""Class activation maps: which places of its feature maps a network's score of a class depends on.

Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391) and LayerCAM (Jiang et al., IEEE TIP 2021) from activations and
gradients, and where they are read in a network: the last feature map, or, where that has no gradient because a class
token is classified, the input of the last attention. Attention rollout is in `tokens.rollout`, drawing in `panels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.models.create import bare
from animesion_training.models.feature_maps import as_feature_map
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.patch_maps import PatchMaps
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

#: Names of the last map and of the tokens in front of the last attention, beside those of `feature_info`.
LAST, TOKENS = "last map", "last attention"

#: Cells a side from which on a map is fine enough to point at a part: those of a ResNet's last map at 224 px.
_FINE = 7


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: channels weighted by their mean gradient, `ReLU(sum_c mean_ij(dy/dA_cij) A_c)` (eq. 1 and 2).

    Args:
        activations: A, (B, C, h, w).
        gradients: of the score of a class by them, of the same shape.

    Returns:
        (B, h, w), >= 0.
    """
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * activations).sum(1).clamp_min(0)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM: each place weighted by its own positive gradient, `ReLU(sum_c ReLU(dy/dA_cij) A_cij)` (eq. 4 to 6).

    Arguments and result are those of `grad_cam`.
    """
    return (gradients.clamp_min(0) * activations).sum(1).clamp_min(0)


class Recorded:
    """Feature maps of a batch and the gradients of one class's score by them, from one forward and backward pass.

    Args:
        model: in evaluation mode.
        x: normalised images, (B, C, H, W).
        targets: class of each image, (B,); None for the most probable.

    Attributes:
        targets: the classes, (B,).
        maps: activations and gradients, (B, C, h, w) each, by name; first ones first. Maps whose gradient is zero
            everywhere are left out, unless that of all is.
        silent: whether it is, so that nothing in these images speaks for the class, or the classifier is zero.

    Raises:
        UsageError: the network has no such map.
    """

    def __init__(self, model: nn.Module, x: Tensor, targets: Tensor | None = None) -> None:
        self._network: Any = bare(model)
        self._size = (x.shape[2], x.shape[3])
        self._sites = dict(_sites(self._network))
        outputs: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            for name, module in self._sites.items():
                stack.enter_context(_hooked(module, name, outputs))
            stack.enter_context(_last_map(self._network, outputs))
            places = stack.enter_context(_places(self._network))
            # a copy, which a gradient can reach even if the images were made in inference mode
            logits = model(x.clone().requires_grad_())
            self.targets = logits.argmax(1) if targets is None else targets
            score = logits.gather(1, self.targets[:, None]).sum()
            names = [name for name, value in outputs.items() if value.requires_grad]
            found = torch.autograd.grad(score, [outputs[name] for name in names], allow_unused=True) if names else ()
        reached: dict[str, tuple[Tensor, Tensor]] = {}
        count = len(x)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                continue
            # a network with several passes encodes other views behind the images themselves
            pair = [self._as_map(name, each.detach()[:count].float(), places) for each in (outputs[name], gradient)]
            if pair[0] is not None and pair[1] is not None and pair[0].shape[2:] != (1, 1):
                reached[name] = (pair[0], pair[1])
        heard = {name: pair for name, pair in reached.items() if pair[1].any()}
        self.silent = not heard
        self.maps: dict[str, tuple[Tensor, Tensor]] = heard or reached
        if not self.maps:
            raise UsageError(
                f"{type(self._network).__name__} has no feature map that its classes depend on, so there is no class "
                "activation map of it"
            )

    def _as_map(self, name: str, value: Tensor, places: list[Tensor]) -> Tensor | None:
        backbone = _inner(self._network)
        if places:
            if name != TOKENS:  # after it patches are moved and dropped again
                return None
            return _scattered(value, places[0], _grid(backbone, self._size))
        if value.dim() == 3:
            return _of_tokens(backbone, value, self._size)
        nhwc = getattr(backbone, "output_fmt", None) == "NHWC"
        return as_feature_map(backbone, value, self._size, nhwc=nhwc) if value.dim() == 4 else None

    @property
    def best(self) -> str:
        """The map that is read by default.

        It is the last one, or, with a class token, the input of the last attention. Where that has fewer than 7 x 7
        cells, as that of a ResNet for images of 64 px, which can only point at a quarter of an image, it is the last
        map with as many, if there is one.
        """
        order = (TOKENS, LAST) if self.silent else (LAST, TOKENS)
        last = next((name for name in order if name in self.maps), list(self.maps)[-1])
        fine = [name for name in self.maps if min(self.maps[name][0].shape[2:]) >= _FINE]
        return last if last in fine or not fine else fine[-1]

    def grad_cam(self, layer: str | None = None) -> Tensor:
        """`grad_cam` of a layer, (B, h, w); by default of the best one.

        Raises:
            UsageError: no such layer.
        """
        return grad_cam(*self._pair(layer or self.best))

    def layer_cam(self, layer: str | None = None) -> Tensor:
        """`layer_cam` of a layer, (B, h, w); by default of the best one.

        Raises:
            UsageError: no such layer.
        """
        return layer_cam(*self._pair(layer or self.best))

    def _pair(self, layer: str) -> tuple[Tensor, Tensor]:
        if layer not in self.maps:
            known = ", ".join(self.maps)
            raise UsageError(f"{type(self._network).__name__} has no feature map {layer!r}: there are {known}")
        return self.maps[layer]


# -- where maps are read ---------------------------------------------------------------------------------------------


def _inner(network: Any) -> Any:
    """The network whose feature map it is: without a selector of parts or a head around it."""
    while True:
        inner = getattr(network, "encoder", None)
        inner = inner if isinstance(inner, TokenVisionTransformer) else getattr(network, "backbone", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def _sites(network: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose outputs are feature maps, by name, in their order: those of `feature_info`, and the last norm."""
    modules = dict(network.named_modules())
    infos: Any = getattr(network, "feature_info", None) or ()
    for info in infos:
        name = str(info.get("module")) if isinstance(info, dict) else ""
        if name in modules:
            yield name, modules[name]
    blocks = getattr(_inner(network), "blocks", None)
    last = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) else None
    if last is not None and isinstance(norm := getattr(last, "norm1", None), nn.Module):
        yield TOKENS, norm


@contextmanager
def _hooked(module: nn.Module, name: str, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Record the first output of a module."""

    def record(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and name not in outputs:
            outputs[name] = output

    hook = module.register_forward_hook(record)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _last_map(network: Any, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Record the first output of `forward_features`, timm's name for everything in front of the pooling."""
    owner = _inner(network)
    original = getattr(owner, "forward_features", None)
    if original is None:
        yield
        return

    def record(*arguments: Any, **options: Any) -> Any:
        output = original(*arguments, **options)
        if isinstance(output, Tensor) and LAST not in outputs:
            outputs[LAST] = output
        return output

    own = vars(owner).get("forward_features")
    vars(owner)["forward_features"] = record
    try:
        yield
    finally:
        if own is None:
            del vars(owner)["forward_features"]
        else:
            vars(owner)["forward_features"] = own


class _Places(Plugin):
    """Records the token of each patch in front of the last block; the output of the network does not change."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.found: list[Tensor] = []

    def begin(self, tokens: Tokens) -> None:
        """See `Plugin.begin`."""
        if tokens.maps is None and tokens.grid is not None:
            tokens.maps = PatchMaps(tokens.patches, tokens.grid, ())

    def before(self, block: int, tokens: Tokens) -> None:
        """See `Plugin.before`."""
        if block == self.last and tokens.maps is not None:
            places = tokens.maps.places
            self.found.append(torch.where(places >= 0, places + tokens.prefix, places))


@contextmanager
def _places(network: Any) -> Iterator[list[Tensor]]:
    """Record the places (B, N) of patches among the tokens in front of the last block, -1 for dropped ones."""
    host = getattr(network, "encoder", network)
    if not isinstance(host, TokenVisionTransformer):
        yield []
        return
    recorder = _Places(len(host.backbone.blocks) - 1)
    name = "places_recorder"
    host.plugins[name] = recorder  # last, behind what moves tokens
    try:
        yield recorder.found
    finally:
        del host.plugins[name]


def _scattered(value: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Vectors of patches on their grid, (B, C, h, w), from those of tokens (B, T, C); 0 for dropped ones."""
    places = places[: len(value)]
    index = places.clamp_min(0)[:, :, None].expand(-1, -1, value.shape[2])
    patches = value.gather(1, index) * (places >= 0)[:, :, None]
    return _gridded(patches, grid)


def _of_tokens(backbone: Any, value: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Tokens (B, T, C) as a map (B, C, h, w): the patches, which follow the prefix; None if they form no grid."""
    try:
        grid = _grid(backbone, size)
    except UsageError:
        grid = None
    count = value.shape[1]
    if (
        grid is None or grid[0] * grid[1] > count
    ):  # another embedding, or a grid that shrinks: that of the image's shape
        rows = round((count * size[0] / size[1]) ** 0.5)
        columns = round((count * size[1] / size[0]) ** 0.5)
        if rows * columns != count:
            return None
        grid = (rows, columns)
    patches = value[:, count - grid[0] * grid[1] :]
    prefix = getattr(backbone, "num_prefix_tokens", 0) or 0
    if count == grid[0] * grid[1] and prefix:  # the original ViTFS, which loses a patch at the end for each register
        patches = torch.cat([value[:, prefix:], torch.zeros_like(value[:, :prefix])], dim=1)
    return _gridded(patches, grid)


def _gridded(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, C) on their grid, (B, C, h, w)."""
    return patches.transpose(1, 2).reshape(len(patches), -1, *grid)


def _grid(backbone: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of a transformer."""
    embed = getattr(backbone, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise UsageError(f"{type(backbone).__name__} has no grid of patches")
    grid: tuple[int, int] = embed.dynamic_feat_size(size)  # type: ignore[union-attr]
    return grid
