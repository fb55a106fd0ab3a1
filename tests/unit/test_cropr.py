"""Token Cropr: scores and auxiliary loss by hand, what trains what, fusion in the last block, and other classes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from animesion.errors import UsageError
from animesion_training import create_model
from animesion_training.models.pretrained import load_weights
from animesion_training.tokens import Tokens
from animesion_training.tokens.reductions import make_reduction
from animesion_training.tokens.rollout import record_attention
from animesion_training.tokens.token_flow import rollout_map
from animesion_training.weights import save_model

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))  # 16 patches
TARGETS = torch.tensor([2, 0])


def network(classes: int = 3, keep_rate: Any = 0.5, layers: tuple[int, ...] = (1, 2), **options: Any) -> Any:
    torch.manual_seed(0)
    methods = {"reduction": "cropr", "keep_rate": keep_rate, "reduction_layers": list(layers)}
    return create_model("vit_tiny_patch16", classes, 64, **methods, **options, **SMALL).eval()


def fusing(**options: Any) -> Any:
    return network(method_options={"reduction": {"last_layer_fusion": True}}, **options)


def tiny(**options: Any) -> Any:
    """One stage that keeps 2 of 4 tokens of width 2 in front of block 1, query (1, 0)."""
    made: Any = make_reduction("cropr", keep_rate=0.5, layers=[1], depth=3, width=2, tokens=4, **options)
    made.reset_classes(2, torch.zeros(()))
    with torch.no_grad():
        made.queries["0"].copy_(torch.tensor([1.0, 0.0]))
        for layer in made.aggregators["0"].mlp[::2]:
            layer.weight.zero_()
        made.heads["0"].weight.copy_(torch.eye(2))
    return made


#: Class token, and four patches whose scores are 0, 2, 1 and -1.
X = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [-1.0, 3.0]]])


def tokens(targets: Any = None, x: Any = X) -> Tokens:
    return Tokens(x.clone(), 1, (2, 2), targets=targets, trace={})


def aggregated() -> tuple[float, float]:
    weights = [math.exp(score / math.sqrt(2)) for score in (0, 2, 1, -1)]
    total = sum(weights)
    return (2 * weights[1] + weights[2] - weights[3]) / total, (weights[0] + 3 * weights[3]) / total


def test_the_tokens_with_the_highest_scores_are_kept() -> None:
    state = tokens()
    tiny().eval().before(1, state)
    assert state.x.tolist() == [[[9, 9], [2, 0], [1, 0]]]
    assert state.trace is not None
    assert state.trace["block1.kept_idx"].tolist() == [[1, 2]]
    assert not state.losses
    assert state.grid is None


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_auxiliary_loss_is_the_cross_entropy_of_the_aggregated_token(weight: float) -> None:
    state = tokens(torch.tensor([1]))
    tiny(loss_weight=weight).train().before(1, state)
    first, second = aggregated()
    assert state.losses["cropr_auxiliary"].item() == pytest.approx(weight * math.log1p(math.exp(first - second)))
    assert state.x.shape == (1, 3, 2)  # tokens are dropped in training too


def test_soft_labels_weigh_the_classes() -> None:
    state = tokens(torch.tensor([[0.3, 0.7]]))
    tiny().train().before(1, state)
    first, second = aggregated()
    expected = 0.3 * math.log1p(math.exp(second - first)) + 0.7 * math.log1p(math.exp(first - second))
    assert state.losses["cropr_auxiliary"].item() == pytest.approx(expected)


def test_the_aggregated_token_passes_a_residual_mlp() -> None:
    made = tiny().train()
    with torch.no_grad():  # the MLP adds gelu of the first normalised element to the first element
        made.aggregators["0"].mlp[0].weight[0, 0] = 1.0
        made.aggregators["0"].mlp[2].weight[0, 0] = 1.0
    state = tokens(torch.tensor([1]))
    made.before(1, state)
    first, second = aggregated()
    half = (first - second) / 2
    normed = half / math.sqrt(half**2 + 1e-5)
    first += normed * (1 + math.erf(normed / math.sqrt(2))) / 2
    assert state.losses["cropr_auxiliary"].item() == pytest.approx(math.log1p(math.exp(first - second)), rel=1e-5)


def test_auxiliary_losses_train_queries_and_nothing_of_the_backbone() -> None:
    model = network().train()
    _, losses = model(IMAGES, with_losses=True, targets=TARGETS)
    assert losses.keys() == {"cropr_auxiliary"}
    losses["cropr_auxiliary"].backward()
    graded = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().sum()}
    own = {name for name, _ in model.named_parameters() if name.startswith("plugins.")}
    assert graded == own
    assert {name.split(".")[2] for name in own} == {"queries", "aggregators", "heads"}
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    assert all(value.grad is None for name, value in model.named_parameters() if name in own)


def test_queries_learn_which_token_tells_the_class() -> None:
    """One of 16 tokens is marked and shows the class; all others show random classes. The mark is at any place."""
    torch.manual_seed(0)
    made: Any = make_reduction("cropr", keep_rate=1 / 16, layers=[1], depth=3, width=8, tokens=16)
    made.reset_classes(4, torch.zeros(()))

    def batch(size: int = 64) -> tuple[Tokens, Any]:
        targets, places = torch.randint(4, (size,)), torch.randint(16, (size,))
        shown = torch.randint(4, (size, 16)).scatter(1, places[:, None], targets[:, None])
        x = torch.zeros(size, 16, 8)
        x[:, :, 0], x[:, :, 1] = 2 * (shown % 2) - 1, 2 * (shown // 2) - 1  # a class is a pair of signs
        x[torch.arange(size), places, 7] = 1.0
        return tokens(targets, torch.cat([torch.zeros(size, 1, 8), x], dim=1)), places

    def found() -> float:
        state, places = batch(512)
        made.eval().before(1, state)
        assert state.trace is not None
        return float((state.trace["block1.kept_idx"][:, 0] == places).float().mean())

    torch.nn.init.zeros_(made.queries["0"])  # all scores are equal: one of 16 is right by chance
    assert found() < 0.15
    optimizer = torch.optim.Adam(made.parameters(), 0.05)
    for _ in range(150):
        state, _ = batch()
        made.train().before(1, state)
        optimizer.zero_grad()
        state.losses["cropr_auxiliary"].backward()
        optimizer.step()
    assert found() > 0.99


def test_losses_need_targets() -> None:
    model = network().train()
    with pytest.raises(UsageError, match="pass targets"):
        model(IMAGES, with_losses=True)
    _, losses = model.eval()(IMAGES, with_losses=True, targets=TARGETS)
    assert not losses


def test_a_constant_number_is_removed_after_every_block_as_in_the_paper() -> None:
    removed, count, depth = 5, 64, 12
    rates = [(count - (i + 1) * removed) / (count - i * removed) for i in range(depth - 1)]
    layers = list(range(1, depth))
    made = make_reduction("cropr", keep_rate=rates, layers=layers, depth=depth, width=8, tokens=count)
    assert made.plan.dropped == (5,) * 11


# -- last layer fusion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["", "clc"])
@pytest.mark.parametrize("keep_rate", [0.5, [1.0, 0.25], [0.25, 1.0]])
def test_dropped_tokens_return_to_their_places_before_the_last_block(cache: str, keep_rate: Any) -> None:
    """With blocks that do nothing, fusion gives back the embedded patches."""
    model = fusing(keep_rate=keep_rate, cache=cache)
    for block in model.backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    host = model.backbone
    _, state = model.trace(IMAGES)
    assert torch.equal(state.x[:, :17], host._pos_embed(host.patch_embed(IMAGES)))
    assert torch.equal(state.patches, state.x[:, 1:17])
    assert state.grid == (4, 4)
    reduced, _ = state.trace["block2.tokens"].tolist()
    last, _ = state.trace["block3.tokens"].tolist()
    assert last - reduced >= 8
    assert last == 17 + state.extra
    assert bool(state.extra) == bool(cache)


def test_dropped_tokens_skip_the_blocks_in_between() -> None:
    model = fusing(layers=(1,))
    host = model.backbone
    with torch.inference_mode():
        state = model.trace(IMAGES)[1]
        kept = state.trace["block1.kept_idx"]
        x = host.blocks[0](host._pos_embed(host.patch_embed(IMAGES)))
        places = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept + 1], dim=1)[:, :, None].expand(-1, -1, 48)
        deep = host.blocks[2](host.blocks[1](x.gather(1, places)))
        expected = host.blocks[3](x.scatter(1, places, deep))
    torch.testing.assert_close(state.x, expected)


def test_heads_on_patches_and_maps_read_the_fused_tokens() -> None:
    model = fusing(head="pool")
    assert model(IMAGES).shape == (2, 3)
    with torch.inference_mode():
        [after] = model.forward_intermediates(IMAGES, [3], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(after, model.encode(IMAGES).patches)


def test_recomputed_activations_fuse_the_same_tokens() -> None:
    gradients = []
    for enable in (False, True):
        model = fusing().train()
        model.set_grad_checkpointing(enable)
        model(IMAGES).square().sum().backward()
        gradients.append(model.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


# -- rollout -----------------------------------------------------------------------------------------------------------


def test_dropped_tokens_leave_the_rollout_in_front_of_the_block() -> None:
    model = network(layers=(2,))
    with torch.no_grad():  # attention of initial weights is nearly uniform
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = IMAGES[:1]
    with torch.inference_mode(), record_attention(model) as recorder:
        state = model.trace(x)[1]
    weights = [each[0].mean(0) for each in recorder.pop_weights()]
    assert [len(each) for each in weights] == [17, 17, 9, 9]
    product = torch.eye(17)
    for i, each in enumerate(weights):
        if i == 2:
            product = product[torch.cat([torch.tensor([0]), 1 + state.trace["block2.kept_idx"][0]])]
        step = each + torch.eye(len(each))
        product = step / step.sum(1, keepdim=True) @ product
    torch.testing.assert_close(rollout_map(model, x)[0].flatten(), product[0, 1:])


def test_rollout_refuses_fusion() -> None:
    with pytest.raises(UsageError, match="not defined for last_layer_fusion"):
        rollout_map(fusing(), IMAGES)


# -- classes and weights -----------------------------------------------------------------------------------------------


def test_auxiliary_classifiers_follow_the_number_of_classes() -> None:
    model = network(classes=3)
    model.reset_classifier(0)
    assert not model.needs_targets
    assert not model.has_losses
    assert not list(model.plugins["reduction"].heads.parameters())
    model.to(torch.float64).reset_classifier(7)
    assert {tuple(head.weight.shape) for head in model.plugins["reduction"].heads.values()} == {(7, 48)}
    model(IMAGES.double(), with_losses=True, targets=TARGETS)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert network(classes=0)(IMAGES).shape == (2, 48)


@pytest.mark.parametrize("classes", [3, 5, 0])
@pytest.mark.parametrize("new_head", [False, True])
def test_weights_of_other_classes_keep_their_queries(classes: int, new_head: bool, tmp_path: Path) -> None:
    source = network(classes=3)
    save_model(source, tmp_path / "w.safetensors", tuple("abc"))
    torch.manual_seed(1)
    model = network(classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, tmp_path / "w.safetensors", new_head=new_head)
    fits = classes == 3 and not new_head
    for name, value in model.state_dict().items():
        own = name.startswith("head.") or ".heads." in name
        assert torch.equal(value, before[name] if own and not fits else source.state_dict()[name]), name


def test_weights_without_the_method_leave_it_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = create_model("vit_tiny_patch16", 3, 64, **SMALL)
    save_model(plain, tmp_path / "w.safetensors", tuple("abc"))
    model = network(classes=3)
    query = model.plugins["reduction"].queries["0"].clone()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.backbone.blocks[3].mlp.fc2.weight, plain.blocks[3].mlp.fc2.weight)
    assert torch.equal(model.plugins["reduction"].queries["0"], query)


def test_names_carry_keep_rates() -> None:
    model: Any = create_model("cropr25_clca_vit_tiny_patch16", 3, 128, **SMALL | {"depth": 12})
    assert model.plugins["reduction"].plan.counts == (16, 4, 1)
    assert type(model.plugins["cache"]).__name__ == "CrossLayerCache"
    assert "cropr_vit_tiny_patch16" in timm.list_models("cropr*")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_weight": 0.0}, "loss_weight of reduction cropr must be a number above 0"),
        ({"loss_weight": True}, "loss_weight of reduction cropr must be a number above 0"),
        ({"last_layer_fusion": 1}, "true or false"),
        ({"last_layer_fusion": True, "layers": [1, 4]}, "before block 4, the last one"),
        ({"queries": 2}, "no option queries: it has loss_weight, last_layer_fusion"),
    ],
)
def test_bad_settings_raise_one_sentence(settings: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"keep_rate": 0.5, "layers": [1], "depth": 5, "width": 8, "tokens": 16}
    with pytest.raises(UsageError, match=message):
        make_reduction("cropr", **(usual | settings))


def test_a_smaller_keep_rate_costs_less() -> None:
    from animesion_training.analysis.profile import count

    costs = [count(network(keep_rate=rate), (64, 64)).multiply_adds for rate in (0.9, 0.5, 0.25)]
    costs = [count(network(keep_rate=1.0), (64, 64)).multiply_adds, *costs]
    assert all(later < earlier for earlier, later in pairwise(costs))
    # what fusion adds: the last block on all 17 tokens in place of 5, at 12 D^2 + 2 T D multiply-adds a token
    added = count(fusing(), (64, 64)).multiply_adds - count(network(), (64, 64)).multiply_adds
    assert added == 12 * 48**2 * (17 - 5) + 2 * 48 * (17**2 - 5**2)
