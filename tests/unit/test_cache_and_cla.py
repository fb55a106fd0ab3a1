"""The cross-layer cache: which tokens it recovers, and where; the CLA head and IFA heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.models.cla import CLAHead
from animesion_training.models.heads import IFAHead
from animesion_training.tokens import Plugin, TokenVisionTransformer
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.reductions import make_reduction

WIDTH, CLASSES, PATCH = 24, 5, 4


class Spy(Plugin):
    """Records the tokens after each block, before or after the cache, depending on its place among plug-ins."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after(self, block, tokens):
        self.seen.append(tokens.x)


def backbone(depth=12, registers=0, grid=(4, 4), **options):
    torch.manual_seed(0)
    size = (PATCH * grid[0], PATCH * grid[1])
    return VisionTransformer(
        size, PATCH, num_classes=0, embed_dim=WIDTH, depth=depth, num_heads=3, reg_tokens=registers, **options
    )


def cached(depth=12, layers=(3, 6, 9), reduction=None, keep_rate=0.5, registers=0, host_options=None, **options):
    """A model with recorders around its cache, freshly seeded."""
    host = backbone(depth, registers, **(host_options or {}))
    torch.manual_seed(1)
    plugins: dict[str, Any] = {"first": Spy()}
    if reduction:
        plan = {"keep_rate": keep_rate, "layers": layers, "depth": depth, "width": WIDTH, "tokens": 16}
        plugins = {"reduction": make_reduction(reduction, **plan), **plugins}
    plugins |= {"cache": CrossLayerCache(WIDTH, depth=depth, layers=layers, **options), "second": Spy()}
    return TokenVisionTransformer(host, plugins, CLASSES).eval()


def run(model, batch=2):
    """Tokens before and after the cache, by block."""
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(images)
    return model.plugins["first"].seen, model.plugins["second"].seen


def numbers(seen):
    return [x.shape[1] for x in seen]


def test_six_six_six_and_two_tokens_are_recovered():
    before, after = run(cached())
    assert [later - earlier for earlier, later in zip(numbers(before), numbers(after), strict=True)] == (
        [0, 0, 0, 6, 0, 0, 6, 0, 0, 6, 2, 0]
    )
    assert numbers(before)[0] == 1 + 16 + 1
    assert numbers(after)[-1] == 1 + 16 + 1 + 20


@pytest.mark.parametrize("num_clr", [1, 2])
def test_recovered_tokens_are_mean_and_registers_of_each_block(num_clr):
    before, after = run(cached(num_clr=num_clr))
    first = [torch.cat([before[i][:, 1:17].mean(1, keepdim=True), before[i][:, 17:]], dim=1) for i in range(3)]
    assert torch.allclose(after[3], torch.cat([before[3], *first], dim=1), atol=1e-6)
    behind = 3 * (1 + num_clr)  # tokens recovered last, of which the last are the registers
    second = [
        torch.cat([x[:, 1:-behind].mean(1, keepdim=True), x[:, -num_clr:]], dim=1)
        for x in (after[3], before[4], before[5])
    ]
    assert torch.allclose(after[6], torch.cat([before[6], *second], dim=1), atol=1e-6)
    last = after[9]
    assert torch.allclose(after[10][:, -1 - num_clr], last[:, 1:-behind].mean(1), atol=1e-6)
    assert torch.equal(after[10][:, -num_clr:], last[:, -num_clr:])


def test_the_mean_can_include_class_token_and_registers():
    before, after = run(cached(layers=(1,), depth=6, include_gap=False))
    assert numbers(after)[1] - numbers(before)[1] == 1
    assert torch.equal(after[1][:, -1], before[0][:, -1])
    before, after = run(cached(layers=(1,), depth=6, num_clr=0))
    assert numbers(before)[0] == 17
    assert torch.allclose(after[1][:, -1], before[0][:, 1:].mean(1), atol=1e-6)
    before, after = run(cached(layers=(1,), depth=6, pool_cls=True))
    assert torch.allclose(after[1][:, -2], before[0][:, :17].mean(1), atol=1e-6)
    before, after = run(cached(layers=(1,), depth=6, pool_clr=True))
    assert torch.allclose(after[1][:, -2], before[0][:, 1:].mean(1), atol=1e-6)


