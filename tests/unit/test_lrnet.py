"""LRNet as a model of timm: the checks of timm's own tests, published costs, and checkpoints of the original."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.optim import param_groups_layer_decay

import animesion_training.models.lrnet  # noqa: F401  (registers the names)
from animesion.errors import UsageError
from animesion_training import create_model, from_reference, load_model, save_model
from animesion_training.analysis.profile import count

NAMES = [f"lrnet{size}{kind}" for size in (14, 18, 26, 50) for kind in ("", "d")]
NARROW = {"channels": (8, 8, 16, 32, 64), "stem_width": 4, "deep_stem_width": 6}

#: Parameters in millions, then multiply-adds in billions at 32, 64, 128 and 224 pixels, for 200 classes.
COSTS = {
    "lrnet14": "5.136 .0357 .1425 .570 1.745",
    "lrnet18": "5.505 .0593 .2369 .947 2.901",
    "lrnet26": "8.964 .0782 .3117 1.246 3.813",
    "lrnet50": "21.662 .1272 .5078 2.030 6.215",
    "lrnet14d": "5.144 .0377 - .602",
    "lrnet18d": "5.513 .0613 - .979",
    "lrnet50d": "21.67 .1292 - 2.061",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are slower on several threads, especially when other jobs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(name, **options):
    torch.manual_seed(3)
    return timm.create_model(name, num_classes=5, **(NARROW | options))


def trained(name, **options):
    """Random weights: with the last batch norms at zero, most of an initial network has no effect."""
    model = narrow(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_images(height, width=None, batch=2):
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(4))


def one_in_the_last_digit(text):
    return pytest.approx(float(text), abs=1.01 * 10 ** -len(text.partition(".")[2]))


@pytest.mark.parametrize("name", COSTS)
def test_published_costs(name):
    published, *at_sizes = COSTS[name].split()
    with torch.device("meta"):  # counting needs shapes only
        model = create_model(name, 200)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == one_in_the_last_digit(published)
    for side, multiply_adds in zip((32, 64, 128, 224), at_sizes, strict=False):
        if multiply_adds != "-":
            assert count(model, (side, side)).multiply_adds / 1e9 == one_in_the_last_digit(multiply_adds)


def test_timm_lists_and_describes_the_names():
    assert set(NAMES) <= set(timm.list_models("lrnet*"))
    for name in NAMES:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        cfg, weights = model.default_cfg, model.state_dict()
        assert cfg["input_size"] == (3, 128, 128)
        assert weights[f"{cfg['first_conv']}.weight"].shape[1] == 3
        assert weights[f"{cfg['classifier']}.weight"].shape[0] == 10
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("name", NAMES)
def test_any_image_from_32_pixels_gives_finite_logits_and_gradients(name):
    model = narrow(name)
    for height, width in ((32, 32), (33, 64), (75, 130)):
        images = random_images(height, width)
        assert model.forward_features(images).shape[2:] == (-(-height // 32), -(-width // 32))
        logits = model(images)
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_smaller_images_are_refused_with_a_sentence():
    model = narrow("lrnet14").eval()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UsageError, match="at least 32 pixels per side, got 64 by 31"):
            call(random_images(64, 31))


@pytest.mark.parametrize("name", ["lrnet14", "lrnet26d"])
def test_the_classifier_can_be_replaced_and_pooling_turned_off(name):
    model = trained(name).half().float()
    images = random_images(64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.allclose(model.forward_head(features, pre_logits=True), features.mean((2, 3)), atol=1e-6)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.double().reset_classifier(7, "catavgmax")
    assert model(images.double()).shape == (2, 7)
    assert model.head_hidden_size == 2 * model.num_features
    assert model.num_classes == 7


@pytest.mark.parametrize("name", ["lrnet14", "lrnet14d", "lrnet26"])
def test_feature_extraction_gives_the_described_channels_and_strides(name):
    wide = 4 if name == "lrnet26" else 1
    extractor = narrow(name, features_only=True).eval()
    assert extractor.feature_info.channels() == [8 * wide, 8 * wide, 16 * wide, 32 * wide, 64 * wide]
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    maps = extractor(random_images(64, 96))
    for reduction, channels, each in zip(
        extractor.feature_info.reduction(), extractor.feature_info.channels(), maps, strict=True
    ):
        assert each.shape == (2, channels, 64 // reduction, 96 // reduction)
    chosen = narrow(name, features_only=True, out_indices=(1, -1)).eval()
    for each, again in zip((maps[1], maps[4]), chosen(random_images(64, 96)), strict=True):
        assert torch.equal(each, again)


def test_intermediates_are_the_stages_and_end_in_the_features():
    model = trained("lrnet18")
    images = random_images(64)
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, model.forward_features(images))
    assert torch.equal(maps[-1], last)
    assert [each.shape[1] for each in maps] == [info["num_chs"] for info in model.feature_info]
    early, some = model.forward_intermediates(images, indices=[0, 2], stop_early=True)
    assert torch.equal(early, maps[2])
    assert [torch.equal(each, maps[place]) for each, place in zip(some, (0, 2), strict=True)] == [True, True]
    assert len(model.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    with pytest.raises(UsageError, match="NCHW, not as NLC"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_pruning_keeps_what_the_chosen_intermediates_need():
    model = trained("lrnet14")
    images = random_images(64)
    wanted = model.forward_intermediates(images, indices=[1, 2], intermediates_only=True)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    assert sum(parameter.numel() for parameter in model.parameters()) < before / 4
    kept = model.forward_intermediates(images, indices=[1, 2], intermediates_only=True)
    assert all(map(torch.equal, wanted, kept))
    assert model.num_features == 16
    assert torch.equal(model(images), wanted[-1])


@pytest.mark.parametrize("name", ["lrnet14d", "lrnet26"])
def test_script_graph_and_export_compute_the_same(name):
    model = trained(name, drop_path_rate=0.1)
    images = random_images(64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of torch
        ways = {
            "torchscript": torch.jit.script(model),
            "fx": torch.fx.symbolic_trace(model),
            "export": torch.export.export(model, (images,)).module(),
        }
    for way in ways.values():
        assert torch.allclose(way(images), model(images), atol=1e-6)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        model = trained("lrnet26").train()
        model.set_grad_checkpointing(enable)
        model(random_images(64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients, strict=True))


def test_stochastic_depth_grows_linearly_over_the_blocks():
    model = trained("lrnet18", drop_path_rate=0.7)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4, model.layer5)
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for stage in stages for block in stage]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    model.train()
    assert not torch.equal(model(random_images(32)), model(random_images(32)))


def test_fresh_blocks_pass_their_shortcut_on_and_convolutions_start_from_kaiming():
    torch.manual_seed(0)
    model = timm.create_model("lrnet14")
    assert all(not stage[-1].bn2.weight.any() for stage in (model.layer1, model.layer5))
    assert model.layer5[0].conv2.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_the_d_variants_pool_in_shortcuts_and_have_a_deep_stem():
    model = narrow("lrnet14d")
    assert [each.kernel_size for each in model.conv1 if isinstance(each, torch.nn.Conv2d)] == [(3, 3)] * 3
    assert isinstance(model.layer2[0].downsample[0], torch.nn.AvgPool2d)
    same = narrow("lrnet14", resnet_d=True)
    assert same.state_dict().keys() == model.state_dict().keys()


def test_layer_decay_grows_from_the_stem_to_the_classifier():
    model = narrow("lrnet14")
    scale: dict[int, float] = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    places = ("conv1.weight", "layer1.0.conv1.weight", "layer2.1.conv1.weight", "layer5.0.conv1.weight", "fc.weight")
    scales = [scale[id(model.get_parameter(place))] for place in places]
    assert scales == sorted(scales)
    assert len(set(scales)) > 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block": "wide"}, "no block 'wide'"),
        ({"layers": (1, 2, 1, 1)}, "five stages"),
        ({"channels": (8, 8, 16, 32, 0)}, "five stages"),
        ({"output_stride": 16}, "output stride 32 only"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        timm.create_model("lrnet14", **options)


def test_grey_images_are_accepted():
    model = narrow("lrnet14d", in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


# -- the original's checkpoints ---------------------------------------------------------------------------------------


def as_a_student(weights):
    names = {key: key.replace("fc.", "dfsm.1.") if key.startswith("fc.") else f"encoder.{key}" for key in weights}
    return {f"model.{names[key]}": value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lrnet14", {}),
        ("lrnet50d", {}),
        ("lrnet14", {"layers": (3, 3, 3, 4, 3)}),  # the original's lrnet34
        ("lrnet26", {"in_chans": 4}),
    ],
)
def test_a_students_checkpoint_computes_the_same_and_can_be_saved(name, options, tmp_path):
    model = trained(name, **options)
    images = torch.randn(2, options.get("in_chans", 3), 64, 64)
    config = {"model_name": name, "image_size": 448, "student_image_size": 64, "custom_mean_std": True}
    again = from_reference(config, as_a_student(model.state_dict()))
    assert not again.training
    assert torch.equal(again(images), model(images))
    assert again.spec.name == name
    assert again.spec.img_size == 64
    save_model(again, tmp_path / "model.safetensors")
    loaded, card = load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), model(images))
    assert card.mean == (0.5, 0.5, 0.5)


def test_a_bare_checkpoint_of_published_size_needs_no_options():
    torch.manual_seed(0)
    model = timm.create_model("lrnet14", num_classes=3).eval()
    again = from_reference({}, model.state_dict())
    assert (again.spec.name, again.spec.options, again.spec.img_size) == ("lrnet14", {}, 128)
    assert again.pretrained_cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert torch.equal(again(random_images(32)), model(random_images(32)))


def test_checkpoints_with_other_parameters_are_refused_by_name():
    weights = as_a_student(narrow("lrnet14").state_dict())
    with pytest.raises(UsageError, match=r"do not match the LRNet: attention\.weight"):
        from_reference({}, weights | {"model.encoder.attention.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"lacks layer3\.0\.conv1\.weight"):
        from_reference({}, {key: value for key, value in weights.items() if "layer3.0.conv1" not in key})
    with pytest.raises(UsageError, match=r"lacks fc\.weight"):
        from_reference({}, {key: value for key, value in weights.items() if "dfsm" not in key})
    with pytest.raises(UsageError, match=r"has fc\.weight twice"):
        from_reference({}, weights | {"model.encoder.fc.weight": torch.zeros(2)})
