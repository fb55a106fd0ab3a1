"""GLSim and RAMS-Trans: selection, crops, and the outputs of two passes with the same weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.optim._optim_factory import create_optimizer_v2
from torch import nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.analysis.profile import count
from animesion_training.models import IFAHead
from animesion_training.tokens import Plugin, TokenVisionTransformer
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.reductions import make_reduction
from animesion_training.tokens.rollout import record_attention, rollout
from animesion_training.tokens.twopass import ConvAggregator, GLSim, RAMSTrans
from animesion_training.tokens.twopass.similarity import global_local_similarity, mask_box, patch_box, select

SIZE, PATCH, DEPTH, WIDTH = 48, 8, 2, 64


def bare(size: Any = SIZE, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "patch_size": PATCH, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size, **options)


def encoder(size: Any = SIZE, plugins: dict[str, Plugin] | None = None, num_classes: int = 0, **options: Any) -> Any:
    return TokenVisionTransformer(bare(size, **options), plugins or {}, num_classes)


def varied(model: Any) -> Any:
    """Weights large enough for patches, heads and crops to differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def glsim(num_classes: int = 5, size: Any = SIZE, host: dict[str, Any] | None = None, **options: Any) -> Any:
    return varied(GLSim(encoder(size, **(host or {})), num_classes, **{"top": 4, **options}))


def rams(num_classes: int = 5, size: Any = SIZE, host: dict[str, Any] | None = None, **options: Any) -> Any:
    return varied(RAMSTrans(encoder(size, num_classes=num_classes, **(host or {})), num_classes, **options))


def images(batch: int = 3, size: Any = SIZE, seed: int = 0) -> Any:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 6, 6, generator=generator)
    return functional.interpolate(coarse, size=(height, width), mode="bicubic") + 0.2 * torch.randn(
        batch, 3, height, width, generator=generator
    )


def cropped_one_by_one(images: Any, boxes: Any) -> Any:
    """The definition: crop, then resize with aligned corners."""
    size = images.shape[2:]
    cut = [image[None, :, y0:y1, x0:x1] for image, (y0, y1, x0, x1) in zip(images, boxes.tolist(), strict=True)]
    return torch.cat([functional.interpolate(each, size=size, mode="bilinear", align_corners=True) for each in cut])


# -- similarity and selection -----------------------------------------------------------------------------------------


def test_similarities_follow_their_definitions() -> None:
    torch.manual_seed(0)
    whole, patches = torch.randn(2, 8), torch.randn(2, 5, 8)
    cosine = [[torch.dot(w, p) / (w.norm() * p.norm()) for p in row] for w, row in zip(whole, patches, strict=True)]
    torch.testing.assert_close(global_local_similarity(whole, patches), torch.tensor(cosine))
    difference = patches - whole[:, None]
    torch.testing.assert_close(global_local_similarity(whole, patches, "l1"), difference.abs().mean(2))
    torch.testing.assert_close(global_local_similarity(whole, patches, "l2"), (difference**2).mean(2))


def test_similarity_is_in_float32_and_without_a_gradient() -> None:
    whole, patches = torch.randn(1, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 5, 8).bfloat16()
    for metric in ("cos", "l1", "l2"):
        similarity = global_local_similarity(whole, patches, metric)
        assert similarity.dtype == torch.float32
        assert not similarity.requires_grad
    with pytest.raises(UsageError, match=r"dot.*cos, l1, l2"):
        global_local_similarity(whole, patches, cast(Any, "dot"))


