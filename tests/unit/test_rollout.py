"""Attention rollout, attention distance and CKA against their definitions, and the recorder of attention weights."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from animesion.errors import UsageError
from animesion_training.tokens import Plugin, TokenVisionTransformer
from animesion_training.tokens.cka import MinibatchCKA, linear_cka
from animesion_training.tokens.reductions import make_reduction
from animesion_training.tokens.rollout import (
    AttentionRecorder,
    attention_distance,
    class_rollout,
    record_attention,
    rollout,
)


def attention(*shape: int, seed: int = 0) -> Any:
    """Weights whose rows sum to one."""
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def features(samples: int, width: int, seed: int = 0) -> Any:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(plugins: dict[str, Plugin] | None = None, depth: int = 3) -> Any:
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return TokenVisionTransformer(backbone, plugins or {}, 5).eval()


# -- rollout -----------------------------------------------------------------------------------------------------------


def test_rollout_by_hand() -> None:
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    second = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    steps = torch.tensor([[0.75, 0.25], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    joint = rollout(torch.stack([first, second])[:, None, None])
    torch.testing.assert_close(joint, (steps[1] @ steps[0])[None])
    torch.testing.assert_close(joint[0], torch.tensor([[0.375, 0.625], [0.375, 0.625]]))


def test_rollout_averages_heads_and_its_rows_sum_to_one() -> None:
    weights = attention(4, 2, 3, 7, 7)
    joint = rollout(weights)
    torch.testing.assert_close(joint.sum(-1), torch.ones(2, 7))
    assert (joint > 0).all()
    torch.testing.assert_close(rollout(weights.mean(2)), joint)
    torch.testing.assert_close(rollout(list(weights)), joint)
    identity = torch.eye(7).expand(4, 2, 3, 7, 7)
    torch.testing.assert_close(rollout(identity), torch.eye(7).expand(2, 7, 7))


def test_the_row_of_the_class_token_equals_that_of_the_rollout() -> None:
    weights = attention(4, 2, 3, 7, 7)
    torch.testing.assert_close(class_rollout(weights), rollout(weights)[:, 0])
    torch.testing.assert_close(class_rollout(weights[:1]), rollout(weights[:1])[:, 0])


def test_rollout_is_in_float32_at_least() -> None:
    weights = attention(2, 1, 2, 5, 5)
    assert rollout(weights.bfloat16()).dtype == torch.float32
    assert rollout(weights.double()).dtype == torch.float64


def test_rollout_refuses_changing_numbers_of_tokens() -> None:
    with pytest.raises(UsageError, match="block 1 attends from 4 to 4 tokens after 5"):
        rollout([attention(1, 2, 5, 5), attention(1, 2, 4, 4)])
    with pytest.raises(UsageError, match="block 0 attends from 3 to 5 tokens"):
        class_rollout([attention(1, 2, 3, 5)])
    with pytest.raises(UsageError, match="at least one block"):
        rollout([])


# -- distance ----------------------------------------------------------------------------------------------------------


def test_distances_are_the_weighted_means_of_those_between_centers() -> None:
    rows, columns, height, width = 2, 3, 8, 4
    weights = attention(2, 2, 3, 7, 7)
    found = attention_distance(weights, (rows, columns), (height, width))
    for block in range(2):
        for head in range(3):
            total = 0.0
            for sample in range(2):
                for query in range(6):
                    shares = weights[block, sample, head, 1 + query, 1:]
                    for key in range(6):
                        down = height * (query // columns - key // columns)
                        right = width * (query % columns - key % columns)
                        total += float(shares[key] / shares.sum()) * (down**2 + right**2) ** 0.5 / 12
            assert float(found[block, head]) == pytest.approx(total, rel=1e-5)


def test_distances_on_a_grid_of_two_by_two_by_hand() -> None:
    # patches of 10 px: neighbours in a row or column are 10 apart, those across the diagonal 10 sqrt 2
    uniform = torch.full((4, 4), 0.25)  # (0 + 10 + 10 + 14.142) / 4 for each patch
    across = torch.eye(4).flip(1)
    first = torch.zeros(4, 4)
    first[:, 0] = 1.0  # 0, 10, 10 and 14.142 from the four patches
    found = attention_distance(torch.stack([uniform, across, first])[None, None], (2, 2), 10)
    diagonal = 10 * 2**0.5
    assert found[0].tolist() == pytest.approx([(20 + diagonal) / 4, diagonal, (20 + diagonal) / 4])


def test_distances_of_heads_whose_view_is_known() -> None:
    itself, right = torch.eye(16), torch.eye(16).roll(4, dims=1)  # the next row, from the last one the first
    weights = torch.stack([itself, right, torch.full((16, 16), 1 / 16)])[None, None]
    found = attention_distance(weights, (4, 4), 16)[0]
    assert found[0] == 0
    assert float(found[1]) == pytest.approx((12 * 16 + 4 * 48) / 16)
    between = torch.cdist(*2 * [16.0 * torch.cartesian_prod(torch.arange(4), torch.arange(4)).float()]).mean()
    assert float(found[2]) == pytest.approx(float(between), rel=1e-5)


def test_attention_to_the_class_token_does_not_lower_distances() -> None:
    weights = attention(1, 1, 1, 16, 16)
    mostly_class = torch.cat([torch.full((1, 1, 1, 16, 1), 0.9), 0.1 * weights], dim=-1)
    mostly_class = torch.cat([mostly_class[..., :1, :], mostly_class], dim=-2)
    torch.testing.assert_close(attention_distance(mostly_class, (4, 4), 8), attention_distance(weights, (4, 4), 8))
    nothing = torch.zeros(1, 1, 1, 16, 16)
    assert attention_distance(nothing, (4, 4), 8).item() == 0


def test_distances_need_all_patches() -> None:
    with pytest.raises(UsageError, match=r"4x4 has 16 patches, and block 0 attends from 9 to 9"):
        attention_distance([attention(1, 1, 9, 9)], (4, 4), 8)


# -- the recorder ------------------------------------------------------------------------------------------------------


def test_recorded_weights_are_those_of_the_blocks_and_the_network_computes_the_same() -> None:
    model = network()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        plain = model(x)
        with record_attention(model) as recorder:
            recorded = model(x)
        weights = recorder.pop_weights()
        torch.testing.assert_close(recorded, plain)
        assert [tuple(each.shape) for each in weights] == [(2, 2, 17, 17)] * 3
        tokens = model.backbone._pos_embed(model.backbone.patch_embed(x))
        for block, found in zip(model.backbone.blocks, weights, strict=True):
            q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
            torch.testing.assert_close(found, (q @ k.transpose(2, 3) / 4).softmax(-1))
            tokens = block(tokens)


def test_the_recorder_keeps_the_last_pass_until_it_is_taken() -> None:
    model = network()
    x = torch.randn(2, 3, 32, 32)
    with record_attention(model, average=True) as recorder:
        model(x)
        model(x[:1])
        once = recorder.pop_weights()
        assert [tuple(each.shape) for each in once] == [(1, 17, 17)] * 3
        assert recorder.pop_weights() == []
    with record_attention(model) as full:
        model(x[:1])
    for mean, heads in zip(once, full.pop_weights(), strict=True):
        torch.testing.assert_close(mean, heads.mean(1))


def test_the_recorder_is_removed_after_the_block_even_on_errors() -> None:
    model = network()

    def fails() -> None:
        with record_attention(model):
            assert len(model.plugins) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert len(model.plugins) == 0
    recorder = AttentionRecorder(3)
    model = network({"recorder": recorder})
    model(torch.randn(1, 3, 32, 32))
    assert recorder.pop_weights() == []
    with recorder.recording():
        model(torch.randn(1, 3, 32, 32))
    assert len(recorder.pop_weights()) == 3


def test_recording_does_not_change_gradients() -> None:
    x = torch.randn(2, 3, 32, 32)
    found = []
    for record in (False, True):
        model = network().train()
        if record:
            with record_attention(model) as recorder:
                model(x).sum().backward()
            assert not any(each.requires_grad for each in recorder.pop_weights())
        else:
            model(x).sum().backward()
        found.append(model.backbone.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*found)


def test_weights_that_a_plugin_reads_or_mixes_are_recorded() -> None:
    class Asks(Plugin):
        opens = frozenset({1})

        def attention(self, block: int, tokens: Any, attended: Any) -> None:
            if block == 1:
                attended.mixing = lambda scores: torch.ones_like(scores) / scores.shape[-1]
                self.seen = attended.weights

    asks = Asks()
    model = network({"asks": asks})
    with record_attention(model) as recorder:
        model(torch.randn(1, 3, 32, 32))
    weights = recorder.pop_weights()
    torch.testing.assert_close(weights[1], asks.seen)
    torch.testing.assert_close(weights[1], torch.full((1, 2, 17, 17), 1 / 17))
    assert not torch.allclose(weights[2], torch.full((1, 2, 17, 17), 1 / 17))


def test_with_a_reduction_each_block_has_its_own_number_of_tokens() -> None:
    reduction = make_reduction("evit", keep_rate=0.5, layers=(1,), depth=3, width=32, tokens=16)
    model = network({"reduction": reduction})
    with record_attention(model) as recorder:
        model(torch.randn(1, 3, 32, 32))
    weights = recorder.pop_weights()
    assert [each.shape[-1] for each in weights] == [17, 17, 10]
    with pytest.raises(UsageError, match="block 2 attends from 10 to 10 tokens after 17"):
        rollout(weights)


# -- CKA ---------------------------------------------------------------------------------------------------------------


def kernel_cka(x: Any, y: Any) -> float:
    """The definition with kernel matrices and centering matrices."""
    n = len(x)
    center = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = center @ (x @ x.T) @ center, center @ (y @ y.T) @ center
    return float((k * m).sum() / (k.norm() * m.norm()))


@pytest.mark.parametrize(("samples", "widths"), [(40, (6, 9)), (7, (30, 20)), (10, (4, 25)), (2, (1, 1))])
def test_cka_is_its_definition_for_few_and_many_samples(samples: int, widths: tuple[int, int]) -> None:
    x, y = features(samples, widths[0]) + 3, features(samples, widths[1], seed=1)
    y = y + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(kernel_cka(x, y), rel=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-9)
    assert 0 <= linear_cka(x, y) <= 1 + 1e-12


def test_cka_is_invariant_to_rotation_scale_and_shift() -> None:
    x = features(50, 8)
    rotation = torch.linalg.qr(features(8, 8, seed=2)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x @ features(8, 8, seed=3)) < 0.99
    assert linear_cka(features(5000, 4), features(5000, 4, seed=1)) < 0.01


def test_cka_of_constant_features_is_refused() -> None:
    for constant in (torch.full((9, 3), 0.1), torch.zeros(9, 3)):
        with pytest.raises(UsageError, match="constant over all samples"):
            linear_cka(constant, features(9, 3))
    with pytest.raises(UsageError, match=r"\(9, 3\) and \(8, 3\)"):
        linear_cka(features(9, 3), features(8, 3))


def unbiased_hsic(k: Any, m: Any) -> float:
    """The mean over all draws of four distinct samples, which the closed form must equal."""
    draws = list(permutations(range(len(k)), 4))
    return sum(float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])) for i, j, q, r in draws) / len(draws)


def test_minibatch_cka_is_the_ratio_of_sums_of_unbiased_estimates() -> None:
    batches = [(features(n, 3, seed=n), features(n, 4, seed=n + 10)) for n in (5, 6)]
    batches = [(x, y + x[:, :1]) for x, y in batches]
    cka = MinibatchCKA()
    sums = [0.0, 0.0, 0.0]
    for x, y in batches:
        cka.update(x, y)
        k, m = x @ x.T, y @ y.T
        for i, pair in enumerate(((k, m), (k, k), (m, m))):
            sums[i] += unbiased_hsic(*pair)
    assert cka.value() == pytest.approx(sums[0] / (sums[1] * sums[2]) ** 0.5, rel=1e-9)


def test_minibatch_cka_has_no_bias_where_the_plain_one_has() -> None:
    cka = MinibatchCKA()
    plain = []
    for seed in range(60):
        x, y = features(12, 40, seed=seed), features(12, 40, seed=1000 + seed)
        cka.update(x, y)
        plain.append(linear_cka(x, y))
    assert min(plain) > 0.5
    assert abs(cka.value()) < 0.05
    same = MinibatchCKA()
    rotation = torch.linalg.qr(features(40, 40, seed=7)).Q
    same.update(x, 2 * x @ rotation + 1)
    assert same.value() == pytest.approx(1, rel=1e-9)


def test_minibatch_cka_needs_four_samples_and_something_to_compare() -> None:
    cka = MinibatchCKA()
    with pytest.raises(UsageError, match="at least four samples per batch, not 3"):
        cka.update(features(3, 2), features(3, 2))
    with pytest.raises(UsageError, match="constant over all samples"):
        cka.value()
