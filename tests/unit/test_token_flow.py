"""Attention rollout through methods that move tokens, against the product written out."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from animesion.errors import UsageError
from animesion_training.models import create_model
from animesion_training.tokens.rollout import class_rollout, record_attention, rollout
from animesion_training.tokens.token_flow import rollout_map

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}
SIDE = 64  # 4 x 4 patches


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16", 3, SIDE, **options, **SMALL).eval()
    with torch.no_grad():  # attention of initial weights is nearly uniform
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def image() -> Any:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def step(attention: Any, residual: Any) -> Any:
    """Attention (heads, T', T) with its residual connection (T', T), rows of sum 1."""
    joint = attention.mean(0) + residual
    return joint / joint.sum(1, keepdim=True)


def onwards(weights: list[Any], first: int, product: Any) -> Any:
    """The product with the attention of the blocks from `first` on, which keep their tokens."""
    for each in weights[first:]:
        product = step(each, torch.eye(len(product))) @ product
    return product


def recorded(model: Any, x: Any) -> tuple[list[Any], dict[str, Any]]:
    with torch.inference_mode(), record_attention(model) as recorder:
        trace = model.trace(x)[1].trace
    return [each[0] for each in recorder.pop_weights()], trace


def test_without_methods_it_is_the_plain_rollout() -> None:
    plain, hosted = network(), network(adapter="lora")
    x = image()
    weights, _ = recorded(hosted, x)
    expected = class_rollout([each[None] for each in weights])[:, 1:].view(1, 4, 4)
    torch.testing.assert_close(rollout_map(hosted, x), expected)
    found = rollout_map(plain, x)
    tokens = plain._pos_embed(plain.patch_embed(x))
    steps = []
    with torch.inference_mode():
        for block in plain.blocks:
            q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(1, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            steps.append((q @ k.transpose(2, 3) / 4).softmax(-1))
            tokens = block(tokens)
    torch.testing.assert_close(found, rollout(steps)[:, 0, 1:].view(1, 4, 4))


def test_fused_attention_is_switched_back_on() -> None:
    model = network()
    before = [block.attn.fused_attn for block in model.blocks]
    rollout_map(model, image())
    assert [block.attn.fused_attn for block in model.blocks] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pooled_patches_have_the_mean_of_their_rows() -> None:
    model = network(global_pool="avg")
    x = image()
    weights = []
    hooks = [b.attn.attn_drop.register_forward_pre_hook(lambda _, a: weights.append(a[0])) for b in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(rollout_map(model, x), rollout(weights)[:, 1:, 1:].mean(1).view(1, 4, 4))


def test_dropped_tokens_leave_the_product() -> None:
    model = network(reduction="topk", keep_rate=0.5, reduction_layers=[1])
    x = image()
    weights, trace = recorded(model, x)
    kept = torch.cat([torch.tensor([0]), 1 + trace["block1.kept_idx"][0]])
    assert [each.shape[-1] for each in weights] == [17, 17, 9, 9]
    selected = torch.eye(17)[kept]  # after the attention of block 1
    product = onwards(weights, 2, selected @ onwards(weights[:2], 0, torch.eye(17)))
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])
    torch.testing.assert_close(product.sum(1), torch.ones(9))


def test_the_fused_token_is_the_mean_of_the_dropped_ones_by_attention() -> None:
    model = network(reduction="evit", keep_rate=0.5, reduction_layers=[1])
    x = image()
    weights, trace = recorded(model, x)
    kept = trace["block1.kept_idx"][0][:-1]
    dropped = trace["block1.fused_idx"][0]
    shares = torch.zeros(17)
    shares[1 + dropped] = weights[1].mean(0)[0, 1 + dropped]
    selected = torch.cat([torch.eye(17)[:1], torch.eye(17)[1 + kept], (shares / shares.sum())[None]])
    product = onwards(weights, 2, selected @ onwards(weights[:2], 0, torch.eye(17)))
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])


def test_merged_tokens_are_means_by_their_size() -> None:
    model = network(reduction="tome", keep_rate=[0.75, 0.7], reduction_layers=[0, 1])
    x = image()
    weights, trace = recorded(model, x)
    product = step(weights[0], torch.eye(17))
    sizes = torch.ones(16)
    for block in (0, 1):
        places = trace[f"block{block}.cluster_assign"][0].long()
        member = torch.nn.functional.one_hot(places).T * sizes
        sizes = member.sum(1)
        torch.testing.assert_close(sizes, trace[f"block{block}.attn_size"][0, 1:, 0])
        product = torch.block_diag(torch.eye(1), member / sizes[:, None]) @ product
        product = onwards(weights[: block + 2], block + 1, product)
    product = onwards(weights, 3, product)
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])


def test_sampled_tokens_keep_their_own_residual() -> None:
    model = network(reduction="ats", keep_rate=0.5, reduction_layers=[1])
    x = image()
    weights, trace = recorded(model, x)
    rows = trace["block1.sample_ids"][0]
    assert weights[1].shape[1:] == (len(rows), 17)  # queries were dropped before the attention
    product = step(weights[0], torch.eye(17))
    product = onwards(weights, 2, step(weights[1], torch.eye(17)[rows]) @ product)
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])


def test_a_grid_that_shrinks_is_a_mean_over_windows() -> None:
    model = network(adapter="ila", method_options={"adapter": {"locations": [0]}})
    x = image()
    weights, _ = recorded(model, x)
    assert [each.shape[-1] for each in weights] == [17, 5, 5, 5]
    windows = torch.zeros(4, 4, 4)
    for cell, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        windows[cell, row : row + 3, column : column + 3] = 1 / 9
    product = torch.block_diag(torch.eye(1), windows.view(4, 16)) @ step(weights[0], torch.eye(17))
    product = onwards(weights, 1, product)
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])


def test_prompts_of_a_block_have_seen_nothing() -> None:
    model = network(adapter="vpt-deep", method_options={"adapter": {"count": 2}})
    x = image()
    weights, _ = recorded(model, x)
    product = torch.eye(19)
    for each in weights:
        product[1:3] = torch.eye(19)[1:3]
        product = step(each, torch.eye(19)) @ product
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 3:])


def test_images_of_a_batch_do_not_change_each_other() -> None:
    model = network(reduction="ats", keep_rate=0.5, reduction_layers=[1])
    x = torch.cat([image(), -image()])
    torch.testing.assert_close(rollout_map(model, x), torch.cat([rollout_map(model, each) for each in x.split(1)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sit", "keep_rate": 0.5, "reduction_layers": [1]}, "its tokens are learned mixtures"),
        ({"selector": "transfg"}, "nothing says which patches they are of"),
        ({"reduction": "topk", "keep_rate": 0.5, "reduction_layers": [1], "cache": "clc"}, "not defined"),
    ],
)
def test_methods_without_a_rollout_are_refused(options: dict[str, Any], message: str) -> None:
    model = network(**options)
    names = list(model.plugins)
    with pytest.raises(UsageError, match=message):
        rollout_map(model, image())
    assert list(model.plugins) == names


def test_networks_without_attention_over_all_patches_are_refused() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=64, window_size=2).eval()
    with pytest.raises(UsageError, match="SwinTransformer is no transformer with an attention in each of its blocks"):
        rollout_map(swin, image())
    with pytest.raises(UsageError, match="ResNet is no transformer"):
        rollout_map(timm.create_model("resnet18").eval(), image())
