"""Part selection in one pass: the patches in the last block; overlapping patches; the contrastive loss."""

from __future__ import annotations

import copy
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
from animesion_training.tokens.adapters import make_adapter
from animesion_training.tokens.overlapping_patches import overlap_patches
from animesion_training.tokens.part_selection import FFVT, PART_SELECTORS, TransFG, contrastive_loss, make_part_selector
from animesion_training.tokens.reductions import make_reduction

WIDTH, CLASSES, PATCH, DEPTH, HEADS = 24, 5, 8, 4, 3
NAMES = list(PART_SELECTORS)


def backbone(grid=(5, 5), registers=0):
    torch.manual_seed(0)
    size = (PATCH * grid[0], PATCH * grid[1])
    made = VisionTransformer(
        size, PATCH, num_classes=0, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, reg_tokens=registers
    )
    with torch.no_grad():  # with initial weights all tokens would be similar
        for block in made.blocks:
            block.attn.qkv.weight.mul_(20)
        made.pos_embed.mul_(20)
    return made


def selecting(name, grid=(5, 5), registers=0, **options):
    host = backbone(grid, registers)
    torch.manual_seed(1)
    if name == "ffvt":
        options = {"count": 4, **options}
    plugin = make_part_selector(name, depth=DEPTH, **options)
    return TokenVisionTransformer(host, {"selector": plugin}, CLASSES).eval()


def random_images(batch=3, grid=(5, 5)):
    return torch.randn(batch, 3, PATCH * grid[0], PATCH * grid[1], generator=torch.Generator().manual_seed(0))


def through_blocks(host, images):
    """Outputs, scores and weights of each block but the last."""
    x = host._pos_embed(host.patch_embed(images))
    outs, scores = [], []
    for block in host.blocks[:-1]:
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        scores.append(q @ k.transpose(-2, -1) * block.attn.scale)
        x = block(x)
        outs.append(x)
    return outs, scores, [each.softmax(-1) for each in scores]


@pytest.mark.parametrize("registers", [0, 2])
def test_transfg_selects_by_the_whole_product_of_attention_matrices(registers):
    model, images = selecting("transfg", registers=registers), random_images()
    host, prefix = model.backbone, 1 + registers
    with torch.inference_mode():
        outs, _, (product, *others) = through_blocks(host, images)
        for weights in others:
            product = weights @ product
        parts = product[:, :, 0, prefix:].argmax(-1)
        rows = torch.cat([torch.arange(prefix).expand(3, -1), parts + prefix], 1)
        x = outs[-1].gather(1, rows[:, :, None].expand(-1, -1, WIDTH))
        expected = model.head(host.norm(host.blocks[-1](x))[:, 0])
        logits, tokens = model.trace(images)
    assert torch.equal(tokens.trace[f"block{DEPTH - 2}.part_idx"], parts)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert tokens.x.shape[1] == prefix + HEADS
    assert len(parts.unique()) > 1  # otherwise any rule would pass