def test_the_best_are_selected_in_order_and_equal_ones_from_the_first_on() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.3]])
    assert select(scores, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert select(scores, 3, smallest=True).tolist() == [[0, 2, 1], [0, 1, 2]]
    assert select(scores, 9).shape == (2, 4)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(UsageError, match="top is the number of selected patches"):
            select(scores, cast(Any, wrong))


def test_boxes_by_hand() -> None:
    # rows 1 to 3 and columns 0 to 2 of a grid of 4x5, patches of 8x6 pixels
    indices = torch.tensor([[5, 17, 11]])
    assert patch_box(indices, (4, 5), (32, 30)).tolist() == [[8, 32, 0, 18]]
    assert patch_box(indices, (4, 5), (32, 30), "reference").tolist() == [[8, 24, 0, 12]]


@pytest.mark.parametrize("box", ["corrected", "reference"])
def test_one_patch_gives_its_own_pixels(box: Any) -> None:
    assert patch_box(torch.tensor([[7], [0]]), (3, 3), (24, 24), box).tolist() == [[16, 24, 8, 16], [0, 8, 0, 8]]


def test_a_corrected_box_is_the_smallest_that_has_all_of_every_selected_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, height, width = 5, 7, 8, 4
    for count_of in (1, 2, 6):
        indices = torch.stack([torch.randperm(rows * columns, generator=generator)[:count_of] for _ in range(20)])
        boxes = patch_box(indices, (rows, columns), (rows * height, columns * width))
        original = patch_box(indices, (rows, columns), (rows * height, columns * width), "reference")
        for chosen, box, theirs in zip(indices, boxes.tolist(), original.tolist(), strict=True):
            pixels = torch.zeros(rows, columns, dtype=torch.bool)
            pixels.view(-1)[chosen] = True
            pixels = pixels.repeat_interleave(height, 0).repeat_interleave(width, 1)
            hit_rows, hit_columns = pixels.any(1).nonzero(), pixels.any(0).nonzero()
            assert box[:2] == [int(hit_rows.min()), int(hit_rows.max()) + 1]
            assert box[2:] == [int(hit_columns.min()), int(hit_columns.max()) + 1]
            # the original's ends before the last row and column, unless they are the only ones
            assert theirs[0] == box[0]
            assert theirs[1] == max(box[1] - height, box[0] + height)
            assert theirs[3] == max(box[3] - width, box[2] + width)


def test_boxes_of_a_grid_that_does_not_divide_the_image_end_at_whole_pixels() -> None:
    boxes = patch_box(torch.tensor([[0], [12], [99]]), (10, 10), (224, 224))
    assert boxes.tolist() == [[0, 23, 0, 23], [22, 45, 44, 68], [201, 224, 201, 224]]


def test_mask_boxes_bound_marked_cells_or_the_whole_grid() -> None:
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[0, 1, 0] = mask[0, 3, 2] = mask[0, 2, 1] = True
    mask[2] = True
    assert mask_box(mask, (4, 5), (32, 30)).tolist() == [[8, 32, 0, 18], [0, 32, 0, 30], [0, 32, 0, 30]]
    assert mask_box(mask, (4, 5), (32, 30), "reference").tolist() == [[8, 24, 0, 12], [0, 32, 0, 30], [0, 24, 0, 24]]
    cells = torch.zeros(1, 2, 2, dtype=torch.bool)
    cells[0, 1, 1] = True  # of a grid of 3x3, the last cells have one patch
    assert mask_box(cells, (3, 3), (24, 24), pool=2).tolist() == [[16, 24, 16, 24]]
    with pytest.raises(UsageError, match=r"open.*corrected, reference"):
        mask_box(cells, (3, 3), (24, 24), cast(Any, "open"))


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters", "multiply_adds"), [(224, 93.04, 35.14), (448, 93.49, 157.00)])
def test_published_costs(size: int, parameters: float, multiply_adds: float) -> None:
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=size)
        counts = count(GLSim(TokenVisionTransformer(backbone, {}, 0), 200), (size, size))
    assert counts.parameters / 1e6 == pytest.approx(parameters, rel=0.001)
    assert counts.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("size", [SIZE, (40, 24), (24, 56)])