def test_transformer_registers_count_in_no_mean_but_the_class_token_may():
    before, after = run(cached(layers=(1,), depth=6, registers=3))
    assert torch.allclose(after[1][:, -2], before[0][:, 4:20].mean(1), atol=1e-6)
    before, after = run(cached(layers=(1,), depth=6, registers=3, pool_cls=True))
    chosen = torch.cat([before[0][:, :1], before[0][:, 4:20]], dim=1)
    assert torch.allclose(after[1][:, -2], chosen.mean(1), atol=1e-6)


def test_the_last_recovery_can_be_left_out():
    before, after = run(cached(recover_at_last=False))
    grown = [later - earlier for earlier, later in zip(numbers(before), numbers(after), strict=True)]
    assert grown == [0, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0]


def test_reductions_treat_recovered_tokens_like_others():
    before, after = run(cached(reduction="evit"))
    # 17 after the class token, 9 and a fused one, 6 more; 8 of 16 and a fused one, 6 more; 8 of 15 and so on
    assert [numbers(before)[i] - 1 for i in (0, 3, 6, 9)] == [17, 10, 9, 9]
    assert [numbers(after)[i] - 1 for i in (3, 6, 9, 10)] == [16, 15, 15, 17]


def test_clustering_does_not_change_recovered_tokens():
    before, after = run(cached(reduction="dpcknn"))
    assert [numbers(before)[i] - 1 for i in (3, 6, 9)] == [8 + 1, 4 + 7, 2 + 13]
    assert numbers(after)[-1] == 1 + 2 + 1 + 20


@pytest.mark.parametrize("name", ["tome", "dynamicvit", "cropr"])
def test_an_absolute_plan_does_not_count_recovered_tokens(name):
    before, _ = run(cached(reduction=name))
    assert [numbers(before)[i] - 1 for i in (3, 6, 9)] == [8 + 1, 4 + 7, 2 + 13]


def test_merging_over_blocks_keeps_registers_at_the_end():
    model = cached(reduction="tome", keep_rate=0.1)
    before, after = run(model)
    assert numbers(before)[4] < numbers(after)[3]  # block 4 merged on
    for block in (4, 5):
        assert numbers(before)[block] - 1 >= 7
    recovered = after[6][:, -6:]
    assert torch.equal(recovered[:, 1], after[3][:, -1])
    assert torch.equal(recovered[:, 3], before[4][:, -1])
    assert torch.allclose(recovered[:, 2], before[4][:, 1:-6].mean(1), atol=1e-6)


def test_means_leave_out_padding():
    """The number of tokens that ATS keeps differs between images."""
    model = cached(reduction="ats")
    with torch.no_grad():  # with initial weights all tokens get the same attention
        for block in model.backbone.blocks:
            block.attn.qkv.weight.mul_(20)
    before, after = run(model, batch=4)
    alone = []
    for i in range(4):
        single = copy.deepcopy(model)
        single.plugins["first"].seen, single.plugins["second"].seen = [], []
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            single(images[i : i + 1])
        alone.append(single.plugins["second"].seen)
    assert len({numbers(each)[3] for each in alone}) > 1
    for i, each in enumerate(alone):
        assert torch.allclose(after[6][i, -6:], each[6][0, -6:], atol=1e-5)
    assert numbers(after)[3] == numbers(before)[3] + 6


def test_registers_start_at_the_class_token():
    model = cached(num_clr=2)
    cache = model.plugins["cache"]
    assert not cache.clr.any()
    cache.copy_class_token(model.backbone.cls_token)
    assert torch.equal(cache.clr, model.backbone.cls_token.expand(1, 2, -1))
    assert cache.clr.requires_grad
    assert model.no_weight_decay() >= {"plugins.cache.clr", "plugins.cache.positions", "backbone.cls_token"}


