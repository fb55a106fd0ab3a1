from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training import from_reference, load_model, save_model
from animesion_training.data import views
from animesion_training.data.seeds import FAKE, tensor_uniforms
from animesion_training.losses.cal import FeatureCenters, cal_loss, center_loss
from animesion_training.models import create_model, head_parameters, load_weights
from animesion_training.models.cal import CALClassifier, CALHead, CALOutput

#: Channels first and last, tokens with and without prefix, norms after pooling, heads with their own layers.
BACKBONES = {
    "resnet10t": 512,
    "mobilenetv3_small_050": 288,
    "convnext_atto": 320,
    "vit_tiny_patch16_224": 192,
    "deit_tiny_distilled_patch16_224": 192,
    "eva02_tiny_patch14_224": 192,
    "swin_tiny_patch4_window7_224": 768,
    "mambaout_femto": 288,
    "mixer_s32_224": 512,
    "pvt_v2_b0": 256,
}
#: A small vision transformer.
SMALL: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classifier(num_classes: int = 5, **options: Any) -> CALClassifier:
    torch.manual_seed(0)
    return CALClassifier(timm.create_model("resnet10t", num_classes=3), num_classes, num_maps=4, **options)


def trained(model: Any) -> Any:
    """Update running statistics with some batches, for evaluation."""
    model.train()
    for seed in range(3):
        model(random(4, 3, 64, 64, seed=seed))
    return model.eval()


# -- the head --------------------------------------------------------------------------------------------------------


def test_the_head_by_hand() -> None:
    head = CALHead(3, 2, num_maps=2).eval()
    features = random(1, 3, 4, 5)
    output = head(features)
    weight = head.attentions.conv.weight[:, :, 0, 0]
    attention = ((weight @ features[0].flatten(1)) / (1 + 1e-3) ** 0.5).relu()
    torch.testing.assert_close(output.attention[0].flatten(1), attention)
    pooled = torch.stack([(attention[m] * features[0, c].flatten()).mean() for m in range(2) for c in range(3)])
    rooted = pooled.sign() * (pooled.abs() + 1e-6).sqrt()
    torch.testing.assert_close(output.features[0], rooted / rooted.norm())
    torch.testing.assert_close(output.logits[0], head.fc.weight @ (100 * rooted / rooted.norm()))


def test_the_effect_is_measured_against_the_given_attention() -> None:
    head = CALHead(3, 4, num_maps=2)
    features, fake = random(2, 3, 4, 4), random(2, 2, 4, 4).abs()
    output = head(features, fake)
    torch.testing.assert_close(output.effect, output.logits - head.classify(head.pool(features, fake)))
    itself = head(features, output.attention)
    assert not itself.effect.any()


def test_in_evaluation_the_fake_attention_is_1_and_in_training_it_is_drawn() -> None:
    head, features = CALHead(3, 4, num_maps=2), random(2, 3, 4, 4)
    head.eval()
    assert torch.equal(head(features).effect, head(features, torch.ones(2, 2, 4, 4)).effect)
    head.train()
    torch.manual_seed(7)
    drawn = head(features).effect
    torch.manual_seed(7)
    fake = 2 * torch.rand(2, 2, 4, 4)
    assert torch.equal(drawn, head(features, fake).effect)
    assert not torch.equal(drawn, head(features).effect)


def test_the_fake_attention_does_not_depend_on_the_memory_format() -> None:
    head, features = CALHead(3, 4, num_maps=2), random(2, 3, 4, 4)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(7)
        found.append(head(features.contiguous(memory_format=layout)).effect)
    torch.testing.assert_close(*found)


def test_features_have_length_1_in_float32_under_autocast_too() -> None:
    head, features = CALHead(3, 4, num_maps=2), random(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(1e4 * features)
    assert output.features.dtype == torch.float32
    torch.testing.assert_close(output.features.norm(dim=1), torch.ones(2))
    assert all(each.isfinite().all() for each in output)


def test_a_map_of_zeros_and_one_class_stay_finite() -> None:
    head = CALHead(3, 1, num_maps=2).eval()
    features = torch.zeros(1, 3, 4, 4, requires_grad=True)
    output = head(features)
    (output.logits.sum() + output.effect.sum()).backward()
    assert all(each.isfinite().all() for each in output)
    assert features.grad is not None
    assert features.grad.isfinite().all()


# -- on timm's networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_timms_networks_support_the_head(name: str) -> None:
    with torch.device("meta"):
        model = CALClassifier(timm.create_model(name, num_classes=9), 7, num_maps=4)
        output = model.forward_parts(torch.empty(2, 3, 224, 224))
    assert model.head.in_features == BACKBONES[name]
    assert output.logits.shape == output.effect.shape == (2, 7)
    assert output.features.shape == (2, 4 * BACKBONES[name])
    rows, columns = output.attention.shape[2:]
    assert output.attention.shape[:2] == (2, 4)
    assert rows == columns > 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}),
        ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    ],
)
def test_maps_have_the_layout_of_timm(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, **options).eval()
    side, normed = options.get("img_size", 224), not name.startswith("hiera")
    images = random(1, 3, side, side)
    with torch.no_grad():
        [expected] = backbone.forward_intermediates(images, indices=1, norm=normed, intermediates_only=True)
        found = CALClassifier(backbone, 3).eval().feature_map(images)
    torch.testing.assert_close(found, expected)