@pytest.mark.parametrize("metric", ["cos", "l1", "l2"])
def test_logits_are_those_of_two_passes_of_the_plain_transformer(size: Any, metric: Any) -> None:
    model, x = glsim(size=size, metric=metric), images(size=size)
    plain = copy.deepcopy(model.encoder.backbone)
    with torch.inference_mode():
        features = plain.forward_features(x)
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        whole, patches = features[:, 0], features[:, 1:]
        if metric == "cos":
            scores = functional.cosine_similarity(whole[:, None], patches, dim=2)
        else:
            scores = -torch.cdist(whole[:, None], patches, p=int(metric[1]))[:, 0]
        boxes = []
        for chosen in scores.topk(4).indices:
            row, column = chosen // columns, chosen % columns
            edges = int(row.min()), int(row.max()) + 1, int(column.min()), int(column.max()) + 1
            boxes.append([PATCH * edge for edge in edges])
        assert all(y1 <= rows * PATCH and x1 <= columns * PATCH for _, y1, _, x1 in boxes)
        crops = cropped_one_by_one(x, torch.tensor(boxes))
        pair = torch.stack([whole, plain.forward_features(crops)[:, 0]], dim=1)
        expected = model.head(model.aggregator(pair)[:, 0])
        selection = model.select_crops(x)
        assert selection.boxes.tolist() == boxes
        torch.testing.assert_close(selection.crops, crops)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_originals_box_is_an_option() -> None:
    x = images()
    corrected = glsim().select_crops(x).boxes
    for options in ({"reference_compat": True}, {"box": "reference"}):
        original = glsim(**options).select_crops(x).boxes
        assert torch.equal(original[:, 0::2], corrected[:, 0::2])
        assert torch.equal(original[:, 1::2], (corrected[:, 1::2] - PATCH).maximum(corrected[:, 0::2] + PATCH))
        assert not torch.equal(original, corrected)
    assert torch.equal(glsim(box="corrected", reference_compat=True).select_crops(x).boxes, corrected)


def test_a_batch_of_one_equals_its_row_of_a_larger_batch() -> None:
    model, x = glsim(), images()
    with torch.inference_mode():
        together = model(x)
        torch.testing.assert_close(torch.cat([model(each[None]) for each in x]), together)


def test_all_patches_selected_or_equal_patches() -> None:
    x = images()
    whole = glsim(top=1000).select_crops(x)
    assert whole.boxes.tolist() == [[0, SIZE, 0, SIZE]] * 3
    torch.testing.assert_close(whole.crops, x)
    model = glsim(top=3)
    with torch.no_grad():
        model.encoder.backbone.pos_embed.zero_()
        equal = model.select_crops(torch.ones(2, 3, SIZE, SIZE))
    assert equal.indices.tolist() == [[0, 1, 2]] * 2
    assert equal.boxes.tolist() == [[0, PATCH, 0, 3 * PATCH]] * 2


def test_one_selected_patch_is_enlarged_to_the_whole_image() -> None:
    selection = glsim(top=1).select_crops(images())
    sides = selection.boxes[:, 1::2] - selection.boxes[:, 0::2]
    assert (sides == PATCH).all()
    assert selection.crops.shape == (3, 3, SIZE, SIZE)


