"""Token reductions: which tokens are kept, and the interface of a reduced model."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer

from animesion.errors import UsageError
from animesion_training import create_model
from animesion_training.analysis.profile import count
from animesion_training.models.cla import CLAHead
from animesion_training.tokens import Tokens, TokenVisionTransformer
from animesion_training.tokens.cache import CrossLayerCache
from animesion_training.tokens.reductions import REDUCTIONS, make_reduction
from animesion_training.tokens.reductions.base import ReductionPlan, reduction_layers
from animesion_training.tokens.reductions.merging import density_peaks, match_pairs, merge_pairs
from animesion_training.tokens.reductions.pruning import ATS, inverse_samples, sampling_steps, softmax_with_policy

NAMES = list(REDUCTIONS)
WIDTH, CLASSES, PATCH = 24, 5, 4
RATES = [0.1, 0.25, 0.5, 0.7, 0.9]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks are slower on several threads, especially when other jobs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def backbone(grid=(8, 8), depth=5, registers=0, **options):
    torch.manual_seed(0)
    made = VisionTransformer(
        (PATCH * grid[0], PATCH * grid[1]),
        PATCH,
        num_classes=0,
        embed_dim=WIDTH,
        depth=depth,
        num_heads=3,
        reg_tokens=registers,
        class_token=True,
        **options,
    )
    with torch.no_grad():  # with initial weights all tokens would be similar
        for block in made.blocks:
            block.attn.qkv.weight.mul_(20)
        made.pos_embed.mul_(20)
    return made


def reduced(name, keep_rate=0.5, layers=(1, 3), grid=(8, 8), depth=5, registers=0, cache=False, cla=False, **options):
    host = backbone(grid, depth, registers)
    torch.manual_seed(1)
    plugins: dict[str, Any] = {
        "reduction": make_reduction(
            name,
            keep_rate=keep_rate,
            layers=layers,
            depth=depth,
            width=WIDTH,
            tokens=grid[0] * grid[1],
            **options,
        )
    }
    if cache:
        plugins["cache"] = CrossLayerCache(WIDTH, depth=depth, layers=layers)
        plugins["cache"].copy_class_token(host.cls_token)
    gathers = (*reduction_layers(layers, depth), depth - 1) if cla else ()
    head = (lambda classes: CLAHead(len(gathers), WIDTH, classes)) if cla else None
    return TokenVisionTransformer(host, plugins, CLASSES, head, gathers).eval()


def random_images(batch=3, grid=(8, 8), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, PATCH * grid[0], PATCH * grid[1], generator=rng)


def lengths(model, grid=(8, 8)):
    """Tokens after the prefix after each block, before a cache adds its own."""
    # only ATS's depend on the image
    device = "cpu" if isinstance(model.plugins["reduction"], ATS) else "meta"
    with torch.inference_mode():
        _, tokens = copy.deepcopy(model).to(device).trace(random_images(1, grid).to(device))
    depth = len(model.backbone.blocks)
    return [int(tokens.trace[f"block{i}.tokens"][1]) - tokens.prefix for i in range(depth)]


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "small", "large"),
    [
        (0.7, [139, 99, 71], [550, 386, 272]),
        (0.5, [99, 51, 27], [393, 198, 100]),
        (0.25, [50, 14, 5], [197, 51, 14]),
        (0.1, [21, 4, 2], [80, 9, 2]),
    ],
)
def test_evit_leaves_the_published_numbers_of_tokens(rate, small, large):
    for side, expected in ((14, small), (28, large)):
        after = lengths(reduced("evit", rate, None, (side, side), depth=12), grid=(side, side))
        assert [after[i] for i in (3, 6, 9)] == expected


@pytest.mark.parametrize(("rate", "small", "large"), [(0.7, 67, 268), (0.5, 25, 98), (0.25, 52, 208), (0.1, 79, 314)])
def test_tome_as_the_original_limits_each_step_to_half(rate, small, large):
    for side, expected in ((14, small), (28, large)):
        model = reduced("tome", rate, None, (side, side), depth=12, reference_compat=True)
        assert lengths(model, grid=(side, side))[-1] == expected


@pytest.mark.parametrize("rate", RATES)
def test_tome_reaches_the_plan_by_halving_over_blocks(rate):
    model = reduced("tome", rate, None, (14, 14), depth=12)
    after = [196, *lengths(model, grid=(14, 14))]
    assert after[-1] == max(1, int(196 * rate**3 + 1e-9))
    assert all(later >= earlier // 2 for earlier, later in pairwise(after))
    assert after[1:4] == [196] * 3
    assert after[4] == max(int(196 * rate), 98)


@pytest.mark.parametrize("name", ["dynamicvit", "cropr", "dpcknn", "sit", "patchmerger", "sinkhorn"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.7])
def test_absolute_plans_are_kept(name, rate):
    after = lengths(reduced(name, rate))
    assert [after[0], after[1], after[3]] == [64, int(64 * rate), max(1, int(64 * rate**2))]


@pytest.mark.parametrize("name", NAMES)
def test_a_lower_keep_rate_never_leaves_more(name):
    last = [lengths(reduced(name, rate))[-1] for rate in RATES]
    assert last == sorted(last)


def test_each_layer_may_have_its_own_rate():
    assert lengths(reduced("dpcknn", (0.5, 0.25)))[-1] == 8
    assert lengths(reduced("dpcknn", (0.5, 1.0)))[-1] == 32
    assert lengths(reduced("topk", (1.0, 0.25)))[1:4] == [64, 64, 16]


def test_shares_are_not_affected_by_rounding():
    plan = ReductionPlan.of(0.55, [0], depth=1, width=8, tokens=100)
    assert plan.kept(0, 100) == 55
    assert ReductionPlan.of(0.29, [0], depth=1, width=8, tokens=100).counts == (29,)
    original = ReductionPlan.of(0.29, [0], depth=1, width=8, tokens=100, reference_compat=True)
    assert original.counts == (28,)


@pytest.mark.parametrize(
    "name", ["sit", "patchmerger", "sinkhorn", "dpcknn", "tome", "dynamicvit", "cropr", "evit", "ats"]
)
def test_at_least_one_token_is_left_however_little_is_kept(name):
    model = reduced(name, 0.01, grid=(3, 3))
    assert lengths(model, grid=(3, 3))[-1] >= 1
    assert model(random_images(2, (3, 3))).isfinite().all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_original_can_plan_no_clusters_at_all():
    for name in ("sit", "patchmerger"):
        model = reduced(name, 0.1, grid=(3, 3), reference_compat=True)
        assert lengths(model, grid=(3, 3))[1:] == [0] * 4
        assert model(random_images(2, (3, 3))).isfinite().all()


def test_the_original_keeps_five_clusters_before_the_last_stage():
    assert lengths(reduced("dpcknn", 0.02, reference_compat=True))[1:4] == [5, 5, 1]
    assert lengths(reduced("dpcknn", 0.02))[1:4] == [1, 1, 1]


# -- which -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "evit"])
def test_the_tokens_that_the_class_token_attends_to_most_are_kept(name):
    model = reduced(name, 0.4)
    images = random_images()
    with torch.inference_mode():
        _, tokens = model.trace(images)
        host = model.backbone
        x = host.blocks[0](host._pos_embed(host.patch_embed(images)))
        attention = host.blocks[1].attn
        q, k, _ = attention.qkv(host.blocks[1].norm1(x)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        row = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)[:, :, 0, 1:].mean(1)
    kept = tokens.trace["block1.kept_idx"][:, :26]
    assert torch.equal(row.gather(1, kept), row.sort(descending=True).values[:, :26])
    if name == "evit":
        together = torch.cat([kept, tokens.trace["block1.fused_idx"]], dim=1)
        assert torch.equal(together.sort(dim=1).values, torch.arange(64).expand(3, -1))


def test_evit_fuses_what_it_drops_by_attention():
    model = reduced("evit", 0.25, layers=(1,))
    tokens = Tokens(torch.randn(2, 65, WIDTH), 1, (8, 8))
    before = tokens.x
    row = torch.rand(2, 3, 65)
    model.plugins["reduction"].between(1, tokens, type("Row", (), {"class_row": row}))
    weights = row.mean(1)[:, 1:]
    dropped = weights.sort(dim=1, descending=True).indices[:, 16:]
    fused = torch.stack([weights[b, dropped[b]] @ before[b, 1 + dropped[b]] for b in range(2)])
    assert torch.allclose(tokens.x[:, -1], fused, atol=1e-5)
    assert tokens.x.shape[1] == 1 + 16 + 1


def test_merged_sizes_add_up_to_the_number_of_patches():
    for registers in (0, 3):
        _, tokens = reduced("tome", 0.3, registers=registers).trace(random_images())
        assert torch.equal(tokens.size[:, tokens.prefix :].sum(1), torch.full((3,), 64.0))
        assert torch.equal(tokens.size[:, : tokens.prefix], torch.ones(3, 1 + registers))
        assignment = tokens.trace["block1.cluster_assign"].long()
        assert assignment.shape == (3, 64)
        sizes = torch.nn.functional.one_hot(assignment).sum(1)
        assert torch.equal(sizes.float(), tokens.trace["block1.attn_size"][:, tokens.prefix :, 0])


def test_a_merge_is_the_mean_of_its_members():
    rng = torch.Generator().manual_seed(0)
    x, size = torch.randn(2, 15, 6, generator=rng), torch.randint(1, 5, (2, 15), generator=rng).float()
    matching = match_pairs(torch.randn(2, 15, 4, generator=rng), 5)
    merged, sizes = merge_pairs(x, size, matching)
    member = torch.nn.functional.one_hot(matching.assignment(), 10).transpose(1, 2).float() * size[:, None]
    assert torch.allclose(merged, member @ x / member.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(sizes, member.sum(-1))
    assert torch.equal(matching.kept[:, 0], torch.zeros(2, dtype=torch.long))


def test_merging_equal_tokens_changes_nothing():
    """Sizes weight attention, so a token of size two counts like two tokens (ToMe, section 3)."""
    host = backbone()
    with torch.no_grad():
        host.pos_embed.zero_()
    images = random_images().unflatten(3, (4, 2, PATCH))
    images = torch.stack([images[:, :, :, :, 0]] * 2, dim=4).flatten(3)
    head = torch.nn.Linear(WIDTH, CLASSES)
    logits = []
    for rate in (1.0, 0.5):
        merging = make_reduction("tome", keep_rate=rate, layers=[1], depth=5, width=WIDTH, tokens=64)
        model = TokenVisionTransformer(host, {"reduction": merging}, CLASSES, lambda _: head).eval()
        assert lengths(model)[-1] == 64 * rate
        logits.append(model(images))
    assert torch.allclose(*logits, atol=1e-5)


def test_clusters_are_a_partition_around_their_centers():
    rng = torch.Generator().manual_seed(0)
    peaks = 10 * torch.randn(2, 4, 8, generator=rng)
    x = peaks.repeat_interleave(9, dim=1) + 0.1 * torch.randn(2, 36, 8, generator=rng)
    order = torch.randperm(36, generator=rng)
    centers, assignment = density_peaks(x[:, order], 4)
    truth = order // 9
    assert torch.equal(assignment.gather(1, centers), torch.arange(4).expand(2, -1))
    for row in assignment:
        assert len({(int(a), int(b)) for a, b in zip(row, truth, strict=True)}) == 4
        assert sorted(row.bincount().tolist()) == [9] * 4


def test_sampling_inverts_the_distribution():
    scores = torch.tensor([[0.0, 4.0, 0.0, 1.0, 3.0]])
    assert sampling_steps(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert inverse_samples(scores, sampling_steps(4)).tolist() == [[0, 1, 3, 4]]
    drawn = inverse_samples(scores, sampling_steps(100))
    real = torch.tensor([[True, True, False, False, True, True, True]])
    padded = inverse_samples(torch.tensor([[0.0, 4.0, 0.0, 0.0, 0.0, 1.0, 3.0]]), sampling_steps(100), real)
    assert torch.equal(padded, drawn + 2 * (drawn > 1))


def test_ats_keeps_distinct_tokens_in_order_and_at_most_the_plans():
    _, tokens = reduced("ats", 0.5).trace(random_images(4))
    for block, most in ((1, 32), (3, 16)):
        ids, mask = tokens.trace[f"block{block}.sample_ids"], tokens.trace[f"block{block}.mask"]
        for row, real in zip(ids, mask, strict=True):
            kept = row[real].tolist()
            assert kept == sorted(set(kept))
            assert kept[0] == 0
            assert len(kept) <= 1 + most
        assert mask.all(dim=0).sum() < mask.shape[1]  # images differ, otherwise padding would be untested


def test_the_last_part_of_the_distribution_is_sampled_unlike_in_the_original():
    ours, theirs = sampling_steps(10), sampling_steps(10, reference_compat=True)
    assert len(ours) == len(theirs) == 10
    assert ours.max() == 0.95
    assert theirs.max() < 0.9


def test_dropped_tokens_are_visible_to_themselves_only():
    policy = torch.tensor([[1.0, 1, 0, 1, 0]])
    weights = softmax_with_policy(torch.randn(1, 2, 5, 5), policy)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 5), atol=1e-5)
    off = weights * (1 - torch.eye(5))
    assert off[..., policy[0] == 0].max() < 1e-5
    assert (weights.diagonal(dim1=-2, dim2=-1)[..., policy[0] == 0] > 1e-3).all()
    assert torch.allclose(softmax_with_policy(x := torch.randn(1, 2, 5, 5), torch.ones(1, 5)), x.softmax(-1), atol=1e-5)


def test_dynamicvit_decides_in_training_and_drops_in_evaluation():
    model = reduced("dynamicvit", 0.6).train()
    _, losses = model(random_images(), with_losses=True)
    torch.manual_seed(0)
    _, tokens = model.trace(random_images())
    first, second = (tokens.trace[f"block{i}.decision"] for i in (1, 3))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (second <= first).all()
    assert tokens.x.shape[1] == 65
    terms = [(kept.mean(1) - share).square().mean() for kept, share in ((first, 0.6), (second, 0.36))]
    assert tokens.losses["dynamicvit_ratio"].item() == pytest.approx(2.0 * sum(terms).item() / 2, rel=1e-5)
    assert losses.keys() == {"dynamicvit_ratio"}
    _, losses = model.eval()(random_images(), with_losses=True)
    assert not losses


def test_the_ratio_loss_pulls_decisions_to_the_plan():
    torch.manual_seed(0)
    model = reduced("dynamicvit", 0.3, layers=(1,), depth=2, loss_weight=1.0).train()
    predictor = model.plugins["reduction"].predictors
    optimizer = torch.optim.Adam(predictor.parameters(), 0.02)
    images = random_images(4)
    for _ in range(20):
        optimizer.zero_grad()
        model(images, with_losses=True)[1]["dynamicvit_ratio"].backward()
        optimizer.step()
    _, tokens = model.trace(images)
    assert tokens.trace["block1.decision"].mean().item() == pytest.approx(0.3, abs=0.1)


# -- a model like any other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_keep_rate_one_is_the_plain_model(name):
    model = reduced(name, 1.0)
    plain = TokenVisionTransformer(model.backbone, {}, CLASSES)
    plain.head = model.head
    assert not list(model.plugins.parameters())
    assert torch.equal(model(random_images()), plain.eval()(random_images()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", [False, True])
def test_an_image_gets_the_same_logits_alone_and_in_a_batch(name, cache):
    model = reduced(name, 0.4, cache=cache)
    images = random_images(4)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=2e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("registers", [0, 4])
def test_odd_grids_and_registers(name, registers):
    grid = (5, 3)
    model = reduced(name, 0.5, grid=grid, registers=registers, cache=True)
    logits, tokens = model.trace(random_images(2, grid))
    assert logits.isfinite().all()
    assert tokens.prefix == 1 + registers
    assert tokens.grid is None


@pytest.mark.parametrize("name", NAMES)
def test_prefix_tokens_are_never_reduced(name):
    """With blocks that do nothing, class token and registers must not change."""
    model = reduced(name, 0.3, registers=3)
    for block in model.backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    host = model.backbone
    images = random_images()
    _, tokens = model.trace(images)
    assert torch.equal(tokens.x[:, :4], host._pos_embed(host.patch_embed(images))[:, :4])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = reduced(name, 0.5, cache=True, cla=True).train()
    logits, losses = model(random_images(4), with_losses=True, targets=torch.arange(4))
    (torch.nn.functional.cross_entropy(logits, torch.arange(4)) + sum(losses.values())).backward()
    silent = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum()}
    assert silent <= {"plugins.reduction.scores.1.bias", "plugins.reduction.scores.3.bias"}  # cancels in a mean


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_autocast(name, training):
    model = reduced(name, 0.5, cache=True, cla=True).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(random_images(4))
    assert logits.isfinite().all()
    if training:
        logits.float().square().mean().backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("name", ["evit", "cropr", "tome", "dpcknn", "patchmerger"])
def test_checkpointing_changes_no_gradient(name):
    grads = []
    for enable in (False, True):
        model = reduced(name, 0.5, cache=True).train()
        model.set_grad_checkpointing(enable)
        model(random_images()).square().mean().backward()
        grads.append(model.backbone.patch_embed.proj.weight.grad)
    assert torch.allclose(*grads, atol=1e-7)


@pytest.mark.parametrize("name", ["evit", "ats", "cropr"])
def test_compiled_models_agree(name):
    model = reduced(name, 0.5, layers=(1,), depth=3, cache=True)
    torch._dynamo.reset()  # graphs of other tests' models are cached under the same code
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(random_images()), model(random_images()), atol=1e-5)


# -- cost --------------------------------------------------------------------------------------------------------------


#: G multiply-adds of ViT-B/16 with 200 classes: method, keep rate, plain at 224 and 448, with CLA and CLC at both.
COSTS = [
    ("evit", 0.1, 5.63, 24.79, 5.96, 25.17),
    ("evit", 0.25, 6.53, 28.55, 6.96, 28.98),
    ("evit", 0.5, 8.82, 38.20, 9.32, 38.76),
    ("evit", 0.7, 11.61, 50.16, 12.17, 50.85),
    ("evit", 1.0, 17.56, 78.50, 18.37, 79.48),
    ("tome", 0.1, 10.43, 45.41, 11.20, 46.26),
    ("tome", 0.25, 9.49, 41.42, 10.26, 42.25),
    ("tome", 0.5, 8.72, 38.10, 9.45, 38.91),
    ("tome", 0.7, 11.42, 49.99, 12.19, 50.85),
    ("topk", 0.5, None, None, 9.25, 38.67),
    ("dpcknn", 0.5, None, None, 8.99, 36.34),
    ("patchmerger", 0.5, None, None, 8.57, 36.48),
    ("sit", 0.5, None, None, 8.67, 36.74),
    ("dynamicvit", 0.5, None, None, 9.00, 37.30),
    ("sinkhorn", 0.5, None, None, 8.57, 36.48),
]


def published_cost(name, rate, side, clca):
    with torch.device("meta"):  # counting needs shapes only
        host = create_model("vit_base_patch16", 200, side)
        plugins: dict[str, Any] = {}
        if rate < 1:
            plan = {"depth": 12, "width": 768, "tokens": (side // 16) ** 2, "reference_compat": True}
            plugins["reduction"] = make_reduction(name, keep_rate=rate, **plan)
        if not clca:
            return count(TokenVisionTransformer(host, plugins, 200), (side, side)).multiply_adds / 1e9
        plugins["cache"] = CrossLayerCache(768, depth=12)
        model = TokenVisionTransformer(host, plugins, 200, lambda classes: CLAHead(4, 768, classes), (3, 6, 9, 11))
        return count(model, (side, side)).multiply_adds / 1e9


def check_costs(rows, columns):
    for name, rate, *costs in rows:
        for (clca, side), cost in zip([(False, 224), (False, 448), (True, 224), (True, 448)], costs, strict=True):
            if cost is not None and (clca, side) in columns:
                measured = published_cost(name, rate, side, clca)
                print(f"{name} {rate} {side} {'CLCA' if clca else 'plain'}: {measured:.2f}, published {cost:.2f}")
                assert measured == pytest.approx(cost, rel=0.002)


def test_multiply_adds_are_the_published_ones():
    check_costs(COSTS, {(True, 224)})


@pytest.mark.slow
def test_multiply_adds_are_the_published_ones_in_the_whole_table():
    check_costs(COSTS, {(False, 224), (False, 448), (True, 448)})


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "evitt"}, "did you mean 'evit'"),
        ({"name": "none"}, "topk, evit, ats"),
        ({"name": "evit", "neighbours": 3}, "no option neighbours"),
        ({"name": "dpcknn", "k": 3}, "neighbours, equal_weight"),
        ({"name": "dpcknn", "neighbours": 0}, "from 1"),
        ({"name": "dpcknn", "equal_weight": 1}, "true or false"),
        ({"name": "dynamicvit", "loss_weight": -1.0}, "from 0"),
        ({"name": "dynamicvit", "loss_weight": "high"}, "from 0"),
        ({"name": "sinkhorn", "eps": 0.0}, "above 0"),
        ({"name": "sinkhorn", "iterations": 0}, "from 1"),
        ({"name": "tome", "keep_rate": 0.0}, "above 0"),
        ({"name": "tome", "keep_rate": (0.5, 1.2)}, "at most 1"),
        ({"name": "tome", "keep_rate": (0.5,) * 3}, "one for each of the 2 layers"),
        ({"name": "tome", "layers": [3, 1]}, "ascending"),
        ({"name": "tome", "layers": [1, 5]}, "from 0 to 4"),
        ({"name": "tome", "layers": [1.0]}, "numbers of blocks"),
        ({"name": "tome", "layers": None, "depth": 3}, "give reduction_layers"),
        ({"name": "tome", "tokens": 0}, "no patches"),
    ],
)
def test_bad_settings_raise_one_sentence(settings, message):
    with pytest.raises(UsageError, match=message):
        make_reduction(**{"keep_rate": 0.5, "layers": [1, 3], "depth": 5, "width": 24, "tokens": 64} | settings)


def test_default_layers_are_those_that_exist():
    assert reduction_layers(None, 12) == (3, 6, 9)
    assert reduction_layers(None, 8) == (3, 6)


def test_entry_points_add_reductions_and_nothing_else(tmp_path, monkeypatch):
    about = tmp_path / "mine-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    entries = "[animesion.reductions]\nours = animesion_training.tokens.reductions.pruning:TopK\nwrong = json:loads\n"
    (about / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked: dict[str, Any] = {"keep_rate": 0.5, "depth": 12, "width": 8, "tokens": 16}
    assert type(make_reduction("ours", **asked)).__name__ == "TopK"
    with pytest.raises(UsageError, match=r"reduction 'wrong': json:loads is not a subclass"):
        make_reduction("wrong", **asked)
    with pytest.raises(UsageError, match="there is no reduction 'our'"):
        make_reduction("our", **asked)