def test_registers_pass_the_norm_that_clip_has_before_its_blocks():
    model = cached(depth=2, layers=(0,), host_options={"pre_norm": True})
    host, cache = model.backbone, model.plugins["cache"]
    for block in host.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    before, _ = run(model)
    assert torch.allclose(before[0][:, -1], host.norm_pre(cache.clr + cache.positions)[:, 0].expand(2, -1), atol=1e-6)


def test_positions_of_registers_are_left_out_where_the_class_token_has_none():
    assert CrossLayerCache(WIDTH, depth=12, positions=False).positions is None
    assert CrossLayerCache(WIDTH, depth=12, num_clr=0).no_weight_decay() == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clr": -1}, "from 0"),
        ({"num_clr": 0, "include_gap": False}, "nothing to cache"),
        ({"layers": (3, 12)}, "from 0 to 11"),
        ({"pool_cls": "no"}, "true or false"),
    ],
)
def test_bad_settings_raise_one_sentence(options, message):
    with pytest.raises(UsageError, match=message):
        CrossLayerCache(WIDTH, depth=12, **options)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_cla_weights_each_channel_of_each_layer(groups):
    torch.manual_seed(0)
    head = CLAHead(4, WIDTH, CLASSES, groups)
    tokens = torch.randn(6, WIDTH, 4)
    logits = head(tokens)
    flat = tokens.transpose(1, 2).flatten(0, 1)
    normed = (tokens - flat.mean(0)[:, None]) / (flat.var(0, correction=0)[:, None] + 1e-5).sqrt()
    weights = head.layers.weight.view(WIDTH, groups, 4)
    mixed = torch.einsum("bdl,dgl->bdg", normed, weights).flatten(1) + head.layers.bias
    mixed = (mixed - mixed.mean(0)) / (mixed.var(0, correction=0) + 1e-5).sqrt()
    expected = functional.gelu(mixed) @ head.fc.weight[..., 0].T + head.fc.bias
    assert torch.allclose(logits, expected, atol=1e-5)


def test_cla_has_the_published_number_of_parameters():
    parameters = sum(value.numel() for value in CLAHead(4, 768, 200).parameters())
    assert parameters / 1e6 == pytest.approx(0.320, abs=0.0005)


def test_cla_accepts_a_single_image_in_evaluation_only():
    head = CLAHead(3, WIDTH, CLASSES)
    with pytest.raises(UsageError, match="batch of one"):
        head(torch.randn(1, WIDTH, 3))
    assert head.eval()(torch.randn(1, WIDTH, 3)).shape == (1, CLASSES)
    with pytest.raises(UsageError, match="from 1"):
        CLAHead(3, WIDTH, CLASSES, groups=0)


def test_cla_classifies_from_the_ends_of_groups_and_the_final_norm_is_dropped():
    host = backbone(depth=6)
    plugins = {"cache": CrossLayerCache(WIDTH, depth=6, layers=(1, 3))}
    model = TokenVisionTransformer(host, plugins, CLASSES, lambda classes: CLAHead(3, WIDTH, classes), (1, 3, 5))
    model.eval()
    _, tokens = model.trace(torch.randn(2, 3, 16, 16))
    gathered = torch.stack([tokens.trace[f"block{i}.cls"] for i in (1, 3, 5)], dim=-1)
    assert torch.equal(model.pool(tokens), gathered)
    assert not [name for name, _ in model.named_parameters() if name.startswith("backbone.norm.")]
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert model.num_classes == 3


def test_the_epsilon_of_the_aggregating_norm_can_be_chosen():
    assert IFAHead(4, WIDTH, CLASSES).norm.eps == 1e-12
    assert IFAHead(4, WIDTH, CLASSES, eps=1e-5).norm.eps == 1e-5