def test_images_need_not_be_square() -> None:
    with torch.device("meta"):
        vit = CALClassifier(timm.create_model("vit_tiny_patch16_224", img_size=(100, 60)), 3)
        assert vit.forward_parts(torch.empty(2, 3, 100, 60)).attention.shape[2:] == (6, 3)
        vit.set_input_size(img_size=(64, 96))
        assert vit.forward_parts(torch.empty(2, 3, 64, 96)).attention.shape[2:] == (4, 6)
        cnn = CALClassifier(timm.create_model("resnet10t"), 3)
        assert cnn.forward_parts(torch.empty(2, 3, 64, 160)).attention.shape[2:] == (2, 5)
        windows = CALClassifier(timm.create_model("maxvit_rmlp_pico_rw_256", img_size=(192, 192)), 3)
        assert windows.head.in_features == 256


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    options = SMALL if name.startswith("vit") else {}
    model = CALClassifier(timm.create_model(name, **options), 5, num_maps=4)
    output = model.forward_parts(random(4, 3, 32, 32))
    (functional.cross_entropy(output.effect, torch.arange(4)) + output.logits.square().mean()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_frozen_backbone_keeps_its_layers() -> None:
    backbone = timm.create_model("resnet10t").requires_grad_(False)
    images = random(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.eval().forward_features(images)
        assert torch.equal(CALClassifier(backbone, 5).eval().feature_map(images), expected)


def test_the_norm_after_pooling_is_applied_to_each_patch() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", **SMALL, global_pool="avg", class_token=False)
    model = CALClassifier(backbone, 3)
    features = model.eval().feature_map(random(2, 3, 32, 32))
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 2, 2), rtol=0, atol=1e-5)


