"""Heads on all patches: outputs, on a host with or without a class token."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.analysis.profile import count
from animesion_training.engine.optim import freeze
from animesion_training.tokens import TokenVisionTransformer
from animesion_training.tokens.pooling import (
    PATCH_HEADS,
    BilinearHead,
    MPNCOVHead,
    matrix_root,
    patch_head,
)
from animesion_training.tokens.reductions import make_reduction

WIDTH, CLASSES, PATCH = 24, 5, 4
NAMES = list(PATCH_HEADS)


def headed(name, class_token=True, plugins=None, **options):
    torch.manual_seed(0)
    host = VisionTransformer(
        (16, 20), PATCH, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=3, class_token=class_token,
        global_pool="token" if class_token else "avg", reg_tokens=2 if class_token else 0,
    )  # fmt: skip
    with torch.no_grad():  # with initial weights all patches would get the same attention
        host.blocks[0].attn.qkv.weight.mul_(50)
    head = patch_head(name, WIDTH, **options)
    return TokenVisionTransformer(host, plugins or {}, CLASSES, head, reads="patches").eval()


def images(batch=4):
    return torch.randn(batch, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("class_token", [False, True])
def test_the_head_reads_the_patches_after_the_final_norm(name, class_token):
    model = headed(name, class_token)
    with torch.inference_mode():
        logits, tokens = model.trace(images())
        patches = model.backbone.forward_features(images())[:, 3 if class_token else 0 :]
        patches = model.backbone.fc_norm(patches)
        assert torch.allclose(model.pool(model.encode(images())), patches, atol=1e-6)
        assert torch.allclose(logits, model.head(patches), atol=1e-5)
    assert patches.shape == (4, 20, WIDTH)
    assert ("block0.cls" in tokens.trace) == class_token


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_patches_does_not_matter(name):
    torch.manual_seed(0)
    head = patch_head(name, WIDTH)(CLASSES).eval()
    patches = torch.randn(3, 20, WIDTH)
    assert torch.allclose(head(patches), head(patches[:, torch.randperm(20)]), atol=1e-5)


@pytest.mark.parametrize("dim", [None, 6])
def test_bilinear_features_are_normalised_products_of_channels(dim):
    torch.manual_seed(0)
    head = BilinearHead(WIDTH, CLASSES, dim)
    patches = torch.randn(2, 20, WIDTH)
    channels = patches if head.project is None else head.project(patches)
    products = sum(channels[:, i, :, None] * channels[:, i, None, :] for i in range(20))
    rooted = products.sign() * products.abs().sqrt()
    expected = head.fc(functional.normalize(rooted.flatten(1), dim=1))
    assert torch.allclose(head(patches), expected, atol=1e-5)


def test_covariance_features_are_the_root_of_the_covariance():
    torch.manual_seed(0)
    head = MPNCOVHead(WIDTH, CLASSES, dim=6, iterations=20).eval()
    patches = torch.randn(2, 200, WIDTH)
    channels = head.act(head.norm(head.project(patches).flatten(0, 1))).view(2, 200, 6)
    root = torch.zeros(2, 6, 6)
    rows, columns = torch.triu_indices(6, 6)
    root[:, rows, columns] = root[:, columns, rows] = head.features(patches)
    covariance = torch.stack([each.T.cov(correction=0) for each in channels])
    assert torch.allclose(root @ root, covariance, atol=1e-4)


def test_the_matrix_root_converges_to_that_of_the_eigenvalues():
    torch.manual_seed(0)
    samples = torch.randn(3, 50, 8, dtype=torch.float64)
    matrices = samples.transpose(1, 2) @ samples / 50
    values, vectors = torch.linalg.eigh(matrices)
    exact = vectors * values.sqrt()[:, None] @ vectors.transpose(1, 2)
    errors = [(matrix_root(matrices, each) - exact).abs().max().item() for each in (3, 5, 8, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    assert matrix_root(torch.zeros(1, 3, 3)).abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_of_the_head_gets_a_finite_gradient(name, autocast):
    model = headed(name)
    frozen = freeze(model, ["backbone"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.train()(images())
    logits.float().square().sum().backward()
    for key, value in model.named_parameters():
        assert (value.grad is None) == (key in frozen)
        assert value.grad is None or value.grad.isfinite().all()
    assert {key for key, _ in model.named_parameters() if key.startswith("backbone.")} == set(frozen)


def test_equal_patches_are_accepted():
    for name in NAMES:
        head = patch_head(name, WIDTH)(CLASSES).train()
        patches = torch.ones(3, 20, WIDTH, requires_grad=True)
        head(patches).sum().backward()
        assert patches.grad.isfinite().all(), name


def test_padded_patches_are_refused_and_reduced_ones_accepted():
    plan: dict[str, Any] = {"keep_rate": 0.5, "layers": (0,), "depth": 2, "width": WIDTH, "tokens": 20}
    model = headed("mpncov", plugins={"reduction": make_reduction("evit", **plan)})
    assert model(images()).shape == (4, CLASSES)
    model = headed("mpncov", plugins={"reduction": make_reduction("ats", **plan)})
    with pytest.raises(UsageError, match="leave out the method that pads"):
        model(images())


@pytest.mark.parametrize(
    ("name", "trained", "small", "large"), [("mpncov", 0.466, 17.49, 78.47), ("lrblp", 0.869, 17.48, 78.42)]
)
def test_costs_are_the_published_ones(name, trained, small, large):
    for side, published in ((224, small), (448, large)):
        with torch.device("meta"):
            host = timm.create_model(
                "vit_base_patch16_224", num_classes=0, img_size=side, class_token=False, global_pool="avg"
            )
            model = TokenVisionTransformer(host, {}, 200, patch_head(name, 768), reads="patches")
        measured = count(model, (side, side)).multiply_adds / 1e9
        print(f"{name} {side}: {measured:.2f} G multiply-adds, published {published:.2f}")
        assert measured == pytest.approx(published, rel=0.002)
    freeze(model, ["backbone"])
    own = sum(value.numel() for value in model.parameters() if value.requires_grad) / 1e6
    assert own == pytest.approx(trained, abs=0.001)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpnconv", {}, "did you mean 'mpncov'"),
        ("pool", {"dim": 3}, "it has none"),
        ("blp", {"dim": 3}, "no option dim"),
        ("mpncov", {"power": 3}, "dim, iterations"),
        ("lrblp", {"dim": 0}, "from 1"),
        ("mpncov", {"iterations": 1}, "from 2"),
    ],
)
def test_bad_settings_raise_one_sentence(name, options, message):
    with pytest.raises(UsageError, match=message):
        patch_head(name, WIDTH, **options)(CLASSES)