def test_a_border_without_patches_is_never_cropped() -> None:
    model, x = glsim(top=1000, size=43), images(size=43)
    assert model.select_crops(x).boxes.tolist() == [[0, 40, 0, 40]] * 3
    assert model(x).shape == (3, 5)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_registers_are_not_compared_and_a_token_for_crops_has_the_class_tokens_place(no_embed_class: bool) -> None:
    host = {"reg_tokens": 2, "no_embed_class": no_embed_class}
    model, x = glsim(host=host, crop_class_token=True), images()
    assert model.select_crops(x).similarity.shape == (3, (SIZE // PATCH) ** 2)
    with torch.inference_mode():
        features = model.encoder.backbone.forward_features(x)
        similarity = functional.cosine_similarity(features[:, :1], features[:, 3:], dim=2)
        torch.testing.assert_close(model.select_crops(x).similarity, similarity)
        # with the encoder's token in its place, both passes are the plain transformer's
        other = copy.deepcopy(model)
        other.encoder.backbone.cls_token.copy_(model.crop_class_token)
        crops = model.select_crops(x).crops
        crop_token = model.trace(x)[1].trace["cls_crop"]
        torch.testing.assert_close(crop_token, other.encoder.backbone.forward_features(crops)[:, 0])


def test_without_the_final_norm_outputs_of_the_last_block_are_used() -> None:
    model, x = glsim(final_norm=False, crop_class_token=True), images()
    assert not [name for name, _ in model.named_parameters() if name.startswith("encoder.backbone.norm")]
    assert model.aggregator[-1].eps == 1e-5
    with torch.inference_mode():
        raw = model.encoder.encode(x).x
        torch.testing.assert_close(model.trace(x)[1].trace["encoder_norm_out_global"], raw)


def test_a_norm_after_pooling_is_applied_to_tokens() -> None:
    model = glsim(host={"global_pool": "avg"})
    assert isinstance(model.encoder.backbone.fc_norm, nn.LayerNorm)
    tokens = model.trace(images())[1].trace["encoder_norm_out_global"]
    raw = model.encoder.encode(images()).x
    torch.testing.assert_close(tokens, model.encoder.backbone.fc_norm(raw).detach())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_norm": False, "crop_class_token": True},
        {"classifier": "avg", "aggregator": None},
        {"classifier": "max", "representation": 32},
        {"aggregator": "dwsc", "select_tokens": True, "token_drop": 0.2},
        {"aggregator": "conv", "select_tokens": True},
        {"aggregator": "conv"},
        {"aggregator_depth": 2, "aggregator_heads": 4},
    ],
)
def test_every_parameter_is_trained(options: dict[str, Any]) -> None:
    model = glsim(**options).train()
    functional.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    dead = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    # a bias of keys shifts all scores of a query equally
    assert [name for name in dead if not name.endswith("qkv.bias")] == []


def test_both_passes_have_a_gradient_and_selecting_has_none() -> None:
    model, x = glsim(), images()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(3, 5, generator=generator)
    model.double()
    x, direction = x.double(), direction.double()
    (model(x) * direction).sum().backward()
    crops = model.select_crops(x).crops
    weight = model.encoder.backbone.patch_embed.proj.weight
    found, weight.grad = weight.grad.clone(), None
    passes = [model.encoder.pool(model.encoder.encode(each)) for each in (x, crops)]
    parts = []
    for kept in (0, 1):
        tokens = torch.stack([each if i == kept else each.detach() for i, each in enumerate(passes)], dim=1)
        loss = (model.head(model.aggregator(tokens)[:, 0]) * direction).sum()
        parts.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
    assert all(part.abs().max() > 1e-3 * found.abs().max() for part in parts)
    torch.testing.assert_close(found, sum(parts))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for enable in (False, True):
        model = glsim().train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        found.append(model.encoder.backbone.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [partial(glsim, top=1000), partial(rams, threshold=0.0)])
