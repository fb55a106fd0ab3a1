"""Adapters in and between blocks: outputs, initial values, and the parameters trained with a frozen backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.analysis.profile import count
from animesion_training.engine.optim import freeze
from animesion_training.tokens import Tokens, TokenVisionTransformer
from animesion_training.tokens.adapters import ADAPTERS, make_adapter
from animesion_training.tokens.adapters.ila import ILA, InterLayerAdapter
from animesion_training.tokens.adapters.in_block import Adapters, Bottleneck, LoRA
from animesion_training.tokens.reductions import make_reduction

WIDTH, CLASSES, PATCH, DEPTH = 24, 5, 4, 5
NAMES = list(ADAPTERS)
#: Methods that do not change the output at first.
EXACT = ["adapter", "adapter-sequential", "convpass", "lora"]
SHRINKING = ["ila", "ila+", "ila++"]


def backbone(grid=(8, 8), registers=0, **options):
    torch.manual_seed(0)
    size = (PATCH * grid[0], PATCH * grid[1])
    made = VisionTransformer(
        size, PATCH, num_classes=0, embed_dim=WIDTH, depth=DEPTH, num_heads=3, reg_tokens=registers, **options
    )
    with torch.no_grad():  # with initial weights all tokens would be similar
        for block in made.blocks:
            block.attn.qkv.weight.mul_(20)
        made.pos_embed.mul_(20)
    return made


def adapted(name, grid=(8, 8), registers=0, seed=1, **options):
    host = backbone(grid, registers)
    torch.manual_seed(seed)
    if name.startswith("vpt"):
        options = {"count": 4, **options}
    elif name == "vqt":
        options = {"count": 3, **options}
    plugins = dict(make_adapter(name, depth=DEPTH, width=WIDTH, grid=grid, patch_size=(PATCH, PATCH), **options))
    return TokenVisionTransformer(host, plugins, CLASSES).eval()


def shaken(model):
    """Set weights that start at zero to other values, so that all of them have an effect."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def plain(model):
    """The same transformer and head without methods."""
    without = TokenVisionTransformer(backbone(), {}, CLASSES)
    without.backbone.load_state_dict(model.backbone.state_dict())
    without.head = model.head
    return without.eval()


def random_images(batch=3, grid=(8, 8)):
    return torch.randn(batch, 3, PATCH * grid[0], PATCH * grid[1], generator=torch.Generator().manual_seed(0))


# -- bottlenecks in blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_initial_adapters_do_not_change_the_transformer(name):
    model = adapted(name)
    assert list(model.plugins.parameters())
    assert torch.allclose(model(random_images()), plain(model)(random_images()), atol=1e-6)
    assert not torch.allclose(shaken(model)(random_images()), plain(model)(random_images()), atol=1e-2)


@pytest.mark.parametrize("name", ["adapter", "adapter-sequential", "convpass"])
def test_the_original_starts_with_xavier_weights_instead(name):
    model = adapted(name, reference_compat=True)
    assert not torch.allclose(model(random_images()), plain(model)(random_images()), atol=1e-2)


def test_parallel_adapters_read_the_input_of_their_branch():
    model = shaken(adapted("adapter"))
    host, plugin, images = model.backbone, model.plugins["adapters"], random_images()
    x = host._pos_embed(host.patch_embed(images))
    for block, first, second in zip(host.blocks, plugin.attention_adapters, plugin.mlp_adapters, strict=True):
        for norm, branch, adapter in ((block.norm1, block.attn, first), (block.norm2, block.mlp, second)):
            normed = norm(x)
            x = x + branch(normed) + adapter.up(functional.gelu(adapter.down(normed)))
    assert torch.allclose(model(images), model.head(host.norm(x)[:, 0]), atol=1e-5)


