"""Class activation maps against values derived by hand, and which network gets which method."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from torch import nn

from animesion.errors import UsageError
from animesion_training.analysis import explain
from animesion_training.analysis.saliency import LAST, TOKENS, Recorded, grad_cam, layer_cam
from animesion_training.models import create_model

VIT: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}


class TwoLayers(nn.Module):
    """A convolution with ReLU, `A_1 = x` and `A_2 = ReLU(3 - x)`, then the mean of each and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 3.0]))
            self.fc.weight.copy_(torch.tensor([[2.0, -4.0], [-1.0, 8.0]]))

    def forward_features(self, x: Any) -> Any:
        return self.conv(x).relu()

    def forward(self, x: Any) -> Any:
        return self.fc(self.forward_features(x).mean((2, 3)))


def test_maps_of_two_layers_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    # A_1 = [[1, 2], [3, 4]], A_2 = [[2, 1], [0, 0]]; dy/dA = weight / 4 at each place
    recorded = Recorded(TwoLayers().eval(), x, torch.tensor([0]))
    assert list(recorded.maps) == [LAST]
    # 0.5 A_1 - 1 A_2 = [[-1.5, 0], [1.5, 2]]
    assert recorded.grad_cam().tolist() == [[[0.0, 0.0], [1.5, 2.0]]]
    # only the positive gradient: 0.5 A_1
    assert recorded.layer_cam().tolist() == [[[0.5, 1.0], [1.5, 2.0]]]
    # of class 1: -0.25 A_1 + 2 A_2 = [[3.75, 1.5], [-0.75, -1]]
    other = Recorded(TwoLayers().eval(), x, torch.tensor([1]))
    assert other.grad_cam().tolist() == [[[3.75, 1.5], [0.0, 0.0]]]
    assert other.layer_cam().tolist() == [[[4.0, 2.0], [0.0, 0.0]]]
    # logits are (2 * 2.5 - 4 * 0.75, -2.5 + 6) = (2, 3.5), so the map is of class 1 by default
    assert Recorded(TwoLayers().eval(), x).targets.tolist() == [1]


def test_gradcam_averages_gradients_and_layercam_does_not() -> None:
    activations = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    gradients = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[-1.0, -1.0], [3.0, -1.0]]]])
    # means are 1 and 0
    assert grad_cam(activations, gradients).tolist() == [[[1.0, 2.0], [3.0, 4.0]]]
    assert layer_cam(activations, gradients).tolist() == [[[4.0, 0.0], [3.0, 0.0]]]