def test_logits_under_bfloat16_autocast_are_near_those_in_float32(make: Any) -> None:
    model, x = make(), images()  # with whole crops, as rounding may select another patch
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            short = model(x)
    assert short.isfinite().all()
    assert 0 < (short.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("make", [glsim, rams])
def test_both_passes_compile_to_one_graph(make: Any) -> None:
    model, x = make(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("make", [glsim, rams])
def test_with_test_flip_logits_are_the_mean_with_the_mirror_images_in_evaluation_only(make: Any) -> None:
    model, x = make(), images()
    flipping = make(test_flip=True)
    with torch.inference_mode():
        mean = (model(x) + model(x.flip(3))) / 2
        torch.testing.assert_close(flipping(x), mean)
        assert not torch.allclose(mean, model(x), atol=1e-3)
        torch.testing.assert_close(flipping.train()(x), model(x))


def test_random_selection_follows_the_generator_and_not_the_image() -> None:
    model, x = glsim(anchor_random=True), images()
    torch.manual_seed(5)
    first = model.select_crops(x).indices
    torch.manual_seed(5)
    assert torch.equal(model.select_crops(x.flip(0)).indices, first)
    assert not torch.equal(model.select_crops(x).indices, first)
    assert all(len(set(row)) == 4 for row in first.tolist())


def test_tokens_are_dropped_in_training_only() -> None:
    model, x = glsim(token_drop=1.0, classifier="avg", aggregator=None), images()
    with torch.inference_mode():
        crop_token = model.train().forward_features(x)[:, 1]
        assert not crop_token.any()
        assert model.eval().forward_features(x)[:, 1].any()


def test_without_crops_at_inference_the_images_class_token_alone_is_classified() -> None:
    model, x = glsim(crops_at_inference=False), images()
    with torch.inference_mode():
        expected = model.head(model.encoder.backbone.forward_features(x)[:, 0])
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.train()(x), glsim()(x))
    passes = count(model.eval(), (SIZE, SIZE)).multiply_adds
    assert 1.9 < count(glsim(), (SIZE, SIZE)).multiply_adds / passes < 2.1


def test_classifiers_on_every_token() -> None:
    x = images()
    with torch.inference_mode():
        for classifier, reduce in (("avg", partial(torch.mean, dim=1)), ("max", partial(torch.amax, dim=1))):
            model = glsim(classifier=classifier)
            features = model.forward_features(x)
            assert features.shape == (3, 2, WIDTH)
            torch.testing.assert_close(model(x), reduce(model.head(features)))
            assert model.forward_head(features, pre_logits=True).shape == (3, WIDTH)


def test_selected_tokens_replace_a_second_pass() -> None:
    model, x = glsim(select_tokens=True), images()
    with torch.inference_mode():
        features = model.encoder.backbone.forward_features(x)
        chosen = model.select_crops(x).indices
        parts = torch.stack([row[1 + each] for row, each in zip(features, chosen, strict=True)])
        inputs = torch.cat([features[:, :1], parts], dim=1)
        torch.testing.assert_close(model(x), model.head(model.aggregator(inputs)[:, 0]))
    assert count(model, (SIZE, SIZE)).multiply_adds < 0.75 * count(glsim(), (SIZE, SIZE)).multiply_adds


def test_a_convolutional_aggregator_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    module = ConvAggregator(4, 3, depthwise=True, eps=1e-5)
    normed = module.norm1(x)
    joined = (normed * module.conv1.weight[:, 0].T).sum(1) + module.conv1.bias
    mixed = module.mix.conv(functional.gelu(module.norm2(joined)))
    torch.testing.assert_close(module(x)[:, 0], module.mix.norm(mixed))
    full = ConvAggregator(4, 3, depthwise=False, eps=1e-5)
    joined = torch.einsum("bnc,dcn->bd", full.norm1(x), full.conv1.weight) + full.conv1.bias
    torch.testing.assert_close(full(x)[:, 0], full.norm2(joined))
    with pytest.raises(UsageError, match="convolves 3 tokens, got 2"):
        module(x[:, :2])


def test_the_representation_is_narrower_and_its_heads_64_wide() -> None:
    model = glsim(host={"embed_dim": 192, "num_heads": 3}, representation=128)
    assert model.num_features == 128
    assert model.aggregator[0].attn.num_heads == 2
    assert model(images()).shape == (3, 5)


# -- plug-ins ---------------------------------------------------------------------------------------------------------


class Downsample(Plugin):
    """Halves the grid after the first block, as an inter-layer adapter may do."""

    def after(self, block: int, tokens: Any) -> None:
        if block:
            return
        maps = tokens.patches.transpose(1, 2).unflatten(2, tokens.grid)
        maps = functional.avg_pool2d(maps, 2)
        tokens.grid = tuple(maps.shape[2:])
        tokens.x = torch.cat([tokens.x[:, : tokens.prefix], maps.flatten(2).transpose(1, 2)], dim=1)


class WithinBlocks(Plugin):
    """Appends two tokens inside the blocks only."""

    def begin(self, tokens: Any) -> None:
        tokens.append(torch.ones_like(tokens.x[:, :2]))

    def finish(self, tokens: Any) -> None:
        tokens.x, tokens.extra = tokens.x[:, :-2], 0


class Weighted(Plugin):
    """Adds values of the tokens to the losses."""

    has_losses = True

    def finish(self, tokens: Any) -> None:
        tokens.losses["seen"] = tokens.class_token.square().mean()
        if tokens.targets is not None:
            tokens.losses["targets"] = tokens.targets.float().mean()


def test_a_cell_of_a_downsampled_grid_is_its_share_of_the_image() -> None:
    model = glsim(top=1, host={"plugins": {"down": Downsample()}})
    selection = model.select_crops(images())
    assert selection.similarity.shape == (3, 9)
    row, column = selection.indices[:, 0] // 3, selection.indices[:, 0] % 3
    edges = torch.stack([row, row + 1, column, column + 1], dim=1) * 2 * PATCH
    assert torch.equal(selection.boxes, edges)


def test_tokens_after_the_patches_are_not_compared() -> None:
    cache = CrossLayerCache(WIDTH, depth=4, layers=(1,), num_clr=1, positions=True)
    model = glsim(host={"plugins": {"cache": cache}, "depth": 4})
    selection = model.select_crops(images())
    assert selection.similarity.shape == (3, 36)
    assert model.encoder.encode(images()).extra > 0


def test_losses_of_plugins_are_those_of_both_passes() -> None:
    model, x = glsim(host={"plugins": {"weighted": Weighted()}}), images()
    logits, losses = model(x, with_losses=True)
    crops = model.select_crops(x).crops
    both = sum(model.encoder.encode(each).class_token.square().mean() for each in (x, crops))
    torch.testing.assert_close(losses, {"seen": both})
    torch.testing.assert_close(logits, model(x))
    assert model(x, with_losses=True, targets=torch.tensor([1, 2, 3]))[1]["targets"] == 4
    assert model.has_losses
    assert not model.needs_targets
    assert not glsim().has_losses


def test_methods_that_leave_no_grid_are_refused_with_both_names() -> None:
    reduction = make_reduction("evit", keep_rate=0.5, layers=(0,), depth=DEPTH, width=WIDTH, tokens=36)
    for make, name in ((glsim, "GLSim"), (rams, "RAMS-Trans")):
        with pytest.raises(UsageError, match=rf"{name} .* reduction EViT leaves no grid"):
            make(host={"plugins": {"reduction": reduction}})
        with pytest.raises(UsageError, match="patch_drop_rate"):
            make(host={"patch_drop_rate": 0.5})


class Widens(Plugin):
    """Returns its own feature for the head."""

    feature_width = 3

    def head_feature(self, feature: Any, tokens: Any) -> Any:
        return feature[:, :3]


def test_encoders_whose_head_reads_something_else_are_refused() -> None:
    host = encoder().backbone
    gathering = TokenVisionTransformer(host, {}, 5, partial(IFAHead, DEPTH, WIDTH), gathers=range(DEPTH))
    reading = TokenVisionTransformer(encoder().backbone, {}, 5, lambda classes: nn.Identity(), reads="patches")
    for wrong in (gathering, reading, encoder(plugins={"widens": Widens()})):
        with pytest.raises(UsageError, match="class tokens of image and crop"):
            GLSim(wrong, 5)
    assert RAMSTrans(encoder(plugins={"widens": Widens()}), 5)(images()).shape == (3, 5)
    without = bare(class_token=False, global_pool="avg")
    averaging = TokenVisionTransformer(without, {}, 5, lambda classes: nn.Identity(), reads="patches")
    for kind, name in ((GLSim, "GLSim"), (RAMSTrans, "RAMS-Trans")):
        with pytest.raises(UsageError, match=f"{name} needs a class token"):
            kind(averaging, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "dot"}, "metric must be one of cos, l1, l2, not 'dot'"),
        ({"classifier": "min"}, "classifier must be one of cls, avg, max"),
        ({"aggregator": "lstm"}, "aggregator must be one of transformer, dwsc, conv"),
        ({"aggregator": None}, "set classifier to avg or max"),
        ({"top": 0}, "top is the number of selected patches"),
        ({"representation": -1}, "representation must be a whole number from 1"),
        ({"aggregator_heads": 5}, "must divide the width 64"),
        ({"aggregator_depth": 0}, "aggregator_depth must be a whole number from 1"),
        ({"token_drop": 1.5}, "token_drop"),
        ({"box": "loose"}, "no box is called 'loose'"),
        ({"select_tokens": True, "crop_class_token": True}, "no use for crop_class_token"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GLSim(encoder(), 5, **options)


# -- what timm asks of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [glsim, rams])
def test_it_has_timms_methods(make: Any) -> None:
    model = make(crop_class_token=True)
    assert model.num_classes == 5
    assert model.get_classifier().out_features == 5
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(images()).shape == (3, 7)
    with pytest.raises(UsageError, match="pool"):
        model.reset_classifier(7, "avg")
    assert {"crop_class_token", "encoder.backbone.pos_embed"} <= model.no_weight_decay()
    names = dict(model.named_parameters())
    assert {name for name in names if name.startswith("encoder.backbone.")} == model.backbone_parameters()
    assert model.feature_info[0]["module"].startswith("encoder.backbone.blocks")
    features = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(features), model(images()))


