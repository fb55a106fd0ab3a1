"""Prompts and queries: their places, their effect, and the input of the head."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.models.cla import CLAHead
from animesion_training.tokens import TokenVisionTransformer
from animesion_training.tokens.adapters import make_adapter
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.reductions import make_reduction

WIDTH, CLASSES, PATCH, DEPTH = 24, 5, 4, 4


def backbone(grid=(6, 6), registers=0):
    torch.manual_seed(0)
    size = (PATCH * grid[0], PATCH * grid[1])
    made = VisionTransformer(
        size, PATCH, num_classes=0, embed_dim=WIDTH, depth=DEPTH, num_heads=3, reg_tokens=registers
    )
    with torch.no_grad():  # with initial weights all tokens would be similar
        for block in made.blocks:
            block.attn.qkv.weight.mul_(20)
        made.pos_embed.mul_(20)
    return made


def hosted(*plugins, registers=0):
    host = backbone(registers=registers)
    torch.manual_seed(1)
    made = {str(i): plugin for i, plugin in enumerate(plugins)}
    model = TokenVisionTransformer(host, made, CLASSES).eval()
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.normal_()
    return model


def random_images(batch=2):
    return torch.randn(batch, 3, 6 * PATCH, 6 * PATCH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("registers", [0, 2])
def test_prompts_follow_class_token_and_registers(deep, registers):
    model = hosted(PromptTuning(WIDTH, depth=DEPTH, deep=deep, count=3), registers=registers)
    host, prompts, images = model.backbone, model.plugins["0"].prompts, random_images()
    assert len(prompts) == (DEPTH if deep else 1)
    x = host._pos_embed(host.patch_embed(images))
    front, patches = x[:, : 1 + registers], x[:, 1 + registers :]
    own = prompts[0].expand(2, -1, -1)
    for i, block in enumerate(host.blocks):
        if deep:
            own = prompts[i].expand(2, -1, -1)
        front, own, patches = block(torch.cat([front, own, patches], 1)).split([1 + registers, 3, 36], 1)
    logits, tokens = model.trace(images)
    assert torch.allclose(logits, model.head(host.norm(front)[:, 0]), atol=1e-5)
    assert tokens.prefix == 1 + registers + 3
    assert tokens.grid == (6, 6)


def test_prompts_start_within_the_xavier_bound_of_the_patch_embedding():
    torch.manual_seed(0)
    prompts = PromptTuning(WIDTH, depth=DEPTH, patch_size=(8, 4)).prompts
    bound = math.sqrt(6 / (3 * 32 + WIDTH))
    assert prompts.shape == (DEPTH, 100, WIDTH)
    assert prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("kind", [PromptTuning, QueryTuning])
def test_prompts_are_dropped_out_in_training_alone(kind):
    model = hosted(kind(WIDTH, depth=DEPTH, count=3, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(model(random_images()), model(random_images()))
        model.train()
        assert not torch.equal(model(random_images()), model(random_images()))


@pytest.mark.parametrize("registers", [0, 2])
def test_queries_summarise_each_block_without_a_change_to_it(registers):
    model = hosted(QueryTuning(WIDTH, depth=DEPTH, count=2), registers=registers)
    host, queries, images = model.backbone, model.plugins["0"].queries, random_images()
    x = host._pos_embed(host.patch_embed(images))
    parts = []
    for block, own in zip(host.blocks, queries, strict=True):
        own = own.expand(2, -1, -1)
        q, k, v = block.attn.qkv(block.norm1(torch.cat([own, x], 1))).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :2] @ k[:, :, 2:].transpose(-2, -1) / math.sqrt(8)).softmax(-1)
        own = own + block.attn.proj((weights @ v[:, :, 2:]).transpose(1, 2).flatten(2))
        own = own + block.mlp(block.norm2(own))
        parts.append(functional.normalize(own.flatten(1), dim=1))
        x = block(x)
    feature = torch.cat([*parts, functional.normalize(host.norm(x)[:, 0], dim=1)], 1)
    with torch.inference_mode():
        logits, tokens = model.trace(images)
        assert torch.allclose(model.forward_features(images), feature, atol=1e-5)
    assert torch.allclose(logits, model.head(feature), atol=1e-5)
    assert torch.allclose(tokens.x, x, atol=1e-5)
    assert tokens.prefix == 1 + registers


def test_the_head_is_as_wide_as_the_queries_make_it_also_after_a_reset():
    model = hosted(QueryTuning(WIDTH, depth=DEPTH, count=2))
    assert model.num_features == model.head.in_features == WIDTH * (1 + 2 * DEPTH)
    model.reset_classifier(9)
    assert model(random_images()).shape == (2, 9)


@pytest.mark.parametrize("reduction", ["evit", "tome", "ats", "dynamicvit", "dpcknn"])
def test_a_reduction_drops_the_same_tokens_with_queries_and_without(reduction):
    plan: dict[str, Any] = {"keep_rate": 0.5, "layers": (1, 2), "depth": DEPTH, "width": WIDTH, "tokens": 36}
    torch.manual_seed(4)
    plugin = make_reduction(reduction, **plan)
    parameters = [value.clone() for value in plugin.parameters()]
    with_queries = hosted(QueryTuning(WIDTH, depth=DEPTH, count=3), plugin)
    with torch.no_grad():
        for value, before in zip(plugin.parameters(), parameters, strict=True):
            value.copy_(before)
    alone = TokenVisionTransformer(backbone(), {"reduction": plugin}, CLASSES).eval()
    _, tokens = with_queries.trace(random_images())
    _, expected = alone.trace(random_images())
    assert tokens.x.shape == expected.x.shape
    assert torch.allclose(tokens.x, expected.x, atol=1e-5)
    assert tokens.prefix == 1


@pytest.mark.parametrize("training", [False, True])
def test_queries_and_prompts_go_with_reduction_and_cache_in_training_too(training):
    plan: dict[str, Any] = {"keep_rate": 0.5, "layers": (1, 2), "depth": DEPTH, "width": WIDTH}
    plugins = [
        PromptTuning(WIDTH, depth=DEPTH, count=2),
        QueryTuning(WIDTH, depth=DEPTH, count=3),
        make_reduction("dynamicvit", tokens=36, **plan),
        CrossLayerCache(WIDTH, depth=DEPTH, layers=(1, 2)),
    ]
    model = hosted(*plugins).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        logits, losses = model(random_images(), with_losses=True)
    (logits.float().square().mean() + sum(losses.values())).backward()
    assert model.plugins["1"].queries.grad.abs().sum() > 0
    assert model.plugins["0"].prompts.grad.isfinite().all()


def test_prompts_and_queries_have_no_weight_decay():
    model = hosted(PromptTuning(WIDTH, depth=DEPTH, count=2), QueryTuning(WIDTH, depth=DEPTH, count=2))
    assert {"plugins.0.prompts", "plugins.1.queries"} <= model.no_weight_decay()


def test_a_head_reads_one_kind_of_input():
    def made(**head):
        plugins = dict(make_adapter("vqt", depth=DEPTH, width=WIDTH, grid=(6, 6), count=2))
        return TokenVisionTransformer(backbone(), plugins, CLASSES, **head)

    with pytest.raises(UsageError, match="a head reads one of"):
        made(head=lambda classes: CLAHead(2, WIDTH, classes), gathers=(1, 3))
    with pytest.raises(UsageError, match="a head reads one of"):
        made(reads="patches")
