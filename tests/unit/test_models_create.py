"""Networks by name: the baselines, their heads, any image size, and their interface to timm."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.optim import param_groups_layer_decay

from animesion.errors import UsageError
from animesion_training import create_model
from animesion_training.models import (
    BASELINES,
    CosineHead,
    IFAHead,
    exclusion_loss,
    head_parameters,
    input_config,
    spec_of,
)

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def small_vit(**arguments):
    return create_model("vit_tiny_patch16", 5, 64, **{**SMALL, **arguments})


def test_importing_the_package_imports_no_torch():
    code = "import sys, animesion_training; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_every_baseline_is_a_model_of_timms():
    assert all(timm.is_model(name) for name in BASELINES.values())
    for short in BASELINES:
        with torch.device("meta"):
            assert create_model(short, 7, 128).num_classes == 7


def test_timm_lists_and_builds_our_models():
    names = timm.list_models("*ifa*")
    assert {"vit_base_patch16_ifa", "vit_large_patch16_ifa", "vit_base_patch32_ifa"} <= set(names)
    model = timm.create_model("vit_tiny_patch16_ifa", num_classes=4, img_size=32, **SMALL)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert model.pretrained_cfg["architecture"] == "vit_tiny_patch16_ifa"
    assert timm.list_pretrained("vit_base_patch16_ifa.*")


@pytest.mark.parametrize(
    ("name", "size", "head", "options"),
    [
        ("resnet18", (33, 47), "linear", {}),
        ("resnet18", 32, "cosine", {}),
        ("vit_tiny_patch16", 48, "linear", SMALL),
        ("vit_tiny_patch16", (32, 64), "ifa", SMALL),
        ("vit_tiny_patch16", 50, "cosine", SMALL),
        ("vit_tiny_patch16_ifa", 32, "linear", SMALL),
        ("deit3_small_patch16_224", 32, "ifa", SMALL),
        ("vit_small_patch14_reg4_dinov2", 28, "ifa", SMALL),
    ],
)
def test_any_size_and_head_classifies_and_trains(name, size, head, options):
    torch.manual_seed(0)
    model = create_model(name, 5, size, head, **options)
    height, width = input_config(model).size
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 5)
    assert model.num_classes == 5
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
    # every parameter has a gradient, which data-parallel training needs
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert 0 < sum(1 for _ in head_parameters(model)) < len(list(model.parameters()))


def test_ifa_reads_the_class_token_of_each_block_before_any_norm():
    torch.manual_seed(0)
    model = small_vit(head="ifa").eval()
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out[:, 0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        logits = model(torch.randn(2, 3, 64, 64))
        head = model.head
        mixed = sum(weight * token for weight, token in zip(head.layers.weight[0], seen, strict=True))
        mixed = torch.relu(mixed + head.layers.bias)
        centred = mixed - mixed.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * head.norm.weight + head.norm.bias
        expected = normed @ head.fc.weight.T + head.fc.bias
    assert torch.allclose(logits, expected, atol=1e-5)


def test_ifa_head_has_as_many_parameters_as_published():
    assert sum(parameter.numel() for parameter in IFAHead(12, 768, 200).parameters()) == 155_349


def test_exclusion_loss_is_zero_for_equal_tokens_and_follows_its_formula():
    same = torch.randn(2, 6, 1).expand(2, 6, 5)
    assert exclusion_loss(same).abs() < 1e-6
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        far, near = (torch.softmax(tokens[:, :, j] / 2.0, 1) for j in (i + 2, i))
        total += (far * (far.log() - near.log())).sum(1).mean()
    assert exclusion_loss(tokens, temperature=2.0).item() == pytest.approx(4 * total.item(), rel=1e-4)
    assert exclusion_loss(tokens[..., :2]).item() == 0


def test_cosine_head_ignores_lengths_and_stays_within_its_scale():
    head = CosineHead(8, 4, scale=30.0, learn_scale=False)
    features = torch.randn(16, 8)
    assert torch.allclose(head(features), head(7 * features), atol=1e-4)
    assert head(features).abs().max() <= 30.0 + 1e-4
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert {name for name, _ in CosineHead(8, 4).named_parameters()} == {"weight", "scale"}


def test_layer_decay_groups_cover_an_ifa_model():
    model = small_vit(head="ifa")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(value): (group["lr_scale"], group["weight_decay"]) for group in groups for value in group["params"]}
    rates = [scale[id(block.attn.qkv.weight)][0] for block in model.backbone.blocks]
    assert rates == sorted(rates)
    assert len(set(rates)) == 3
    assert scale[id(model.head.fc.weight)][0] == 1.0
    assert scale[id(model.backbone.pos_embed)][1] == 0.0


def test_gradient_checkpointing_changes_nothing():
    model = small_vit(head="ifa").train()
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    model.set_grad_checkpointing(True)
    assert torch.equal(plain, model(images))


def test_a_models_spec_builds_it_again():
    model = create_model("vit_tiny_patch16", 5, (32, 64), "ifa", norm_eps=1e-12, **SMALL)
    spec = spec_of(copy.deepcopy(torch.nn.DataParallel(model)))
    again = spec.build()
    assert spec == spec_of(again)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert again.backbone.blocks[0].norm1.eps == 1e-12
    assert model.pretrained_cfg["input_size"] == (3, 32, 64)
    with pytest.raises(UsageError, match="create_model"):
        spec_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("resnet81", 5), {}, "did you mean 'resnet18'"),
        (("resnet18.nothing", 5), {}, "no weights tagged 'nothing'"),
        (("hf-hub:timm/resnet18", 5), {}, "pretrained=PATH"),
        (("resnet18", -1), {}, "num_classes"),
        (("resnet18", 5, 0), {}, "img_size"),
        (("resnet18", 5, 32, "round"), {}, "linear, cosine, ifa"),
        (("resnet18", 5, 32, "ifa"), {}, "ResNet has no class token"),
        (("vit_base_patch16_siglip_224", 5, 32, "ifa"), SMALL, "needs a class token"),
        (("vit_tiny_patch16", 5, 8), SMALL, "img_size=8"),
        (("resnet18", 5, 32, "cosine"), {"head_options": {"margin": 1}}, "no option margin"),
        (("resnet18", 5, 32, "cosine"), {"head_options": {"scale": -1}}, "positive scale"),
        (("resnet18", 5, 32), {"head_options": {"scale": 1}}, "has no options"),
        (("resnet18", 5, 32), {"colour": 1}, "colour=1"),
        (("resnet18", 5, 32), {"checkpoint_path": "x.pth"}, "checkpoint_path"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(arguments, options, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        create_model(*arguments, **options)
    assert "\n" not in str(caught.value)
