"""Counted costs equal the published ones, whichever way attention is computed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from animesion_training import create_model
from animesion_training.analysis.profile import count, measure


@pytest.mark.parametrize(
    ("name", "classes", "size", "head", "parameters", "multiply_adds"),
    [
        # millions of parameters and G multiply-adds, as timm and the papers print them
        ("resnet18", 1000, 224, "linear", 11.69, 1.82),
        ("resnet50", 1000, 224, "linear", 25.56, 4.09),
        ("resnet152", 1000, 224, "linear", 60.19, 11.51),
        ("vit_base_patch16", 200, 224, "linear", 85.95, 17.56),
        ("vit_base_patch16", 200, 448, "linear", 86.40, 78.50),
        ("vit_base_patch16", 200, 224, "ifa", 85.95, 17.56),
        ("vit_base_patch16", 200, 448, "ifa", 86.40, 78.50),
        ("vit_large_patch16", 1000, 224, "linear", 304.33, 61.55),
    ],
)
def test_published_costs(name, classes, size, head, parameters, multiply_adds):
    with torch.device("meta"):  # counting needs shapes only
        counts = count(create_model(name, classes, size, head), (size, size))
    assert counts.parameters / 1e6 == pytest.approx(parameters, rel=0.001)
    assert counts.trainable == counts.parameters
    assert counts.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=0.01)


def test_activations_of_resnet50_as_in_regnet():
    with torch.device("meta"):
        counts = count(create_model("resnet50", 1000), (224, 224))
    assert counts.activations / 1e6 == pytest.approx(11.1, rel=0.01)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_fused_or_not(fused):
    depth, width, tokens = 2, 48, 17
    model = create_model("vit_tiny_patch16", 5, 64, depth=depth, embed_dim=width, num_heads=3)
    for block in model.blocks:
        block.attn.fused_attn = fused
    counts = count(model, (64, 64))
    linear = tokens * depth * 12 * width**2 + 16 * 768 * width + 5 * width
    attention = depth * 2 * tokens**2 * width
    assert counts.multiply_adds == linear + attention
    assert counts.attention_multiply_adds == (attention if fused else 0)


def test_frozen_parameters_are_not_trainable_and_the_mode_is_kept():
    model = create_model("resnet18", 5).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    assert count(model, (32, 32)).trainable == 513 * 5
    assert model.training


def test_measured_figures_make_sense():
    model = create_model("resnet18", 5)
    speed = measure(model, (32, 32), 4, seconds=0)
    assert speed.batch_size == 4
    assert speed.images_per_second > 0
    assert speed.latency_ms > 0
    weights = sum(parameter.nbytes for parameter in model.parameters())
    stem = 4 * 64 * 16 * 16 * 4  # bytes of the first convolution's output
    assert weights + stem < speed.peak_memory < weights + 20 * stem
    assert measure(model, (32, 32), 64, seconds=0).peak_memory > speed.peak_memory
