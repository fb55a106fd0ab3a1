"""ViTFS as a model of timm: the checks of timm's own tests, published costs, and checkpoints of the original."""

from __future__ import annotations

import math
import re
import warnings

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.optim import param_groups_layer_decay

import animesion_training.models.vitfs  # noqa: F401  (registers the names)
from animesion.errors import UsageError
from animesion_training import create_model, from_reference, load_model, save_model
from animesion_training.analysis.profile import count
from animesion_training.models.vitfs_layers import TokenBatchNorm, sincos_positions

NAMES = [f"vitfs_{size}_patch16" for size in ("nano", "micro", "tiny", "small", "base")]
LAYER_NORM = {"norm_layer": "layernorm"}
PLAIN = {"norm_layer": "layernorm", "reg_tokens": 0, "init_values": 0.0}
COMPAT = {"reference_compat": True}
STUDENT = {"reference_compat": True, "pool_include_prefix": True}
VARIANTS = [{}, LAYER_NORM, PLAIN, COMPAT, STUDENT, {"dca_blocks": 2}]

#: Parameters in millions, then multiply-adds in billions at 32, 64, 128, 224 and 448 pixels, for 200 classes.
COSTS = [
    ("nano", {}, "0.644 .0051 .0136 .052 .194 1.476"),
    ("micro", {}, "2.523 .0202 .0527 .192 .647 3.975"),
    ("tiny", {}, "5.639 .0451 .117 .419 1.359 7.496"),
    ("tiny", LAYER_NORM, "5.639 .0451 .117 .419 1.359 7.496"),
    ("tiny", PLAIN, "5.634 .0236 .0954 .396 1.330 7.446"),
    ("tiny", {"reg_tokens": 1}, "5.638 .029 - .401 1.337 7.458"),
    ("tiny", {"reg_tokens": 16}, "5.641 .110 - .491 1.445 7.648"),
    ("small", {}, "22.404 .179 .464 1.629 5.051 24.20"),
    ("small", {"reg_tokens": 16}, "22.409 .437 - 1.90 5.35 24.6"),
    ("small", {"reg_tokens": 64}, "22.427 1.496 - 3.01 6.58 26.4"),
    ("base", {}, "89.312 .716 1.846 6.419 19.43 85.21"),
    ("nano", {"dca_blocks": 5}, "0.645"),
    ("micro", {"dca_blocks": 5}, "2.526"),
    ("small", {"dca_blocks": 5}, "22.41"),
    ("base", {"dca_blocks": 5}, "89.33"),
    ("base", {"dca_blocks": 4}, "89.332"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are slower on several threads, especially when other jobs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shallow(**options):
    torch.manual_seed(3)
    return timm.create_model("vitfs_nano_patch16", num_classes=5, img_size=64, **({"depth": 4} | options))


def trained(**options):
    """Random weights: the initial LayerScale scales blocks to almost nothing, and running statistics are empty."""
    model = shallow(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.train()(random_images(64, batch=8))
    return model.eval()


def random_images(height, width=None, batch=2):
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(4))


def one_in_the_last_digit(text):
    return pytest.approx(float(text), abs=1.01 * 10 ** -len(text.partition(".")[2]))


@pytest.mark.parametrize(("size", "options", "costs"), COSTS)
def test_published_costs(size, options, costs):
    published, *at_sizes = costs.split()
    with torch.device("meta"):  # counting needs shapes only
        model = create_model(f"vitfs_{size}_patch16", 200, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == one_in_the_last_digit(published)
    for side, multiply_adds in zip((32, 64, 128, 224, 448), at_sizes, strict=False):
        if multiply_adds != "-":
            assert count(model, (side, side)).multiply_adds / 1e9 == one_in_the_last_digit(multiply_adds)


def test_timm_lists_and_describes_the_names():
    assert set(NAMES) <= set(timm.list_models("vitfs*"))
    for name in NAMES:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        cfg, weights = model.default_cfg, model.state_dict()
        assert cfg["input_size"] == (3, 224, 224)
        assert weights[f"{cfg['first_conv']}.weight"].shape[1] == 3
        assert weights[f"{cfg['classifier']}.weight"].shape == (10, model.num_features)
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        assert model.blocks[0].attn.head_dim == 64
        assert model.patch_embed.grid_size == (14, 14)


@pytest.mark.parametrize("options", VARIANTS)
def test_any_multiple_of_16_gives_finite_logits_and_gradients(options):
    model = shallow(**options)
    for height, width in ((48, 48), (64, 64), (32, 144)):
        images = random_images(height, width)
        assert model.forward_features(images).shape == (2, height * width // 256, 64)
        logits = model(images)
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_other_sizes_are_refused_with_a_sentence():
    model = shallow().eval()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UsageError, match="patches of 16 pixels, got 64 by 40"):
            call(random_images(64, 40))
    with pytest.raises(UsageError, match="img_size in multiples of 16 pixels, not 100 by 100"):
        create_model("vitfs_nano_patch16", 5, 100)
    with pytest.raises(UsageError, match="not 0 by 16"):
        model.set_input_size((0, 16))
    with pytest.raises(UsageError, match="patches of 16 pixels, and cannot change to 8"):
        model.set_input_size(patch_size=8)


def test_positions_are_the_formula_at_every_place_and_no_part_of_the_weights():
    height, width, dim = 3, 5, 16
    positions = sincos_positions(height, width, dim, torch.device("cpu"))
    assert positions.shape == (height, width, dim)
    for y in range(height):
        for x in range(width):
            for i in range(4):
                w = 10000 ** (-i / 3)
                wanted = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                assert positions[y, x, i::4].tolist() == pytest.approx(wanted, abs=1e-6)
    model = shallow()
    model.set_input_size((96, 128))
    assert model.patch_embed.grid_size == (6, 8)
    assert model.patch_embed.num_patches == 48
    assert model.state_dict().keys() == shallow().state_dict().keys()
    assert not any("pos" in key for key in model.state_dict())


def test_patches_get_their_positions_and_registers_get_none():
    model = trained()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = random_images(32, 48)
    model(images)
    patches = model.patch_embed(images)
    wanted = patches.permute(0, 2, 3, 1) + sincos_positions(2, 3, 64, images.device)
    assert torch.equal(seen[0][:, 4:], wanted.flatten(1, 2))
    assert torch.equal(seen[0][:, :4], model.reg_token.expand(2, -1, -1))


def test_all_patches_are_averaged_unless_the_originals_slice_is_requested():
    right, original, student = trained(), trained(**COMPAT), trained(**STUDENT)
    for model in (original, student):
        model.load_state_dict(right.state_dict())
    images = random_images(64)
    tokens = []
    right.blocks[-1].register_forward_hook(lambda *args: tokens.append(args[2]))
    features = right.forward_features(images)
    normed = right.norm(tokens[0])
    assert torch.allclose(features, normed[:, 4:], atol=1e-6)
    assert torch.allclose(right.forward_head(features, pre_logits=True), normed[:, 4:].mean(1), atol=1e-6)
    for model, pooled in ((original, normed[:, 4:16].mean(1)), (student, normed[:, :16].mean(1))):
        features = model.forward_features(images)
        assert torch.allclose(features, normed[:, :16], atol=1e-6)
        assert torch.allclose(model.forward_head(features, pre_logits=True), pooled, atol=1e-6)
        assert torch.equal(model(images), model.forward_head(features))
    assert (right.num_prefix_tokens, original.num_prefix_tokens) == (0, 4)


def test_the_originals_slice_leaves_no_patch_at_32_pixels():
    original = trained(**COMPAT)
    with pytest.raises(UsageError, match="keeps 4 tokens of an image this small, all of them registers"):
        original(random_images(32))
    assert trained(**STUDENT)(random_images(32)).isfinite().all()
    assert trained()(random_images(16)).isfinite().all()


def test_token_batch_norm_is_batch_norm_over_channels():
    ours, torchs = TokenBatchNorm(6), torch.nn.BatchNorm1d(6)
    x = torch.randn(3, 5, 6)
    for mode in (True, False):
        ours.train(mode)
        torchs.train(mode)
        assert torch.allclose(ours(x), torchs(x.transpose(1, 2)).transpose(1, 2), atol=1e-6)
    assert torch.allclose(ours.bn.running_var, torchs.running_var)
    assert isinstance(torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours).bn, torch.nn.SyncBatchNorm)


def test_aggregators_add_the_mix_of_the_blocks_before_them():
    model = trained(dca_blocks=2)
    outs, added = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: outs.append(args[2]))
    for aggregator in model.aggregators:
        aggregator.register_forward_hook(lambda *args: added.append((args[1][0], args[2])))
    enters = []
    model.blocks[2].register_forward_pre_hook(lambda _, args: enters.append(args[0]))
    features = model.forward_features(random_images(64))
    assert [len(outs), len(added)] == [4, 2]
    for j, (given, _) in enumerate(added):
        assert torch.equal(given, torch.stack(outs[2 * j : 2 * j + 2], dim=-1))
    assert torch.equal(enters[0], outs[1] + added[0][1])
    assert torch.allclose(features, model.norm((outs[3] + added[1][1])[:, 4:]), atol=1e-6)
    first = model.aggregators[0]
    mixed = torch.einsum(
        "bnds,ds->bnd", first.norm1(added[0][0].transpose(1, 2)).transpose(1, 2), first.conv.weight[:, 0, 0]
    )
    normed = first.norm2((mixed + first.conv.bias).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    assert torch.allclose(added[0][1], torch.nn.functional.gelu(normed), atol=1e-5)


@pytest.mark.parametrize("options", [{}, COMPAT])
def test_the_classifier_can_be_replaced_and_pooling_turned_off(options):
    model = trained(**options)
    images = random_images(64)
    features = model.forward_features(images)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.double().reset_classifier(7, "avg")
    assert model(images.double()).shape == (2, 7)
    assert model.num_classes == 7
    with pytest.raises(UsageError, match="no global_pool 'token'"):
        model.reset_classifier(7, "token")


@pytest.mark.parametrize("options", VARIANTS)
def test_intermediates_are_the_patches_of_blocks_and_end_in_the_features(options):
    model = trained(**options)
    images = random_images(64, 96)
    features, maps = model.forward_intermediates(images)
    assert torch.allclose(features, model.forward_features(images), atol=1e-6)
    assert [each.shape for each in maps] == [(2, 64, 4, 6)] * 4
    rows = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(each.flatten(2).transpose(1, 2), row) for each, row in zip(maps, rows, strict=True))
    pairs = model.forward_intermediates(
        images, indices=[-1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    patches, prefix = pairs[0]
    assert prefix.shape == (2, model.num_reg_tokens, 64)
    if options.get("reference_compat"):
        patches = torch.cat([prefix, patches], dim=1)[:, :24]
    assert torch.allclose(patches, features, atol=1e-6)
    _, early = model.forward_intermediates(images, indices=[0, 2], stop_early=True)
    assert [torch.equal(each, maps[place]) for each, place in zip(early, (0, 2), strict=True)] == [True, True]
    with pytest.raises(UsageError, match="NCHW or NLC, not as NHWC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_feature_extraction_gives_the_described_channels_and_strides():
    extractor = shallow(features_only=True, out_indices=(0, 2)).eval()
    assert extractor.feature_info.channels() == [64, 64]
    assert extractor.feature_info.reduction() == [16, 16]
    assert [each.shape for each in extractor(random_images(64, 96))] == [(2, 64, 4, 6)] * 2
    assert len(shallow(features_only=True)(random_images(64))) == 3


def test_pruning_keeps_what_the_chosen_intermediates_need():
    model = trained(dca_blocks=2)
    images = random_images(64)
    wanted = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert [len(model.blocks), len(model.aggregators)] == [3, 1]
    kept = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert all(map(torch.equal, wanted, kept))
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert isinstance(model.norm, torch.nn.Identity)


@pytest.mark.parametrize("options", [{}, PLAIN, STUDENT, {"dca_blocks": 2}])
def test_script_graph_and_export_compute_the_same(options):
    model = trained(drop_path_rate=0.1, **options)
    images = random_images(64, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of torch
        scripted, traced = torch.jit.script(model), torch.fx.symbolic_trace(model)
        exported = torch.export.export(model, (images,)).module()
    for way in (scripted, traced, exported):
        assert torch.allclose(way(images), model(images), atol=1e-6)
    for way in (scripted, traced):  # positions follow the size there, too
        assert torch.allclose(way(random_images(48)), model(random_images(48)), atol=1e-6)


def test_half_precision_and_autocast_run():
    model, images = trained(), random_images(64)
    wanted = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_features(images)
        assert (model(images) - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert tokens.isfinite().all()
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"dca_blocks": 2}])
def test_checkpointing_changes_no_gradient(options):
    gradients = []
    for enable in (False, True):
        model = trained(**options).train()
        model.set_grad_checkpointing(enable)
        model(random_images(64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*gradients, strict=True))


def test_rates_of_dropout_are_set():
    model = trained(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.6)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
    block = model.blocks[0]
    assert (model.head_drop.p, block.attn.proj_drop.p, block.mlp.drop2.p, block.attn.attn_drop.p) == (
        0.1,
        0.2,
        0.2,
        0.3,
    )
    model.train()
    assert not torch.equal(model(random_images(32)), model(random_images(32)))


def test_start_values():
    torch.manual_seed(0)
    model = timm.create_model("vitfs_tiny_patch16")
    assert 0 < model.reg_token.abs().max() < 1e-5
    assert not shallow(reg_init="zeros").reg_token.any()
    for linear in (model.blocks[3].attn.qkv, model.blocks[5].mlp.fc1, model.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not linear.bias.any()
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((192,), 1e-5))
    assert isinstance(shallow(init_values=0.0).blocks[0].ls1, torch.nn.Identity)
    assert model.blocks[0].norm1.bn.eps == 1e-5
    assert shallow(**LAYER_NORM).norm.eps == 1e-6


def test_layer_decay_grows_with_depth_and_aggregators_go_with_their_block():
    model = shallow(dca_blocks=2)
    scale: dict[int, float] = {}
    decay: dict[int, float] = {}
    for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()):
        scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}

    def of(name):
        return scale[id(model.get_parameter(name))]

    scales = [of("patch_embed.proj.weight"), *(of(f"blocks.{i}.attn.qkv.weight") for i in range(4)), of("head.weight")]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6
    assert of("aggregators.1.conv.weight") == of("blocks.3.attn.qkv.weight")
    assert decay[id(model.reg_token)] == 0
    assert decay[id(model.head.weight)] == 0.05


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm_layer": "rmsnorm"}, "no norm_layer 'rmsnorm'"),
        ({"reg_init": "ones"}, "no reg_init 'ones'"),
        ({"global_pool": "token"}, "no global_pool 'token'"),
        ({"embed_dim": 60}, "embed_dim divisible by 8 and by num_heads=1, not 60"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"dca_blocks": 5}, "dca_blocks of 0 to depth"),
        ({"reg_tokens": -1}, "reg_tokens >= 0"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        shallow(**options)


# -- the original's checkpoints ---------------------------------------------------------------------------------------


def in_the_originals_names(model, side=64, student=False):
    names = [
        (r"patch_embed\.stages", "patch_embed.conv3x3layers"),
        (r"patch_embed\.proj", "patch_embed.conv1x1"),
        (r"\.bn\.", ".1."),
        (r"aggregators\.(\d)\.norm1", r"dca.\1.0"),
        (r"aggregators\.(\d)\.conv", r"dca.\1.1"),
        (r"aggregators\.(\d)\.norm2", r"dca.\1.2"),
    ]
    weights = {"sin2d_embedding": sincos_positions(side // 16, side // 16, 64, torch.device("cpu")).flatten(0, 1)}
    for key, value in model.state_dict().items():
        for pattern, theirs in names:
            key = re.sub(pattern, theirs, key)
        weights[key] = value
    if not student:
        return weights
    return {
        f"model.{key.replace('head', 'dfsm.1') if key.startswith('head') else f'encoder.0.{key}'}": value
        for key, value in weights.items()
    }


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("options", [{}, LAYER_NORM, PLAIN, {"reg_tokens": 1, "dca_blocks": 2}, {"in_chans": 1}])
def test_a_checkpoint_computes_the_originals_slice_and_can_be_saved(options, student, tmp_path):
    if "in_chans" in options:
        model, images = shallow(**options), random_images(64)[:, :1]
    else:
        model, images = trained(**options), random_images(64)
    weights = in_the_originals_names(model, student=student)
    slice_ = COMPAT | ({"pool_include_prefix": True} if student else {})
    original = shallow(**(options | slice_)).eval()
    original.load_state_dict(model.state_dict())
    config = {"model_name": "vitfs_nano_patch16_gap_reg4_dinov2_bn", "image_size": 448}
    again = from_reference(config, weights)
    assert torch.equal(again(images), original(images))
    fixed = from_reference(config, weights, reference_compat=False)
    assert torch.equal(fixed(images), model.eval()(images))
    assert again.spec.name == "vitfs_nano_patch16"
    assert again.spec.img_size == 64  # what its positions were made for
    save_model(again, tmp_path / "model.safetensors")
    loaded, card = load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), again(images))
    assert card.options.get("reference_compat", False) == (model.num_reg_tokens > 0)
    assert card.options.get("pool_include_prefix", False) == (student and model.num_reg_tokens > 0)


def test_without_positions_the_config_has_the_size():
    weights = in_the_originals_names(shallow())
    del weights["sin2d_embedding"]
    assert from_reference({"image_size": 448, "student_image_size": 128}, weights).spec.img_size == 128
    assert from_reference({}, weights).spec.img_size == 224
    described = from_reference({"custom_mean_std": True}, weights).pretrained_cfg
    assert (described["mean"], described["std"]) == ((0.5,) * 3, (0.5,) * 3)


def test_checkpoints_with_other_parameters_are_refused_by_name():
    weights = in_the_originals_names(shallow())
    with pytest.raises(UsageError, match=r"1 parameters beyond those of ViTFS: adapter\.weight"):
        from_reference({}, weights | {"adapter.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"do not match the original ViTFS: blocks\.1\.norm1\.bn\.bias"):
        from_reference({}, {key: value for key, value in weights.items() if key != "blocks.1.norm1.1.bias"})
    with pytest.raises(UsageError, match=r"lacks head\.weight"):
        from_reference({}, {key: value for key, value in weights.items() if not key.startswith("head")})
    with pytest.raises(UsageError, match=r"stem is supported, residual ones are not"):
        from_reference({}, {key: value for key, value in weights.items() if "conv3x3" not in key})
    with pytest.raises(UsageError, match="is not a position embedding of a square grid"):
        from_reference({}, weights | {"sin2d_embedding": torch.zeros(15, 64)})
    with pytest.raises(UsageError, match="is not the 2-D sin-cos position embedding"):
        from_reference({}, weights | {"sin2d_embedding": torch.zeros(16, 64)})
