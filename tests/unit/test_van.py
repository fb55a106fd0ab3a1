"""VAN as a model of timm: published costs, the formulas of its attention, features and pruning."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.optim import param_groups_layer_decay
from torch.nn import functional

import animesion_training.models.van  # noqa: F401  (registers the names)
from animesion.errors import UsageError
from animesion_training import create_model
from animesion_training.analysis.profile import count
from animesion_training.models.van import VanBlock

#: Parameters in millions and multiply-adds in billions at 224 pixels, for 1000 classes: table 2 of the paper.
COSTS = {"van_b0": (4.1, 0.9), "van_b1": (13.9, 2.5), "van_b2": (26.6, 5.0), "van_b3": (44.8, 9.0)}
SMALL: dict[str, Any] = {"widths": (8, 8, 16, 24), "depths": (1, 2, 2, 1), "num_classes": 5}


def small(**options: Any) -> Any:
    torch.manual_seed(3)
    model = timm.create_model("van_b0", **SMALL, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(side: int = 64) -> Any:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", COSTS)
def test_published_costs(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, 1000)
    parameters, multiply_adds = COSTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert count(model, (224, 224)).multiply_adds / 1e9 == pytest.approx(multiply_adds, abs=0.1)


def test_a_block_computes_the_formulas() -> None:
    torch.manual_seed(2)
    block = VanBlock(6, 2, 0.0, 0.0).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    w = dict(block.named_parameters())
    x = torch.randn(2, 6, 11, 9)

    def conv(values: Any, name: str, **options: Any) -> Any:
        return functional.conv2d(values, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def normed(values: Any, name: str) -> Any:
        # batch norm with the initial statistics: mean 0, variance 1
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return values / (1 + 1e-5) ** 0.5 * weight[:, None, None] + bias[:, None, None]

    n = normed(x, "norm1")
    u = functional.gelu(conv(n, "attn.proj_1"))
    gate = "attn.spatial_gating_unit"
    far = conv(conv(u, f"{gate}.conv0", padding=2, groups=6), f"{gate}.conv_spatial", padding=9, dilation=3, groups=6)
    attended = n + conv(u * conv(far, f"{gate}.conv1"), "attn.proj_2")
    y = x + w["layer_scale_1"][:, None, None] * attended
    hidden = conv(conv(normed(y, "norm2"), "mlp.fc1"), "mlp.dwconv.dwconv", padding=1, groups=12)
    y = y + w["layer_scale_2"][:, None, None] * conv(functional.gelu(hidden), "mlp.fc2")
    assert torch.allclose(block(x), y, atol=1e-5)


def test_intermediates_pruning_and_classifiers_are_those_of_timm() -> None:
    model = small()
    with torch.no_grad():
        last, maps = model.forward_intermediates(images())
        assert torch.equal(last, model.forward_features(images()))
        assert torch.equal(maps[-1], last)
        assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 16), (8, 8, 8), (16, 4, 4), (24, 2, 2)]
        pooled = model.forward_head(last, pre_logits=True)
        assert torch.allclose(pooled, last.mean((2, 3)), atol=1e-6)
        features = timm.create_model("van_b0", **SMALL, features_only=True, out_indices=(0, 2))
        assert [each.shape[1] for each in features(images())] == features.feature_info.channels() == [8, 16]
        model.prune_intermediate_layers([1])
        assert torch.equal(model.forward_intermediates(images(), [1], stop_early=True)[1][0], maps[1])
        model = small()
        model.reset_classifier(0)
        assert torch.allclose(model(images()), pooled, atol=1e-6)
    with pytest.raises(UsageError, match="output stride 32 only"):
        timm.create_model("van_b0", output_stride=16)
    with pytest.raises(UsageError, match="four stages"):
        timm.create_model("van_b0", widths=(8, 8), depths=(1, 1))


def test_checkpointing_changes_no_gradient_and_layer_decay_grows_with_depth() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    scale: dict[int, float] = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    places = ("patch_embed1.proj.weight", "block1.0.attn.proj_1.weight", "block3.1.mlp.fc1.weight", "head.weight")
    scales = [scale[id(model.get_parameter(place))] for place in places]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(places)


def test_attention_maps_are_learnt_on_it() -> None:
    model = create_model("van_b0", 4, 64, selector="cal", widths=(8, 8, 16, 24), depths=(1, 1, 1, 1)).eval()
    assert model(images()).shape == (2, 4)
