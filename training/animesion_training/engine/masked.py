"""The step of self-supervised training by masked autoencoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.engine.steps import Autocast, Step
from animesion_training.models import mae
from animesion_training.recipe import PretrainSection


class MaskedStep(Step):
    """Restore masked patches of images without labels (MAE, arXiv 2111.06377).

    Beside it, the classifier of the network learns the labels from the encoded visible patches, without an influence on
    them: its accuracy on whole images of the validation split shows how far the features have come. The decoder
    belongs to the run, not to the network.

    Args:
        bare: the network, a timm VisionTransformer.
        objective: of the classifier's logits and the labels.
        autocast: context of forward passes.
        settings: share of masked patches, and size of the decoder.

    Raises:
        UsageError: another network, or an option that the decoder refuses.
    """

    def __init__(self, bare: nn.Module, objective: nn.Module, autocast: Autocast, settings: PretrainSection) -> None:
        super().__init__(bare, objective, autocast, bare)
        if type(bare) is not VisionTransformer:
            raise UsageError(
                f"pretrain.method = 'mae' needs a vision transformer of timm without further methods, and this is "
                f"{type(bare).__name__}: give one to --model, such as vit_small_patch16"
            )
        patch: Any = bare.patch_embed
        self._share, self._patch, self._patches = settings.mask, patch.patch_size, patch.num_patches
        self.decoder = mae.Decoder(
            bare.embed_dim,
            patch.grid_size,
            patch.patch_size,
            bare.in_chans,
            width=settings.decoder_width,
            depth=settings.decoder_depth,
            heads=settings.decoder_heads,
        )

    @property
    def extra(self) -> nn.Module:
        """See `Step.extra`."""
        return self.decoder

    def terms(self, images: Tensor, targets: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """See `Step.terms`; targets are class ids (B,)."""
        network: Any = self.model
        division = mae.divide(seeds, self._patches, self._share)
        with self.autocast():
            encoded = mae.encode(network, images, division.visible)
            predicted = self.decoder(encoded, division)
            logits = network.forward_head(encoded.detach())
        return {
            "reconstruction": mae.reconstruction_loss(predicted, images, division.masked, self._patch),
            "classifier": self.objective(logits.float(), targets),
        }

    def method_state(self) -> Mapping[str, Tensor]:
        """See `Step.method_state`."""
        return self.decoder.state_dict()

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Step.load_method_state`."""
        self.decoder.load_state_dict(dict(state))