def test_layer_decay_goes_by_depth() -> None:
    model = glsim(crop_class_token=True, representation=32)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(each)]: group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
    assert scales.keys() == set(names.values())
    assert scales["head.weight"] == scales["aggregator.0.mlp.fc1.weight"] == scales["reduce.weight"] == 1
    assert scales["encoder.backbone.norm.weight"] == 1
    block = scales["encoder.backbone.blocks.0.mlp.fc1.weight"]
    assert scales["crop_class_token"] == scales["encoder.backbone.cls_token"] < block < 1


def test_weights_of_a_bare_transformer_and_of_its_own_are_read() -> None:
    bare = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=64, embed_dim=WIDTH, depth=DEPTH, num_heads=2, patch_size=PATCH
    )
    nn.init.normal_(bare.cls_token)
    variants: list[dict[str, Any]] = [{"crop_class_token": True}, {"crop_class_token": True, "final_norm": False}]
    for options in variants:
        model = glsim(**options)
        adapted = model.adapt_state_dict(bare.state_dict(), model)
        missing, unexpected = model.load_state_dict(adapted, strict=False)
        assert unexpected == []
        assert all(name.startswith(("aggregator.", "head.")) for name in missing)
        assert torch.equal(model.crop_class_token, bare.cls_token)
        assert model.encoder.backbone.pos_embed.shape[1] == 37  # resampled from 65
    again = glsim(crop_class_token=True, final_norm=False)
    again.load_state_dict(again.adapt_state_dict(model.state_dict()))
    assert torch.equal(again(images()), model(images()))