def test_each_image_of_a_batch_has_its_own_map() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", 4, 64).eval()
    x = torch.randn(3, 3, 64, 64)
    targets = torch.tensor([2, 0, 1])
    together = Recorded(model, x, targets)
    for i in range(3):
        alone = Recorded(model, x[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(together.grad_cam()[i], alone.grad_cam()[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(together.layer_cam()[i], alone.layer_cam()[0], rtol=1e-3, atol=1e-4)
    # the last map has 64 px / 32 cells a side, too few to point at anything
    assert together.grad_cam(LAST).shape == (3, 2, 2)
    assert together.best == "layer2"
    assert together.grad_cam().shape == together.layer_cam().shape == (3, 8, 8)
    with pytest.raises(UsageError, match=r"ResNet has no feature map 'layer9': there are .*layer4"):
        together.grad_cam("layer9")


def test_a_last_map_of_seven_cells_is_read() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", 4, 224).eval()
    assert Recorded(model, torch.randn(1, 3, 224, 224)).best == LAST


def test_recording_leaves_the_network_as_it_was() -> None:
    model = create_model("vit_tiny_patch16", 3, 32, adapter="lora", **VIT).eval()
    resnet = create_model("resnet18", 3, 64).eval()
    before = [set(vars(each)) for each in (model, resnet)]
    for each, side in ((model, 32), (resnet, 64)):
        x = torch.randn(1, 3, side, side)
        with torch.inference_mode():  # as where images are predicted
            plain = each(x)
            Recorded(each, x)
            torch.testing.assert_close(each(x), plain)
        assert not any(module._forward_hooks for module in each.modules())
        assert all(parameter.grad is None for parameter in each.parameters())
    assert [set(vars(each)) for each in (model, resnet)] == before
    assert not len(model.plugins.keys() - {"lora"}) or "places_recorder" not in model.plugins


def test_the_map_of_a_class_token_is_read_in_front_of_the_last_attention() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16", 3, 32, **VIT).eval()
    recorded = Recorded(model, torch.randn(2, 3, 32, 32))
    assert LAST not in recorded.maps  # the patches of the last map have no gradient
    assert recorded.best == TOKENS
    assert recorded.grad_cam().shape == (2, 2, 2)


def test_dropped_patches_have_no_part_in_the_map() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"reduction": "topk", "keep_rate": 0.25, "reduction_layers": [1], **VIT}
    model = create_model("vit_tiny_patch16", 3, 64, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        kept = model.trace(x)[1].trace["block1.kept_idx"][0]
    activations, _ = Recorded(model, x).maps[TOKENS]
    alive = activations[0].abs().sum(0).flatten() > 0
    assert alive.nonzero().flatten().tolist() == sorted(kept.tolist())


#: Family -> a small network of it, its size and its arguments.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet18", 64, {}),
    "lrnet": ("lrnet14", 64, {}),
    "vitfs": ("vitfs_nano_patch16", 64, {"depth": 2}),
    "vitfs-original": ("vitfs_nano_patch16", 64, {"depth": 2, "reference_compat": True}),
    "vit": ("vit_tiny_patch16", 64, VIT),
    "vit-ifa": ("vit_tiny_patch16_ifa", 64, VIT),
    "vit-average": ("vit_tiny_patch16", 64, {**VIT, "global_pool": "avg"}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, VIT),
    "beit": ("beit_base_patch16_224", 64, VIT),
    "convnext": ("convnext_atto", 64, {"depths": (1, 1, 1, 1)}),
    "efficientnet": ("tf_efficientnet_lite0", 64, {}),
    "mobilenet": ("mobilenetv3_small_050", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "densenet": ("densenet121", 64, {"block_config": (1, 1, 1, 1)}),
    "swin": ("swin_tiny_patch4_window7_224", 64, {"depths": (1, 1, 1, 1), "window_size": 2}),
    "pvt": ("pvt_v2_b0", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"depth": 2, "init_values": 1.0}),
    "mixer": ("mixer_s32_224", 64, {}),
    "poolformer": ("poolformer_s12", 64, {}),
    "cal": ("resnet18", 64, {"selector": "cal"}),
    "cal-vit": ("vit_tiny_patch16", 64, {**VIT, "selector": "cal"}),
    "glsim": ("vit_tiny_patch16", 64, {**VIT, "selector": "glsim"}),
    "rams": ("vit_tiny_patch16", 64, {**VIT, "selector": "rams"}),
    "transfg": ("vit_tiny_patch16", 64, {**VIT, "selector": "transfg"}),
    "ila": ("vit_tiny_patch16", 96, {**VIT, "adapter": "ila"}),
    "prompts": ("vit_tiny_patch16", 64, {**VIT, "adapter": "vpt-deep"}),
    "tome": ("vit_tiny_patch16", 64, {**VIT, "reduction": "tome", "keep_rate": 0.5, "reduction_layers": [1]}),
    "sit": ("vit_tiny_patch16", 64, {**VIT, "reduction": "sit", "keep_rate": 0.5, "reduction_layers": [1]}),
}
#: Families -> methods that they have, in the order of preference.
EXPECTED = {
    "resnet": ["gradcam", "layercam"],
    "lrnet": ["gradcam", "layercam"],
    "vitfs": ["rollout", "gradcam", "layercam"],
    "vit": ["rollout", "gradcam", "layercam"],
    "vit-ifa": ["rollout", "gradcam", "layercam"],
    "swin": ["gradcam", "layercam"],
    "cal": ["selection", "gradcam", "layercam"],
    "glsim": ["selection", "rollout", "gradcam", "layercam"],
    "ila": ["rollout", "gradcam", "layercam"],
    "prompts": ["rollout", "gradcam", "layercam"],
    "tome": ["selection", "rollout", "gradcam", "layercam"],
    "sit": ["selection", "gradcam", "layercam"],
    "transfg": [],
}


def perturbed(name: str, size: int, options: dict[str, Any]) -> Any:
    """A network whose classifier is not zero, as that of some families is before training."""
    torch.manual_seed(0)
    model = create_model(name, 5, size, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # more for the head of IFA, whose ReLU is dead where all class tokens are alike
            parameter.add_((0.2 if "ifa" in name else 0.02) * torch.randn_like(parameter))
    return model


def maps_or_refusal(model: Any, size: int) -> list[str]:
    """Methods of a network, after a look at the map of each; or the check of a refusal in one sentence."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = explain.available(model)
    for method in found:
        if method == "selection":
            continue
        values = explain.saliency_map(model, x, 1, method)
        assert values.dim() == 2
        assert min(values.shape) > 1
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert method != "rollout" or values.sum() <= 1 + 1e-4
    if not found:
        with pytest.raises(UsageError) as refused:
            explain.choose(model)
        assert str(refused.value).count(". ") == 0
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_map_or_a_refusal(family: str) -> None:
    name, size, options = FAMILIES[family]
    found = maps_or_refusal(perturbed(name, size, options), size)
    if family in EXPECTED:
        assert found == EXPECTED[family]
    else:
        assert found


@pytest.mark.slow
def test_every_registered_family_has_a_map_or_a_refusal() -> None:
    """One small network of each module of timm and of ours that has registered networks."""
    order = ("atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "mini", "_t0", "_s0", "_b0", "18", "small", "")
    without: list[str] = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        rank = {name: next(i for i, word in enumerate(order) if word in name) for name in names}
        name = min(names, key=lambda each: (rank[each], len(each), each))
        config = timm.get_pretrained_cfg(name)
        size = config.input_size[1] if config and config.fixed_input_size else 96
        if size > 256:
            continue
        try:
            model = timm.create_model(name, num_classes=5).eval()
        except (RuntimeError, TypeError, OSError, AssertionError):  # needs a package, or several inputs
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        try:
            with torch.no_grad():  # some networks keep tensors that they compute
                model(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError):  # windows that do not divide this size
            size = config.input_size[1]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
        if not maps_or_refusal(model, size):
            without.append(name)
    assert len(without) < 12, without


def test_an_image_that_nothing_speaks_for_has_an_empty_map() -> None:
    model = TwoLayers().eval()
    with torch.no_grad():
        model.fc.weight.zero_()
    recorded = Recorded(model, torch.ones(1, 1, 2, 2))
    assert recorded.silent
    assert not recorded.grad_cam().any()


def test_the_method_is_chosen_and_named() -> None:
    resnet = create_model("resnet18", 3, 64).eval()
    assert explain.choose(resnet)[1].startswith("gradcam: ResNet has a feature map")
    assert explain.choose(create_model("vit_tiny_patch16", 3, 32, **VIT).eval())[0] == "rollout"
    with pytest.raises(UsageError, match=r"--method rollout: ResNet is no transformer.*there is gradcam, layercam"):
        explain.choose(resnet, "rollout")
    with pytest.raises(UsageError, match="--method selection: ResNet selects no parts or patches itself"):
        explain.choose(resnet, "selection")
