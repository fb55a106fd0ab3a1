"""Layers of networks on the images of a split: their similarity by CKA, and how far the heads of a transformer look."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval.reading import Reading
from animesion_training.models.create import bare
from animesion_training.tokens.cka import MinibatchCKA
from animesion_training.tokens.host import TokenVisionTransformer
from animesion_training.tokens.rollout import attention_distance, record_attention
from animesion_training.tokens.token_flow import recorded_attention
from animesion_training.weights import WeightsCard

#: The unbiased estimator needs four samples, and a batch of its own kernel matrix is small.
BATCH = 64


@dataclass(frozen=True)
class LayerSimilarity:
    """CKA of each layer of a network with each layer of another, or of its own.

    Attributes:
        rows: names of the layers of the first network, from the input on.
        columns: those of the second.
        values: CKA by row and column, None where it is not defined because a layer is constant.
        images: number of images.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    images: int


class _Layers:
    """The features (B, D) of the layers of a network: means over places of maps, and over tokens."""

    def __init__(self, model: nn.Module) -> None:
        network: Any = bare(model)
        modules = dict(network.named_modules())
        infos = getattr(network, "feature_info", None) or ()
        names = [info["module"] for info in infos if isinstance(info, dict) and info.get("module") in modules]
        if not names:
            raise UsageError(f"{type(network).__name__} names no layers, so they cannot be compared")
        self.model = model
        self._modules = {name: modules[name] for name in dict.fromkeys(names)}
        self.nhwc = getattr(network, "output_fmt", None) == "NHWC"
        self.names: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> list[Tensor]:
        found: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def record(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.dim() in (3, 4) and name not in found:
                    axes = 1 if output.dim() == 3 else (1, 2) if self.nhwc else (2, 3)
                    found[name] = output[: len(x)].float().mean(axes)

            return record

        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(hook(name)).remove)
            self.model(x)
        self.names = tuple(found)
        return list(found.values())


def layer_similarity(
    one: tuple[nn.Module, WeightsCard],
    other: tuple[nn.Module, WeightsCard],
    data: DataSplits,
    split: str,
    context: DistributedContext,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> LayerSimilarity:
    """Compare the layers of two networks by linear CKA on the images of a split (Kornblith et al., ICML 2019).

    Features of a layer are the means of its map over places, or of its tokens. CKA is estimated over batches without
    the bias of few samples, see `MinibatchCKA`. Each network sees the images in its own size.

    Args:
        one: a network in evaluation mode, on the device of the context, and its card.
        other: another one, or the same.
        data: the data; labels are not used.
        split: name of the split.
        context: device to compute on.
        advance: called with the number of images of each batch.

    Raises:
        UsageError: a network without named layers, or fewer than four images.
    """
    layers = [_Layers(model) for model, _ in (one, other)]
    streams = [_images(card, data, split, context) for _, card in (one, other)]
    sums: dict[tuple[int, int], MinibatchCKA] = {}
    count = 0
    with torch.inference_mode():
        for x, y in zip(*streams, strict=True):
            if len(x) < 4:  # the last batch
                continue
            rows, columns = layers[0](x), layers[1](y)
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    sums.setdefault((i, j), MinibatchCKA()).update(row, column)
            count += len(x)
            advance(len(x))
    if not count:
        raise UsageError(f"the split '{split}' has fewer than four images, which CKA needs")

    def value(i: int, j: int) -> float | None:
        try:
            return sums[i, j].value()
        except UsageError:  # constant
            return None

    values = tuple(tuple(value(i, j) for j in range(len(layers[1].names))) for i in range(len(layers[0].names)))
    return LayerSimilarity(layers[0].names, layers[1].names, values, count)


def mean_attention_distance(
    model: nn.Module,
    card: WeightsCard,
    data: DataSplits,
    split: str,
    context: DistributedContext,
    *,
    most: int = 256,
) -> Tensor:
    """Mean attention distance of each head on images of a split (Dosovitskiy et al., ICLR 2021, figure 7 and App. D.7).

    Args:
        model: in evaluation mode, on the device of the context.
        card: of its weights.
        data: the data.
        split: name of the split.
        context: device to compute on.
        most: images, the first ones of the split.

    Returns:
        (blocks, heads), in pixels of the input.

    Raises:
        UsageError: a network without attention over all patches in each block.
    """
    network: Any = bare(model)
    host = getattr(network, "encoder", network)
    inner: Any = host.backbone if isinstance(host, TokenVisionTransformer) else network
    while not hasattr(inner, "blocks") and isinstance(getattr(inner, "backbone", None), nn.Module):
        inner = inner.backbone
    embed: Any = getattr(inner, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise UsageError(f"{type(inner).__name__} has no grid of patches, so its attention has no distances")
    total: Tensor | None = None
    count = 0
    with torch.inference_mode():
        for x in _images(card, data, split, context, batch_size=8):
            if isinstance(host, TokenVisionTransformer):
                with record_attention(host) as recorder:
                    host(x)
                weights = recorder.pop_weights()
            else:
                with recorded_attention(inner) as weights:
                    model(x)
            height, width = embed.dynamic_feat_size(tuple(x.shape[-2:]))
            patch = (x.shape[2] // height, x.shape[3] // width)
            distances = attention_distance(weights, (height, width), patch).cpu() * len(x)
            total = distances if total is None else total + distances
            count += len(x)
            if count >= most:
                break
    assert total is not None
    return total / count


def _images(
    card: WeightsCard, data: DataSplits, split: str, context: DistributedContext, batch_size: int = BATCH
) -> Any:
    """Normalised images of a split in its order, (B, 3, S, S)."""
    reading = Reading.of(card, "the network", batch_size=batch_size)
    for images, _ in reading.outputs(lambda images, batch: images, data, split, context):
        yield images