class Flat(nn.Module):
    """Has timm's methods, but no map."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        pass

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)))


def test_networks_without_a_map_are_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"Flat has no feature map to attend to: its features are \(2, 4\)"):
        CALClassifier(Flat(), 5)
    with pytest.raises(UsageError, match="CrossVit does not work without pooling"), torch.device("meta"):
        CALClassifier(timm.create_model("crossvit_9_240"), 5)
    with pytest.raises(UsageError, match="Linear has no forward_features"):
        CALClassifier(nn.Linear(3, 4), 5)
    with pytest.raises(UsageError, match="raw, single, full"):
        classifier(views="half")
    with pytest.raises(UsageError, match="num_maps"):
        CALClassifier(timm.create_model("resnet10t"), 5, num_maps=0)


# -- as a model of timm ----------------------------------------------------------------------------------------------


def test_forward_returns_the_logits_of_forward_parts() -> None:
    model, images = classifier().eval(), random(2, 3, 64, 64)
    parts = model.forward_parts(images)
    assert torch.equal(model(images), parts.logits)
    assert torch.equal(model(images, parts=True).effect, parts.effect)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), parts.logits)
    assert torch.equal(model.forward_head(features, pre_logits=True), parts.features)


def test_a_plain_forward_in_training_draws_nothing() -> None:
    model, images = classifier().train(), random(2, 3, 64, 64)
    before = torch.get_rng_state()
    model(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_number_of_classes_gets_a_new_head() -> None:
    model = classifier(5)
    assert model.get_classifier() is model.head
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model.eval()(random(1, 3, 64, 64)).shape == (1, 9)
    assert len(list(head_parameters(model))) == 4
    with pytest.raises(UsageError, match="cannot pool by 'avg'"):
        model.reset_classifier(9, "avg")
    model.reset_classifier(0)
    assert model(random(1, 3, 64, 64)).shape == (1, 4 * 512)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_layer_decay_and_weight_decay_reach_the_backbones_layers(name: str) -> None:
    host = timm.create_model(name)
    model = CALClassifier(timm.create_model(name), 5)
    groups = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    groups = create_optimizer_v2(host, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    names = {id(p): key for key, p in host.named_parameters()}
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    own = dict(model.named_parameters())
    found = {key: scales[id(own[f"backbone.{key}"])] for key in expected if f"backbone.{key}" in own}
    assert found == {key: expected[key] for key in found}
    assert len({scale for scale, _ in found.values()}) > 3
    assert scales[id(model.head.fc.weight)] == (1.0, 0.1)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for enable in (False, True):
        model = classifier().eval()
        model.set_grad_checkpointing(enable)
        model(random(2, 3, 64, 64)).square().sum().backward()
        found.append(model.backbone.layer1[0].conv1.weight.grad)
    torch.testing.assert_close(*found)


def test_weights_of_the_bare_backbone_have_no_head(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for name, options in (
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", SMALL),
        ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}),
    ):
        host = timm.create_model(name, num_classes=3, **options)
        save_file(host.state_dict(), tmp_path / "host.safetensors")
        model = CALClassifier(timm.create_model(name, num_classes=3, **options), 5)
        before = model.head.fc.weight.clone()
        sentence = load_weights(model, tmp_path / "host.safetensors")
        assert "3 classes" in sentence
        assert torch.equal(cast(Any, model.head).fc.weight, before)
        images = random(1, 3, 32, 32)
        same = CALClassifier(host, 5).eval().feature_map(images)
        assert torch.equal(model.eval().feature_map(images), same)


def test_a_saved_model_is_the_same_after_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(create_model("resnet10t", 3, 64, selector="cal", method_options={"selector": {"num_maps": 4}}))
    save_model(model, tmp_path / "teacher", ["a", "b", "c"], {})
    again, _ = load_model(tmp_path / "teacher")
    images = random(2, 3, 64, 64)
    assert torch.equal(again.eval()(images), model(images))


# -- evaluation with all views ---------------------------------------------------------------------------------------


def test_full_inference_is_the_mean_over_8_views_one_by_one() -> None:
    model = trained(classifier(views="full"))
    images = random(2, 3, 64, 96)
    with torch.no_grad():
        expected = []
        for image in images.split(1):
            for seen in (image, image.flip(3)):
                parts = model.forward_parts(seen)
                expected.append(parts.logits)
                for threshold, padding in ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05)):
                    box = views.crop_boxes(parts.attention.mean(1, keepdim=True), (64, 96), threshold, padding)
                    expected.append(model.forward_parts(views.crop(seen, box)).logits)
        found = model(images)
    means = torch.cat(expected).unflatten(0, (2, 8)).mean(1)
    torch.testing.assert_close(found, means, rtol=1e-4, atol=1e-4)
    assert model.train()(images).shape == (2, 5)  # training uses the images alone


# -- centers and loss ------------------------------------------------------------------------------------------------


def test_centers_are_read_before_they_move_and_the_last_of_a_class_counts() -> None:
    centers = FeatureCenters(3, 4)
    start = random(3, 4)
    centers.load_state_dict({"centers": start})
    features, targets = random(4, 4, seed=1), torch.tensor([2, 0, 2, 2])
    torch.testing.assert_close(centers(targets), functional.normalize(start, dim=1)[targets])
    assert torch.equal(centers.centers, start)
    centers.move(features, targets)
    unit = functional.normalize(start, dim=1)
    torch.testing.assert_close(centers.centers[2], start[2] + 0.05 * (features[3] - unit[2]))
    torch.testing.assert_close(centers.centers[0], start[0] + 0.05 * (features[1] - unit[0]))
    assert torch.equal(centers.centers[1], start[1])


def test_centers_start_at_0_and_absent_rows_move_none() -> None:
    centers = FeatureCenters(3, 4)
    assert not centers(torch.tensor([0, 2])).any()
    features, targets = random(5, 4), torch.tensor([-1, 2, 0, -1, -1])
    centers.move(features, targets)
    alone = FeatureCenters(3, 4)
    alone.move(features[1:3], targets[1:3])
    assert torch.equal(centers.centers, alone.centers)
    assert not centers.centers[1].any()


def test_the_fake_attention_of_an_image_follows_its_seed() -> None:
    model, images, seeds = classifier().eval(), random(4, 3, 64, 64), torch.tensor([5, 6, 7, -8])
    model.head.train().attentions.eval()  # batch norm would couple the images
    whole = model(images, parts=True, seeds=seeds).effect
    halves = [model(images[part], parts=True, seeds=seeds[part]).effect for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(halves))
    assert not torch.allclose(whole, model(images, parts=True, seeds=seeds + 1).effect)
    fakes = tensor_uniforms(seeds, 1000, FAKE) * 2
    assert 0 <= fakes.min() < 0.05
    assert 1.95 < fakes.max() <= 2


def test_the_loss_is_the_sum_of_its_terms_by_hand() -> None:
    outputs = [
        CALOutput(random(b, 5, seed=b), random(b, 5, seed=b + 1), functional.normalize(random(b, 8), dim=1), Tensor())
        for b in (3, 6)
    ]
    targets = torch.tensor([4, 0, 4])
    centers = FeatureCenters(5, 8)
    centers.load_state_dict({"centers": random(5, 8, seed=9)})
    read = functional.normalize(centers.centers.clone(), dim=1)[targets]
    raw, aug = outputs
    terms = cal_loss(raw, aug, targets, centers, label_smoothing=0.1)

    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=0.1)

    expected = {
        "label": entropy(raw.logits, targets) / 3,
        "views": entropy(aug.logits, targets.repeat(2)) * 2 / 3,
        "effect": entropy(torch.cat((raw.effect, aug.effect)), targets.repeat(3)),
        "center": (raw.features - read).square().sum() / 3,
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])


def test_a_step_on_the_loss_makes_it_smaller() -> None:
    model, images, targets = classifier(), random(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    centers, fake, wide = FeatureCenters(5, 4 * 512), torch.ones(4, 4, 2, 2), torch.ones(8, 4, 2, 2)

    def loss() -> Tensor:
        raw = model.forward_parts(images, fake)
        draws = views.draw(torch.arange(4), raw.attention)
        aug = model.forward_parts(views.views(images, raw.attention, draws), wide)
        return torch.stack(list(cal_loss(raw, aug, targets, centers).values())).sum()

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-3 * parameter.grad)
    assert loss() < before


def test_soft_labels_and_odd_numbers_of_views_are_refused() -> None:
    output = CALOutput(random(2, 3), random(2, 3), random(2, 4), Tensor())
    odd = CALOutput(random(3, 3), random(3, 3), random(3, 4), Tensor())
    centers = FeatureCenters(3, 4)
    with pytest.raises(UsageError, match="switch MixUp and CutMix off"):
        cal_loss(output, output, torch.full((2, 3), 1 / 3), centers)
    with pytest.raises(ValueError, match="is not a multiple of the number of images"):
        cal_loss(output, odd, torch.tensor([0, 1]), centers)
    with pytest.raises(UsageError, match="rate"):
        FeatureCenters(3, 4, rate=-1)
    assert center_loss(random(0, 4), random(0, 4)) == 0


# -- checkpoints of the original -------------------------------------------------------------------------------------


def originals(model: CALClassifier, encoder: str = "model.encoder.") -> dict[str, Tensor]:
    names = {"backbone.": encoder, "head.": "model.dfsm."}
    return {
        names[f"{key.partition('.')[0]}."] + key.partition(".")[2]: value for key, value in model.state_dict().items()
    }


def test_a_teacher_of_the_original_computes_the_same_and_can_be_saved(tmp_path: Path) -> None:
    model = trained(classifier())
    found = from_reference({"model_name": "resnet10t", "image_size": 96}, originals(model))
    images = random(2, 3, 96, 96)
    assert torch.equal(found(images), model(images))
    assert found.pretrained_cfg["input_size"] == (3, 96, 96)
    save_model(found, tmp_path / "teacher", list("abcde"), {})
    again, _ = load_model(tmp_path / "teacher")
    assert torch.equal(again.eval()(images), model(images))


def test_a_transformer_of_the_original_has_no_class_token() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, class_token=False, global_pool="")
    model = CALClassifier(backbone, 5).eval()
    config = {"model_name": "vit_tiny_patch16_224", "image_size": 32}
    found = from_reference(config, originals(model, "model.encoder.0."))
    images = random(2, 3, 32, 32)
    assert torch.equal(found(images), model(images))


def test_teachers_that_do_not_fit_are_refused_by_name() -> None:
    weights = originals(classifier())
    with pytest.raises(UsageError, match="needs model_name"):
        from_reference({}, weights)
    with pytest.raises(UsageError, match=r"efficientnet_b0 has 1280 channels.*512"):
        from_reference({"model_name": "efficientnet_b0"}, weights)
    with pytest.raises(UsageError, match=r"backbone\.layer1\.0\.bn1\.bias"):
        from_reference({"model_name": "resnet10t"}, {k: v for k, v in weights.items() if "layer1.0.bn1.bias" not in k})
    with pytest.raises(UsageError, match="beyond encoder and head: extra"):
        from_reference({"model_name": "resnet10t"}, {**weights, "model.extra": torch.zeros(1)})