def test_a_token_for_crops_starts_as_the_class_token() -> None:
    host = encoder()
    nn.init.normal_(host.backbone.cls_token)
    model = GLSim(host, 5, crop_class_token=True)
    assert torch.equal(model.crop_class_token, host.backbone.cls_token)
    assert model.crop_class_token is not host.backbone.cls_token


def test_the_trace_has_the_selection() -> None:
    model, x = glsim(), images()
    logits, tokens = model.trace(x)
    torch.testing.assert_close(logits, model(x))
    selection = model.select_crops(x)
    assert torch.equal(tokens.trace["topk_idx"], selection.indices)
    assert torch.equal(tokens.trace["crop_box_rows0_rows1_cols0_cols1"], selection.boxes)
    torch.testing.assert_close(tokens.trace["crops"], selection.crops)
    torch.testing.assert_close(tokens.trace["similarity"], selection.similarity)
    assert tokens.grid == (6, 6)
    assert {"block0.cls", "crop.block1.cls"} <= tokens.trace.keys()


# -- RAMS-Trans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (40, 56)])
@pytest.mark.parametrize("relative_to", ["mean", "max"])
def test_rams_logits_are_the_mean_of_image_and_crop(size: Any, relative_to: Any) -> None:
    model = rams(size=size, relative_to=relative_to, threshold=0.98, host={"reg_tokens": 1})
    x, grid = images(size=size), (size[0] // 8, size[1] // 8) if isinstance(size, tuple) else (6, 6)
    with torch.inference_mode():
        with record_attention(model.encoder) as recorder:
            first = model.encoder(x)
        joint = rollout(recorder.pop_weights())[:, 0, 2:].reshape(-1, *grid)
        boxes = []
        for attention in joint:
            cells = [[attention[r : r + 2, c : c + 2] for c in range(0, grid[1], 2)] for r in range(0, grid[0], 2)]
            means = torch.stack([torch.stack([cell.mean() for cell in row]) for row in cells])
            peak = means.mean() if relative_to == "mean" else means.max()
            row, column = (means >= 0.98 * peak).nonzero().unbind(1)
            edges = int(row.min()), int(row.max()) + 1, int(column.min()), int(column.max()) + 1
            boxes.append([min(16 * edge, 8 * grid[i // 2]) for i, edge in enumerate(edges)])
        assert model.select_crops(x).boxes.tolist() == boxes
        second = model.encoder(cropped_one_by_one(x, torch.tensor(boxes)))
        torch.testing.assert_close(model(x), (first + second) / 2, rtol=1e-4, atol=1e-5)


def test_rams_crops_the_whole_image_where_no_cell_reaches_the_threshold() -> None:
    model = rams(relative_to="max", threshold=2.0)
    region = model.select_crops(images())
    assert not region.mask.any()
    assert region.boxes.tolist() == [[0, SIZE, 0, SIZE]] * 3
    torch.testing.assert_close(region.crops, images())


def test_rams_with_top_bounds_the_most_attended_patches() -> None:
    model = rams(top=3, pool=1)
    region = model.select_crops(images())
    expected = region.attention.topk(3).indices
    assert torch.equal(region.mask.flatten(1).sum(1), torch.full((3,), 3))
    assert torch.equal(region.boxes, patch_box(expected, (6, 6), (SIZE, SIZE)))


def test_rams_trains_every_parameter_and_records_in_the_first_pass_only() -> None:
    model, x = rams(crop_class_token=True).train(), images()
    functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    assert not model.encoder.plugins["rollout"].opens
    assert model.encoder.plugins["rollout"].pop_weights() == []
    assert not [name for name in model.state_dict() if "rollout" in name]


def test_rams_works_with_heads_over_blocks_and_refuses_changing_numbers_of_tokens() -> None:
    host = encoder()
    gathering = TokenVisionTransformer(host.backbone, {}, 5, partial(IFAHead, DEPTH, WIDTH), gathers=range(DEPTH))
    assert RAMSTrans(gathering, 5)(images()).shape == (3, 5)
    model = rams(host={"plugins": {"down": Downsample()}})
    with pytest.raises(UsageError, match=r"block 1 attends from 10 to 10 tokens after 37"):
        model(images())
    model = rams(host={"plugins": {"within": WithinBlocks()}})
    with pytest.raises(UsageError, match="of 39 tokens 37 are left"):
        model(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"relative_to": "median"}, "relative_to must be one of mean, max"),
        ({"pool": 0}, "pool must be a whole number from 1"),
        ({"top": 0}, "top is the number of selected patches"),
    ],
)
def test_invalid_options_of_rams(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rams(**options)
