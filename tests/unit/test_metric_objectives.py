"""Metric objectives: against their equations by hand, at their limits, and where a run cannot use them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from animesion.errors import UsageError
from animesion_training.data import schedule
from animesion_training.distributed import DistributedContext
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.losses.metric import SupCon
from animesion_training.losses.objectives import create_objective
from animesion_training.models import create_model
from animesion_training.models.embedding import Embedder, FeatureTap
from animesion_training.recipe import load
from tests import ranks

COUNTS = [4, 4, 2]
COSINES = [[0.6, -0.2, 0.1], [0.5, 0.4, -0.9], [0.0, 0.3, 0.8]]
TARGETS = [0, 1, 2]


def batch() -> tuple[Any, Any]:
    return torch.tensor(COSINES, dtype=torch.float64), torch.tensor(TARGETS)


def cross_entropy(logits: list[list[float]], targets: list[int]) -> list[float]:
    return [math.log(sum(math.exp(z) for z in row)) - row[target] for row, target in zip(logits, targets, strict=True)]


def test_arcface_adds_the_margin_to_the_angle() -> None:
    logits = [[10 * cosine for cosine in row] for row in COSINES]
    for i, target in enumerate(TARGETS):
        logits[i][target] = 10 * math.cos(math.acos(COSINES[i][target]) + 0.5)
    losses = create_objective("arcface", margin=0.5, scale=10.0, reduction="none")(*batch())
    assert losses.tolist() == pytest.approx(cross_entropy(logits, TARGETS))


def test_arcface_keeps_falling_where_the_moved_angle_would_pass_the_half_circle() -> None:
    own = torch.tensor([[-0.999, 0.0], [-0.95, 0.0], [-0.9, 0.0]], dtype=torch.float64, requires_grad=True)
    losses = create_objective("arcface", margin=0.5, scale=4.0, reduction="none")(own, torch.tensor([0, 0, 0]))
    logit = 4 * (-0.999 - 0.5 * math.sin(0.5))
    assert losses[0].item() == pytest.approx(cross_entropy([[logit, 0.0]], [0])[0])
    assert losses.tolist() == sorted(losses.tolist(), reverse=True)
    losses.sum().backward()
    assert (own.grad[:, 0] < 0).all()  # more similar is always better


def test_arcface_has_a_finite_slope_at_equal_directions() -> None:
    own = torch.tensor([[1.0, -1.0]], requires_grad=True)
    create_objective("arcface")(own, torch.tensor([0])).backward()
    assert own.grad.isfinite().all()


def test_cosface_subtracts_the_margin_from_the_cosine() -> None:
    logits = [[20 * (z - 0.25 * (c == t)) for c, z in enumerate(row)] for row, t in zip(COSINES, TARGETS, strict=True)]
    losses = create_objective("cosface", margin=0.25, scale=20.0, reduction="none")(*batch())
    assert losses.tolist() == pytest.approx(cross_entropy(logits, TARGETS))


def test_no_margin_is_a_softmax_of_scaled_cosines() -> None:
    logits, targets = batch()
    plain = create_objective("cross-entropy")(10 * logits, targets)
    for name in ("arcface", "cosface"):
        assert create_objective(name, margin=0.0, scale=10.0)(logits, targets).item() == pytest.approx(plain.item())


def test_proxy_anchor_by_hand() -> None:
    """Two images of class 0 and one of class 1; class 2 has no image here, class 3 none in training."""
    cosines = [[0.9, 0.2, -0.3, 0.7], [0.4, 0.1, 0.0, 0.6], [-0.1, 0.5, 0.3, -0.2]]
    alpha, delta = 8.0, 0.1

    def pull(values: list[float]) -> float:
        return math.log(1 + sum(math.exp(-alpha * (s - delta)) for s in values))

    def push(values: list[float]) -> float:
        return math.log(1 + sum(math.exp(alpha * (s + delta)) for s in values))

    expected = (pull([0.9, 0.4]) + pull([0.5])) / 2
    expected += (push([-0.1]) + push([0.2, 0.1]) + push([-0.3, 0.0, 0.3])) / 3
    given = torch.tensor(cosines, dtype=torch.float64), torch.tensor([0, 0, 1])
    assert create_objective("proxy-anchor", [9, 5, 2, 0], alpha=alpha, delta=delta)(*given).item() == pytest.approx(
        expected
    )


def test_supcon_by_hand() -> None:
    angles, targets, tau = [0.0, 0.3, 1.2, 2.0], [0, 0, 1, 0], 0.5
    features = torch.tensor([[3 * math.cos(a), 3 * math.sin(a)] for a in angles], dtype=torch.float64)
    losses = []
    for i in range(4):
        others = [a for a in range(4) if a != i]
        positives = [p for p in others if targets[p] == targets[i]]
        total = sum(math.exp(math.cos(angles[i] - angles[a]) / tau) for a in others)
        each = [math.cos(angles[i] - angles[p]) / tau - math.log(total) for p in positives]
        losses.append(-sum(each) / len(positives) if positives else 0.0)
    objective = create_objective("supcon", temperature=tau, reduction="none")
    assert objective(features, torch.tensor(targets)).tolist() == pytest.approx(losses)


def test_supcon_of_images_without_positives_is_0_and_has_a_finite_gradient() -> None:
    for count in (1, 3):
        features = torch.randn(count, 4, requires_grad=True)
        loss = SupCon()(features, torch.arange(count))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(features.grad, torch.zeros(count, 4))


@pytest.mark.parametrize("name", ["arcface", "cosface", "proxy-anchor", "supcon"])
def test_soft_labels_are_refused(name: str) -> None:
    logits = torch.rand(3, 3)
    with pytest.raises(UsageError, match="needs one class per image"):
        create_objective(name, COUNTS)(logits, logits.softmax(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("arcface", {"margin": 2.0}), ("arcface", {"scale": 0}), ("cosface", {"margin": -0.1}),
        ("proxy-anchor", {"alpha": 0}), ("supcon", {"temperature": 0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        create_objective(name, COUNTS, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=arcface"], "reads cosines: set model.head = 'cosine'"),
        (["objective.name=cosface", "model.head=cosine"], "reads cosines"),  # with a learned scale of 16
        (["objective.name=supcon", "run.accumulate=2"], "compares all images of a batch, which run.accumulate = 2"),
        (["objective.name=supcon", "run.compile=true"], "run.compile hides"),
        (["objective.name=supcon", "model.selector=cal"], "leave teacher and selector cal out"),
        (["data.images_per_class=3", "run.batch_size=4"], "batches of 4 are no multiple of 3 images per class"),
    ],
)
def test_runs_that_an_objective_does_not_allow_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    recipe = load("scratch", [*ranks.SMALL, "run.batch_size=4", *overrides])
    with pytest.raises(UsageError, match=message):
        Trainer(recipe, ranks.drawn(12), tmp_path, DistributedContext(0, 1, torch.device("cpu")), Watcher())


def test_supcon_trains_the_classifier_without_an_influence_on_the_features(tmp_path: Path) -> None:
    """The classifier learns by cross-entropy; the gradient of everything before it is that of the contrast alone."""
    recipe = load("scratch", [*ranks.SMALL, "run.batch_size=6", "objective.name=supcon"])
    trainer = Trainer(recipe, ranks.drawn(12), tmp_path, DistributedContext(0, 1, torch.device("cpu")), Watcher())
    images, targets = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    step = trainer.update.step
    terms = step(images, targets, torch.arange(6))
    assert list(terms) == ["label", "classifier"]
    sum(terms.values()).backward()
    found = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    tap = FeatureTap(trainer.model)
    with tap:
        logits = trainer.model(images)
    features = tap.take()
    torch.nn.functional.cross_entropy(logits, targets).backward(retain_graph=True)
    head = trainer.model.head.weight.grad.clone()
    trainer.model.zero_grad()
    SupCon()(features, targets).backward()
    for name, value in trainer.model.named_parameters():
        expected = {"head.weight": head}.get(name, value.grad)
        if name != "head.bias":
            torch.testing.assert_close(found[name], expected, msg=name)


def test_runs_of_a_class_fill_batches() -> None:
    labels = np.array([0] * 7 + [1] * 8 + [2] * 5)
    order = np.random.default_rng(0).permutation(20)
    found = schedule.class_runs(order, labels, 4)
    assert sorted(found.tolist()) == list(range(20))
    assert [len(set(labels[found[i : i + 4]])) for i in range(0, 16, 4)] == [1, 1, 1, 1]
    assert sorted(labels[found[16:]].tolist()) == [0, 0, 0, 2]
    # within a class, and of the first samples of the runs, the order stays
    for c in range(3):
        assert [i for i in found if labels[i] == c] == [i for i in order if labels[i] == c]
    assert schedule.class_runs(order, labels, 1) is order


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("resnet18", {}, 512),
        ("resnet18", {"head": "cosine"}, 512),
        ("vit_tiny_patch16", {"depth": 4, "embed_dim": 16, "num_heads": 2, "head": "ifa"}, 16),
        ("vit_tiny_patch16", {"depth": 1, "embed_dim": 16, "num_heads": 2, "selector": "cal"}, 32 * 16),
    ],
)
def test_embeddings_are_what_the_last_layer_reads(name: str, options: dict[str, Any], width: int) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3, 32, **options).eval()
    if options.get("head") == "ifa":
        torch.nn.init.constant_(model.head.layers.bias, 5.0)  # an untrained one can have features of 0
    images = torch.randn(2, 3, 32, 32)
    vectors = Embedder(model)(images)
    assert vectors.shape == (2, width)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    if name == "resnet18":
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(vectors, torch.nn.functional.normalize(pooled, dim=1))


def test_a_network_that_classifies_several_vectors_has_no_embedding() -> None:
    model = create_model(
        "vit_tiny_patch16", 3, 32, selector="glsim", depth=4, embed_dim=16, num_heads=2,
        method_options={"selector": {"classifier": "avg", "top": 2}},
    ).eval()  # fmt: skip
    with pytest.raises(UsageError, match="classifies several vectors"):
        Embedder(model)(torch.randn(1, 3, 32, 32))