def test_sequential_adapters_read_the_output_of_the_block():
    model = shaken(adapted("adapter-sequential"))
    host, plugin, images = model.backbone, model.plugins["adapters"], random_images()
    x = host._pos_embed(host.patch_embed(images))
    for block, adapter in zip(host.blocks, plugin.mlp_adapters, strict=True):
        x = block(x)
        x = x + adapter.up(functional.gelu(adapter.down(x)))
    assert torch.allclose(model(images), model.head(host.norm(x)[:, 0]), atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convpass_convolves_over_the_grid_and_each_other_token_alone(kernel):
    torch.manual_seed(0)
    module = Bottleneck(WIDTH, 6, kernel, reference_compat=True)
    x = torch.randn(2, 2 + 4 * 3 + 1, WIDTH)
    out = module(x, Tokens(x, 2, (4, 3), extra=1))
    hidden = functional.gelu(module.down(x))

    def through(tokens, height, width):
        maps = tokens.transpose(1, 2).reshape(-1, 6, height, width)
        return functional.gelu(functional.conv2d(maps, module.conv.weight, module.conv.bias, padding=kernel // 2))

    for i in (0, 1, 14):
        assert torch.allclose(out[:, i], module.up(through(hidden[:, [i]], 1, 1).flatten(1)), atol=1e-6)
    patches = module.up(through(hidden[:, 2:14], 4, 3).flatten(2).transpose(1, 2))
    assert torch.allclose(out[:, 2:14], patches, atol=1e-6)


def test_adapters_go_with_reductions_but_convolutions_need_the_grid():
    plan: dict[str, Any] = {"keep_rate": 0.5, "layers": (1, 3), "depth": DEPTH, "width": WIDTH, "tokens": 64}

    def reduced(name, reduction):
        plugins = make_adapter(name, depth=DEPTH, width=WIDTH, grid=(8, 8))
        plugins += [("reduction", make_reduction(reduction, **plan))]
        return TokenVisionTransformer(backbone(), dict(plugins), CLASSES).eval()

    for reduction in ("evit", "ats", "tome"):
        assert reduced("adapter", reduction)(random_images()).isfinite().all()
    for name in ("convpass", "ila"):
        with pytest.raises(UsageError, match=r"form a grid|one patch each"):
            reduced(name, "evit")(random_images())


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_lora_adds_scaled_low_rank_products_to_the_weights():
    model = shaken(adapted("lora", rank=3, alpha=6.0))
    expected = plain(model)
    for block, updates in zip(expected.backbone.blocks, model.plugins["lora"].updates, strict=True):
        for target in ("qkv", "proj"):
            layer = getattr(block.attn, target)
            layer.weight.data += 2.0 * updates[target].up.weight @ updates[target].down.weight
    assert torch.allclose(model(random_images()), expected(random_images()), atol=1e-5)


def test_lora_merges_into_the_weights_without_a_change():
    model = shaken(adapted("lora"))
    before = model(random_images())
    model.plugins["lora"].merge(model.backbone)
    assert torch.allclose(model(random_images()), before, atol=1e-5)
    assert torch.allclose(plain(model)(random_images()), before, atol=1e-5)


def test_a_copy_of_a_lora_model_has_its_own_updates():
    model = shaken(adapted("lora"))
    before = model(random_images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.plugins.parameters():
            parameter.zero_()
    assert torch.equal(model(random_images()), before)
    assert torch.allclose(twin(random_images()), plain(model)(random_images()), atol=1e-6)


def test_lora_leaves_the_class_token_frozen_and_opens_no_block():
    plugin = LoRA(WIDTH, depth=DEPTH, targets=("qkv",))
    assert not plugin.also_trains
    assert not plugin.opens
    assert sum(value.numel() for value in plugin.parameters()) == DEPTH * 8 * (WIDTH + 3 * WIDTH)


# -- inter-layer adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "side", "sides"),
    [(3, 14, [12, 10]), (3, 28, [26, 24]), (5, 14, [10, 6]), (7, 14, [8, 2])],
)
def test_ila_shrinks_the_grid_as_published(kernel, side, sides):
    plugin = ILA(8, depth=12, grid=(side, side), kernel=kernel)
    assert plugin.locations == (3, 7)
    grid, seen = (side, side), []
    for module in plugin.down_sampling:
        grid = module.output_grid(grid)
        seen.append(grid[0])
    assert seen == sides


def test_tokens_shrink_after_their_blocks_and_the_trace_has_them():
    model = adapted("ila+", locations=(1, 3))
    _, tokens = model.trace(random_images())
    assert [int(tokens.trace[f"block{i}.tokens"][1]) for i in range(DEPTH)] == [65, 65, 37, 37, 17]
    shapes = {name: tuple(value.shape) for name, value in tokens.trace.items() if name.startswith("ila")}
    sized = {"ila0.out": 65, "ila_ds0.out": 37, "ila1.out": 37, "ila_ds1.out": 17, "ila2.out": 17}
    assert shapes == {name: (3, size, WIDTH) for name, size in sized.items()}
    assert tokens.grid == (4, 4)


def test_the_near_one_residual_sums_windows_and_leaves_the_class_token():
    torch.manual_seed(0)
    module = InterLayerAdapter(WIDTH).eval()
    nn.init.zeros_(module.up.weight)
    assert 0 < module.residual_conv.weight.std() < 0.002
    x = torch.randn(2, 1 + 25, WIDTH)
    out = module(x, Tokens(x, 1, (5, 5)))
    assert torch.equal(out[:, 0], x[:, 0])
    windows = 9 * functional.avg_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, (5, 5)), 3, stride=1)
    assert torch.allclose(out[:, 1:], windows.flatten(2).transpose(1, 2), atol=0.05)
    assert not torch.allclose(out[:, 1:], windows.flatten(2).transpose(1, 2), atol=1e-4)  # near one, not one


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("norms", [("bn", "bn", "bn"), ("ln", "none", "bn"), ("none", "ln", "ln")])
@pytest.mark.parametrize("padding", [False, True])
def test_an_inter_layer_adapter_computes_its_equations(dilation, multiplier, norms, padding):
    torch.manual_seed(0)
    module = InterLayerAdapter(
        WIDTH, dim=6, dilation=dilation, multiplier=multiplier, norms=norms, padding=padding, dropout=0.0
    ).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(4, 2 + 7 * 6, WIDTH)
    out = module(x, Tokens(x, 2, (7, 6)))
    pad = dilation if padding else 0

    def normed(features, kind, layer):  # (B, channels, ...)
        if kind == "bn":
            dims = [0, *range(2, features.dim())]
            mean, variance = features.mean(dims, keepdim=True), features.var(dims, unbiased=False, keepdim=True)
        elif kind == "ln":
            mean, variance = features.mean(1, keepdim=True), features.var(1, unbiased=False, keepdim=True)
        else:
            return features
        shape = [1, -1] + [1] * (features.dim() - 2)
        return (features - mean) / (variance + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)

    hidden = functional.gelu(normed(module.down(x).transpose(1, 2), norms[0], module.norm1))
    maps = functional.conv2d(
        hidden[..., 2:].unflatten(2, (7, 6)), module.conv.weight, module.conv.bias, 1, pad, dilation, groups=6
    )
    maps = functional.gelu(normed(maps, norms[1], module.norm2))
    maps = functional.conv2d(maps, module.point.weight[:, :, None, None], module.point.bias)
    alone = functional.conv1d(hidden[..., :2], module.cls.weight[:, :, None], module.cls.bias)
    joint = functional.gelu(normed(torch.cat([alone, maps.flatten(2)], 2), norms[2], module.norm3))
    residual = functional.conv2d(
        x[:, 2:].transpose(1, 2).unflatten(2, (7, 6)), module.residual_conv.weight, None, 1, pad, dilation, groups=WIDTH
    )
    expected = module.up(joint.transpose(1, 2)) + torch.cat([x[:, :2], residual.flatten(2).transpose(1, 2)], 1)
    assert torch.allclose(out, expected, atol=2e-4)


@pytest.mark.parametrize("residual", ["near-ones", "ones", "xavier", "conv", "avg-pool", "none"])
def test_every_residual_runs_and_only_learned_ones_have_weights(residual):
    torch.manual_seed(0)
    module = InterLayerAdapter(WIDTH, residual=residual).eval()
    x = torch.randn(2, 1 + 25, WIDTH)
    assert module(x, Tokens(x, 1, (5, 5))).shape == (2, 10, WIDTH)
    learned = {"conv": 9 * WIDTH * WIDTH, "avg-pool": 0, "none": 0}.get(residual, 9 * WIDTH)
    common = sum(value.numel() for value in InterLayerAdapter(WIDTH, residual="none").parameters())
    assert sum(value.numel() for value in module.parameters()) == common + learned
    if residual == "ones":
        assert (module.residual_conv.weight == 1).all()


def test_without_class_conv_single_tokens_go_through_the_patches_convolution():
    torch.manual_seed(0)
    module = InterLayerAdapter(WIDTH, dim=6, residual="identity", padding=True, class_conv=False).eval()
    x = torch.randn(2, 1 + 9, WIDTH)
    out = module(x, Tokens(x, 1, (3, 3)))
    alone = module(x[:, :1], Tokens(x[:, :1], 0, (1, 1)))  # the class token as a map of one pixel
    assert torch.allclose(out[:, :1], alone, atol=1e-6)


def test_modules_have_the_published_number_of_parameters():
    def parameters(module):
        return sum(value.numel() for value in module.parameters())

    assert parameters(InterLayerAdapter(768)) == 20_248
    assert parameters(InterLayerAdapter(768, residual="identity", padding=True)) == 13_336
    assert parameters(Bottleneck(768)) == 13_064
    assert parameters(Bottleneck(768, 8, 3)) == 13_648


def test_ila_trains_on_one_image_but_not_on_one_patch():
    model = adapted("ila").train()
    model(random_images(1)).sum().backward()
    module = InterLayerAdapter(WIDTH).train()
    x = torch.randn(1, 1 + 9, WIDTH)
    with pytest.raises(UsageError, match="one image with one patch left"):
        module(x, Tokens(x, 1, (3, 3)))
    padded = InterLayerAdapter(WIDTH, residual="identity", padding=True, class_conv=False).train()
    with pytest.raises(UsageError, match="one image"):
        padded(x, Tokens(x, 1, (3, 3)))
    assert module.eval()(x, Tokens(x, 1, (3, 3))).isfinite().all()


def test_drop_path_replaces_dropout():
    torch.manual_seed(0)
    module = InterLayerAdapter(WIDTH, drop_path=0.5, residual="identity", padding=True).train()
    x = torch.randn(64, 1 + 9, WIDTH)
    unchanged = (module(x, Tokens(x, 1, (3, 3))) == x).flatten(1).all(1)
    assert 15 < unchanged.sum() < 49


# -- a model like any other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("registers", [0, 4])
def test_odd_grids_and_registers(name, registers):
    grid = (7, 5)
    model = shaken(adapted(name, grid, registers))
    logits, tokens = model.trace(random_images(2, grid))
    assert logits.isfinite().all()
    assert tokens.grid == ((3, 1) if name in SHRINKING else grid)
    prompts = 4 if name.startswith("vpt") else 0
    assert tokens.prefix == 1 + registers + prompts
    assert tokens.x.shape[1] == tokens.prefix + tokens.grid[0] * tokens.grid[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_gets_the_same_logits_alone_and_in_a_batch(name):
    model = shaken(adapted(name))
    images = random_images(4)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=2e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_only_trained_parameters_get_gradients_with_a_frozen_backbone(name):
    model = shaken(adapted(name))
    frozen = freeze(model, ["backbone"])
    model.train()(random_images(4)).square().sum().backward()
    got = {key for key, value in model.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    trained = {key for key, _ in model.named_parameters()} - set(frozen)
    assert got <= trained
    # batch norm cancels a bias before it
    assert all(".ila." in key and key.endswith((".down.bias", ".conv.bias")) for key in trained - got)
    expected = {"head.weight", "head.bias"} | ({"backbone.cls_token"} if name != "lora" else set())
    assert {key for key in trained if not key.startswith("plugins.")} == expected
    assert all(key.startswith("backbone.") for key in frozen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_autocast(name, training):
    model = shaken(adapted(name)).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(random_images(4))
    assert logits.isfinite().all()
    if training:
        logits.float().square().mean().backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())
    else:
        assert torch.allclose(logits.float(), model(random_images(4)), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("name", ["ila", "adapter-sequential", "lora", "vpt-deep"])
def test_checkpointing_changes_no_gradient(name):
    grads = []
    for enable in (False, True):
        model = shaken(adapted(name, dropout=0.0) if name != "adapter-sequential" else adapted(name)).train()
        model.set_grad_checkpointing(enable)
        model(random_images()).square().mean().backward()
        grads.append(model.backbone.patch_embed.proj.weight.grad)
    assert grads[0].abs().sum() > 0
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name if name in ("ila", "lora") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_compiled_models_agree(name):
    model = shaken(adapted(name))
    torch._dynamo.reset()  # graphs of other tests' models are cached under the same code
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(random_images()), model(random_images()), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_into_another_model_of_the_same_kind(name):
    model, other = shaken(adapted(name)), adapted(name, seed=7)
    other.load_state_dict(other.adapt_state_dict(model.state_dict()))
    assert torch.allclose(model(random_images()), other(random_images()), atol=1e-6)


# -- cost --------------------------------------------------------------------------------------------------------------


#: ViT-B/16 with 200 classes: M parameters trained with a frozen backbone, G multiply-adds at 224 and 448.
COSTS = [
    ("adapter", {}, 0.468, 17.62, 78.73),
    ("convpass", {}, 0.482, 17.62, 78.74),
    ("ila", {}, 0.195, 13.09, 66.86),
    ("ila+", {}, 0.328, 13.11, 66.95),
    ("ila++", {}, 0.509, 13.14, 67.06),
    ("ila++", {"kernel": 5}, 0.533, 9.95, 57.40),
    ("ila++", {"kernel": 7}, 0.571, 7.97, 49.52),
    ("vpt-shallow", {}, 0.231, 26.97, 90.07),
    ("vpt-deep", {}, 1.076, 26.97, 90.07),
    ("vqt", {}, 18.68, 18.33, 79.37),
]


def check_costs(name, options, trained, side, published):
    with torch.device("meta"):
        host = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=side)
        grid = host.patch_embed.grid_size
        plugins = dict(make_adapter(name, depth=12, width=768, grid=grid, **options))
        model = TokenVisionTransformer(host, plugins, 200)
    measured = count(model, (side, side)).multiply_adds / 1e9
    freeze(model, ["backbone"])
    own = sum(value.numel() for value in model.parameters() if value.requires_grad) / 1e6
    print(f"{name} {side}: {own:.3f} M trained, {measured:.2f} G multiply-adds, published {published:.2f}")
    assert measured == pytest.approx(published, rel=0.01)
    assert own == pytest.approx(trained, abs=0.00051 if trained < 2 else 0.005)


@pytest.mark.parametrize(("name", "options", "trained", "small", "large"), COSTS)
def test_costs_are_the_published_ones(name, options, trained, small, large):
    check_costs(name, options, trained, 224, small)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "trained", "small", "large"), COSTS)
def test_costs_of_large_images_are_the_published_ones(name, options, trained, small, large):
    check_costs(name, options, trained, 448, large)


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ilaa", {}, "did you mean 'ila'"),
        ("none", {}, "ila, ila\\+, ila\\+\\+, adapter"),
        ("ila", {"padded": None}, "no option padded"),
        ("ila", {"path": "parallel"}, "no option path"),
        ("adapter", {"rank": 3}, "no option rank: it has dim"),
        ("adapter", {"convolution": 3}, "no option convolution"),
        ("adapter", {"dim": 0}, "from 1"),
        ("adapter", {"dim": True}, "from 1"),
        ("convpass", {"kernel": 2}, "odd"),
        ("ila++", {"path": "both"}, "parallel, sequential"),
        ("ila", {"residual": "identity"}, "set padding"),
        ("ila", {"residual": "sum"}, "near-ones, ones"),
        ("ila", {"class_conv": False}, "set padding"),
        ("ila", {"padding": True, "kernel": 2}, "odd kernel"),
        ("ila", {"residual": "avg-pool", "dilation": 2}, "no dilation"),
        ("ila", {"norms": "bn"}, "three"),
        ("ila", {"norms": ("bn", "gn", "bn")}, "bn, ln, none"),
        ("ila", {"locations": (3, 1)}, "ascending"),
        ("ila", {"locations": (1, 5)}, "0 to 4"),
        ("ila", {"kernel": 5}, "fewer locations"),
        ("ila", {"dropout": 1.0}, "below 1"),
        ("lora", {"rank": 0}, "from 1"),
        ("lora", {"alpha": 0.0}, "above 0"),
        ("lora", {"targets": ("k",)}, "qkv, proj"),
        ("lora", {"targets": "qkv"}, "list"),
        ("vpt-deep", {"deep": False}, "no option deep"),
        ("vpt-deep", {"count": 0}, "from 1"),
        ("vqt", {"dropout": -0.1}, "at least 0"),
    ],
)
def test_bad_settings_raise_one_sentence(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_adapter(name, depth=DEPTH, width=WIDTH, grid=(8, 8), **options)


def test_a_block_has_at_most_one_module_after_it():
    with pytest.raises(UsageError, match=r"blocks \[3\] are in locations and in padded"):
        ILA(WIDTH, depth=DEPTH, grid=(8, 8), locations=(1, 3), padded=(2, 3))
    with pytest.raises(UsageError, match="no three groups"):
        ILA(WIDTH, depth=2, grid=(8, 8))
    assert ILA(WIDTH, depth=24, grid=(8, 8)).locations == (7, 15)


def test_convpass_can_be_sequential():
    plugin = Adapters(WIDTH, depth=2, path="sequential", convolution=3)
    assert len(plugin.attention_adapters) == 0
    assert len(plugin.mlp_adapters) == 2
    x = torch.randn(2, 10, WIDTH)
    tokens = Tokens(x, 1, (3, 3))
    plugin.after(1, tokens)
    assert torch.equal(tokens.x, x)
    assert plugin.mlp_adapters[0].conv.weight.numel() == 8 * 8 * 9


def test_code_compiled_without_an_update_is_not_taken_for_a_layer_with_one() -> None:
    torch._dynamo.reset()
    images = random_images()
    plain, updated = shaken(adapted("ila")), shaken(adapted("lora"))
    with torch.no_grad():
        torch.compile(plain, backend="eager")(images)
        compiled = torch.compile(updated, backend="eager")(images)
        assert torch.equal(compiled, updated(images))
        for parameter in updated.plugins.parameters():
            parameter.zero_()
        assert not torch.allclose(compiled, updated(images), atol=1e-5)  # the update matters