@pytest.mark.parametrize("reference_compat", [False, True])
@pytest.mark.parametrize("registers", [0, 2])
def test_ffvt_selects_by_mutual_attention_in_every_block(reference_compat, registers):
    model = selecting("ffvt", registers=registers, reference_compat=reference_compat)
    images, host, prefix = random_images(), model.backbone, 1 + registers
    first = 0 if reference_compat else prefix
    with torch.inference_mode():
        outs, scores, weights = through_blocks(host, images)
        logits, tokens = model.trace(images)
        fused = [outs[-1][:, :prefix]]
        for i, (out, score, weight) in enumerate(zip(outs, scores, weights, strict=True)):
            mutual = score.softmax(2)[..., 0].mean(1) * weight[:, :, 0].mean(1)
            best = mutual[:, first:].topk(4, dim=1).indices
            assert torch.equal(tokens.trace[f"block{i}.part_idx"], best)
            fused.append(out.gather(1, (best + first)[:, :, None].expand(-1, -1, WIDTH)))
        expected = model.head(host.norm(host.blocks[-1](torch.cat(fused, 1)))[:, 0])
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_gets_the_same_logits_alone_and_in_a_batch(name):
    model, images = selecting(name, (3, 5)), random_images(4, (3, 5))
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_last_block_final_norm_and_class_token_are_trained_with_a_frozen_backbone(name):
    model = selecting(name)
    frozen = set(freeze(model, ["backbone"]))
    model.train()(random_images()).square().sum().backward()
    trained = {key for key, _ in model.named_parameters()} - frozen
    assert {key for key, value in model.named_parameters() if value.grad is not None} == trained
    last = {f"backbone.blocks.{DEPTH - 1}.{key}" for key, _ in model.backbone.blocks[-1].named_parameters()}
    others = {"backbone.cls_token", "backbone.norm.weight", "backbone.norm.bias", "head.weight", "head.bias"}
    assert trained == last | others


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_and_compilation(name):
    model = selecting(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(random_images()).isfinite().all()
    torch._dynamo.reset()  # graphs of other tests' models are cached under the same code
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(random_images()), model(random_images()), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_selection_needs_unreduced_patches(name):
    plan: dict[str, Any] = {"keep_rate": 0.5, "layers": (1,), "depth": DEPTH, "width": WIDTH, "tokens": 25}
    for reduction in ("evit", "tome", "ats"):
        for order in (1, -1):
            options: dict[str, Any] = {"count": 4} if name == "ffvt" else {}
            selector = make_part_selector(name, depth=DEPTH, **options)
            plugins = [("selector", selector), ("reduction", make_reduction(reduction, **plan))]
            with pytest.raises(UsageError, match=r"leave out|before other plug-ins"):
                TokenVisionTransformer(backbone(), dict(plugins[::order]), CLASSES).eval()(random_images())


def test_prompts_go_with_part_selection():
    for name in NAMES:
        prompts = make_adapter("vpt-deep", depth=DEPTH, width=WIDTH, grid=(5, 5), count=2)
        plugins = dict([*prompts, ("selector", make_part_selector(name, depth=DEPTH))])
        logits, tokens = TokenVisionTransformer(backbone(), plugins, CLASSES).eval().trace(random_images())
        assert logits.isfinite().all()
        assert tokens.prefix == 3


# -- the contrastive loss ----------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_the_sum_over_pairs():
    torch.manual_seed(0)
    features, targets = torch.randn(7, 4), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    total = torch.zeros(())
    for i in range(7):
        for j in range(7):
            cosine = functional.cosine_similarity(features[i], features[j], dim=0)
            total += (1 - cosine) if targets[i] == targets[j] else max(cosine - 0.4, 0 * cosine)
    assert contrastive_loss(features, targets).item() == pytest.approx(float(total) / 49, rel=1e-5)


def test_the_contrastive_loss_is_a_term_of_training_that_needs_classes():
    model = selecting("transfg", contrastive=0.5).train()
    targets = torch.tensor([0, 0, 1])
    assert model.has_losses
    logits, losses = model(random_images(), with_losses=True, targets=targets)
    expected = 0.5 * contrastive_loss(model.forward_features(random_images()), targets)
    assert losses["transfg_contrastive"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(model(random_images()), logits)
    losses["transfg_contrastive"].backward()
    assert model.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    with pytest.raises(UsageError, match="pass targets"):
        model(random_images(), with_losses=True)
    with pytest.raises(UsageError, match="MixUp"):
        model(random_images(), with_losses=True, targets=torch.full((3, CLASSES), 0.2))
    assert model.eval()(random_images(), with_losses=True, targets=targets)[1] == {}
    assert not selecting("transfg").has_losses


# -- overlapping patches -----------------------------------------------------------------------------------------------


def test_overlapping_patches_are_cut_at_the_stride():
    host = backbone((5, 4))
    plain = copy.deepcopy(host)
    overlap_patches(host, 6)
    grid = ((40 - 8) // 6 + 1, (32 - 8) // 6 + 1)
    assert host.patch_embed.grid_size == grid == (6, 5)
    assert host.pos_embed.shape[1] == 1 + 30
    images = torch.randn(2, 3, 40, 32)
    cut = functional.unfold(images, 8, stride=6).transpose(1, 2)
    projection = plain.patch_embed.proj
    expected = cut @ projection.weight.flatten(1).T + projection.bias
    assert torch.allclose(host.patch_embed(images), expected, atol=1e-5)
    assert torch.equal(host.pos_embed[:, 0], plain.pos_embed[:, 0])
    _, tokens = TokenVisionTransformer(host, {"selector": TransFG(depth=DEPTH)}, CLASSES).trace(images)
    assert tokens.trace["block0.tokens"].tolist() == [31, 31]


def test_methods_on_the_grid_support_overlapping_patches():
    host = backbone((5, 5))
    overlap_patches(host, 6)
    plugins = dict(make_adapter("ila", depth=DEPTH, width=WIDTH, grid=host.patch_embed.grid_size))
    _, tokens = TokenVisionTransformer(host, plugins, CLASSES).eval().trace(random_images())
    assert tokens.grid == (2, 2)


def test_weights_of_a_plain_transformer_load_with_overlapping_patches():
    host = backbone()
    overlap_patches(host, 6)
    model = TokenVisionTransformer(host, {"selector": TransFG(depth=DEPTH)}, CLASSES)
    adapted = model.adapt_state_dict(backbone().state_dict())
    assert not model.load_state_dict(adapted, strict=False).unexpected_keys
    assert torch.allclose(adapted["backbone.pos_embed"], host.pos_embed, atol=1e-5)


def test_the_size_of_images_can_change_and_patches_still_overlap():
    host = backbone()
    overlap_patches(host, 4, (48, 40))
    assert host.patch_embed.grid_size == (11, 9)
    host.set_input_size(img_size=(24, 40))
    assert host.patch_embed.grid_size == (5, 9)
    assert host(torch.randn(2, 3, 24, 40)).shape == (2, WIDTH)
    assert host.patch_embed.feat_ratio() == 4


def test_a_stride_of_the_patchs_side_changes_nothing():
    host = backbone()
    before = host(random_images())
    overlap_patches(host, PATCH)
    assert torch.equal(host(random_images()), before)


# -- cost --------------------------------------------------------------------------------------------------------------


#: M parameters trained of ViT-B/16 with 200 classes, stride, G multiply-adds at 224 and 448.
COSTS = [("transfg", 16, 17.12, 130.13), ("transfg", 12, 31.49, 447.84), ("ffvt", 16, 17.08, 72.96)]


@pytest.mark.parametrize(("name", "stride", "small", "large"), COSTS)
def test_costs_are_the_published_ones_without_the_full_product(name, stride, small, large):
    for side, published in ((224, small), (448, large)):
        with torch.device("meta"):
            host = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=side)
            if stride < 16:
                overlap_patches(host, stride)
            model = TokenVisionTransformer(host, {"selector": make_part_selector(name, depth=12)}, 200)
        measured = count(model, (side, side)).multiply_adds / 1e9
        tokens = 1 + host.patch_embed.num_patches
        if name == "transfg":  # ten products of 12 heads, in place of recomputed weights and a row
            saved = 10 * 12 * tokens**2 * (tokens - (64 + 1)) / 1e9
            assert measured < published
        else:
            saved = 0
        print(f"{name} stride {stride} {side}: {measured:.2f} G multiply-adds, published {published:.2f}")
        assert measured + saved == pytest.approx(published, rel=0.01)
    freeze(model, ["backbone"])
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained / 1e6 == pytest.approx(7.24, abs=0.005)


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transfgg", {}, "did you mean 'transfg'"),
        ("transfg", {"count": 3}, "no option count: it has contrastive, margin"),
        ("transfg", {"contrastive": -1}, "at least 0"),
        ("ffvt", {"count": 0}, "from 1"),
        ("ffvt", {"depth": 1}, "two blocks"),
    ],
)
def test_bad_settings_raise_one_sentence(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_part_selector(name, **{"depth": DEPTH, **options})


def test_what_cannot_be_selected_or_overlap_is_refused():
    with pytest.raises(UsageError, match="selects 30 patches per block, and there are 25"):
        TokenVisionTransformer(backbone(), {"selector": FFVT(depth=DEPTH, count=30)}, CLASSES)(random_images())
    for stride, message in ((9, "leaves out pixels"), (0, "from 1")):
        with pytest.raises(UsageError, match=message):
            overlap_patches(backbone(), stride)
    host = backbone()
    overlap_patches(host, 6)
    with pytest.raises(UsageError, match="plain patch embedding"):
        overlap_patches(host, 6)
