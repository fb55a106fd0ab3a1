"""Masked autoencoding: its division of patches, encoder, decoder and loss, and runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext
from animesion_training.engine.feed import feed
from animesion_training.engine.masked import MaskedStep
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.models import create_model, load_weights, mae
from animesion_training.recipe import load
from animesion_training.weights import load_model
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))
MAE = (
    "pretrain.method=mae", "pretrain.decoder_width=16", "pretrain.decoder_depth=1", "pretrain.decoder_heads=2",
    "model.options.patch_size=8",
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def host(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=3, **options).eval()


def test_a_seed_divides_all_patches() -> None:
    division = mae.divide(torch.tensor([5, -1, 5]), 16, 0.75)
    assert division.visible.shape == (3, 4)
    assert division.masked.shape == (3, 12)
    both = torch.cat(division, dim=1).sort(1).values
    assert torch.equal(both, torch.arange(16).expand(3, 16))
    assert torch.equal(division.visible[0], division.visible[2])
    assert not torch.equal(division.visible[0], division.visible[1])
    assert torch.equal(division.visible, division.visible.sort(1).values)


def test_every_patch_is_masked_equally_often() -> None:
    division = mae.divide(torch.arange(4000), 16, 0.75)
    counts = torch.bincount(division.visible.flatten(), minlength=16)
    assert (counts - 1000).abs().max() < 120


@pytest.mark.parametrize(("share", "visible"), [(0.001, 15), (0.999, 1), (0.5, 8)])
def test_something_is_always_masked_and_shown(share: float, visible: int) -> None:
    assert mae.divide(torch.arange(2), 16, share).visible.shape == (2, visible)


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="has nothing to mask"):
        mae.divide(torch.arange(2), 1, 0.75)


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"pre_norm": True}]
)
def test_all_patches_visible_is_the_network_itself(options: dict[str, Any]) -> None:
    network, images = host(**options), random(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(mae.encode(network, images, everything), network.forward_features(images))


def test_masked_patches_do_not_reach_the_encoder() -> None:
    network, images = host(), random(2, 3, 32, 32)
    division = mae.divide(torch.arange(2), 16, 0.75)
    changed = images.clone()
    for image, masked in zip(changed, division.masked.tolist(), strict=True):
        for number in masked:
            row, column = divmod(number, 4)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7.0
    assert not torch.equal(images, changed)
    assert torch.equal(mae.encode(network, images, division.visible), mae.encode(network, changed, division.visible))


def test_patches_are_rows_of_pixels() -> None:
    images = random(2, 3, 8, 12)
    patches = mae.patchify(images, (4, 6))
    assert patches.shape == (2, 4, 72)
    expected = images[1, :, 4:8, 6:12].permute(1, 2, 0).flatten()  # the last patch
    assert torch.equal(patches[1, 3], expected)
    # a border narrower than a patch is left out
    assert torch.equal(
        mae.patchify(random(1, 3, 9, 14), (4, 6)), mae.patchify(random(1, 3, 9, 14)[:, :, :8, :12], (4, 6))
    )


def test_the_loss_by_hand() -> None:
    images, predicted = random(1, 1, 2, 4), torch.tensor([[[0.5, 0.0, -1.0, 2.0]]])
    patch = images[0, 0, :, 2:].flatten()
    target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    loss = mae.reconstruction_loss(predicted, images, torch.tensor([[1]]), (2, 2))
    assert float(loss) == pytest.approx(float((predicted[0, 0] - target).square().mean()))
    flat = mae.reconstruction_loss(torch.zeros(1, 1, 4), torch.ones(1, 1, 2, 4), torch.tensor([[0]]), (2, 2))
    assert float(flat) == 0


def test_the_decoder_sees_what_is_where() -> None:
    """Exchanging two visible patches changes the prediction, and a masked patch's prediction depends on its place."""
    torch.manual_seed(0)
    decoder = mae.Decoder(16, (4, 4), (8, 8), 3, width=16, depth=1, heads=2).eval()
    division = mae.divide(torch.arange(1), 16, 0.75)
    encoded = random(1, 5, 16)
    found = decoder(encoded, division)
    assert found.shape == (1, 12, 192)
    assert not torch.allclose(found[:, 0], found[:, 1])
    assert not torch.allclose(decoder(encoded[:, [0, 2, 1, 3, 4]], division), found)


def trainer(folder: Path, *overrides: str) -> Trainer:
    return Trainer(load("scratch", [*ranks.SMALL, *MAE, *overrides]), ranks.drawn(8), folder, ALONE, Watcher())


def train(run: Trainer, epochs: int) -> None:
    for _ in range(epochs):
        for batch, _ in feed(run.stream, ALONE.device):
            run.train_batch(batch)


def test_labels_do_not_move_the_encoder(tmp_path: Path) -> None:
    run = trainer(tmp_path, "optimizer.weight_decay=0", "optimizer.clip=0")
    step = run.update.step
    assert isinstance(step, MaskedStep)
    before = {name: value.clone() for name, value in step.named_parameters()}
    images, targets = random(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    terms = step(images, targets, torch.arange(4))
    assert set(terms) == {"reconstruction", "classifier"}
    terms["classifier"].backward()
    moved = {name for name, value in step.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    assert moved == {"model.head.weight", "model.head.bias"}
    train(run, 1)
    changed = {name for name, value in step.named_parameters() if not torch.equal(before[name], value)}
    assert {"decoder.mask", "decoder.pixels.weight", "model.patch_embed.proj.weight", "model.head.weight"} <= changed


def test_a_resumed_run_is_the_same_and_its_weights_are_a_plain_network(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", "schedule.epochs=2")
    whole.run()
    first = trainer(tmp_path / "cut", "schedule.epochs=2")
    train(first, 1)
    first._position = first.stream.state_dict()
    first.save()
    first.writer.close()
    second = trainer(tmp_path / "cut", "schedule.epochs=2")
    second.resume()
    second.run()
    ours, theirs = (run.update.step.state_dict() for run in (whole, second))
    assert any(name.startswith("decoder.") for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    network, _ = load_model(tmp_path / "whole" / "last.safetensors")
    assert type(network) is VisionTransformer
    fresh = create_model("vit_tiny_patch16", 5, 32, depth=1, embed_dim=16, num_heads=2, patch_size=8, adapter="lora")
    note = load_weights(fresh, tmp_path / "whole" / "last.safetensors")
    assert "a new one of 5 classes" in note


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("model.name=resnet10t", "model.options={}"), "needs a vision transformer of timm without further methods"),
        (("model.adapter=lora",), "without further methods"),
        (("augment.mixup=1",), "does not go with augment.mixup and augment.cutmix"),
        (("run.compile=true",), "does not go with run.compile"),
        (("objective.name=supcon", "run.batch_size=8"), "does not go with objective.name = 'supcon'"),
        (("pretrain.decoder_width=18",), "decoder_width is 18: give a multiple of 4 and of the 2 heads"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        trainer(tmp_path, *overrides)
