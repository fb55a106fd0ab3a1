"""CALMix: pairs of images of a class, their mixtures, its loss, and how a network with CAL classifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import schedule, views
from animesion_training.distributed import DistributedContext
from animesion_training.engine import norms
from animesion_training.engine.feed import feed
from animesion_training.engine.steps import CALStep
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.losses.cal import FeatureCenters, cal_loss
from animesion_training.losses.distillation import auxiliary_loss, dkd, std_focal
from animesion_training.models.cal import CALClassifier, CALEvaluation, CALOutput, top_k_ranks, vote_shares
from animesion_training.recipe import ViewsSection, load
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))
CALMIX = ("model.selector=cal", "data.partners=true", "views.mix=true")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_each_sample_is_followed_by_another_of_its_class() -> None:
    labels = np.array([0, 1, 0, 2, 0, 1])  # class 2 has one sample
    order = np.array([5, 3, 0, 4, 1, 2])
    seen: dict[int, set[int]] = {}
    for epoch in range(60):
        pairs = schedule.with_partners(order, labels, seed=3, epoch=epoch).reshape(-1, 2)
        assert pairs[:, 0].tolist() == order.tolist()
        for first, second in pairs.tolist():
            seen.setdefault(first, set()).add(second)
    assert seen == {0: {2, 4}, 2: {0, 4}, 4: {0, 2}, 1: {5}, 5: {1}, 3: {3}}


def test_partners_are_uniform_over_the_others_of_the_class() -> None:
    labels = np.zeros(5, dtype=np.int64)
    drawn = np.concatenate(
        [schedule.with_partners(np.array([2]), labels, seed=0, epoch=epoch)[1:] for epoch in range(4000)]
    )
    assert np.bincount(drawn, minlength=5)[2] == 0
    assert abs(np.bincount(drawn, minlength=5)[[0, 1, 3, 4]] - 1000).max() < 120


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 5))
def test_partners_are_on_the_same_process(start: int, size: int, world_size: int) -> None:
    shares = [schedule.share(start, start + size, rank, world_size, partners=True) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(start, start + size))
    last = start + size - 1 if size % 2 else -1
    for each in shares:
        if last in each:  # it has no partner, and its process has the pair before it
            assert len(each) == 1 or last - 1 in each
            each = each[:-1]
        assert ((each.reshape(-1, 2)[:, 0] - start) % 2 == 0).all()
        assert (np.diff(each.reshape(-1, 2)) == 1).all()
    assert len(shares[0])


def test_an_epoch_has_every_image_and_its_partner(tmp_path: Path) -> None:
    trainer = Trainer(
        load("scratch", [*ranks.SMALL, *CALMIX, "run.batch_size=4"]), ranks.drawn(9), tmp_path, ALONE, Watcher()
    )
    batches = [batch for batch, _ in feed(trainer.stream, ALONE.device)]
    indices = torch.cat([batch.indices for batch in batches]).view(-1, 2)
    labels = torch.cat([batch.labels for batch in batches]).view(-1, 2)
    assert sorted(indices[:, 0].tolist()) == list(range(9))
    assert torch.equal(labels[:, 0], labels[:, 1])
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 2]
    assert len({int(each) for batch in batches for each in batch.seeds}) == 18  # each is augmented on its own


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_regions_are_exchanged_by_hand() -> None:
    first = torch.arange(16.0).view(1, 4, 4)
    images = torch.stack((first, 100 + first))
    boxes = torch.tensor([[0, 2, 1, 4], [1, 4, 0, 1]])  # y0, y1, x0, x1: 2 rows and 3 columns; 3 rows and 1 column
    found = views.exchange(images, boxes, torch.tensor([1, 0]))
    expected = images.clone()
    # corners aligned: the two rows are the first and the last of 104, 108, 112; its only column fills three
    expected[0, 0, 0, 1:4] = 104
    expected[0, 0, 1, 1:4] = 112
    # rows 0, 1/2 and 1 of [[1, 2, 3], [5, 6, 7]], first column
    expected[1, 0, 1:4, 0] = torch.tensor([1.0, 3.0, 5.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_exchanged_regions_are_those_of_interpolate(height: int, width: int, seed: int) -> None:
    images, u = random(4, 3, height, width, seed=seed), random(4, 4, seed=seed + 1).double()
    y0, x0 = (u[:, 0] * height).long(), (u[:, 1] * width).long()
    y1, x1 = y0 + 1 + (u[:, 2] * (height - y0 - 1)).long(), x0 + 1 + (u[:, 3] * (width - x0 - 1)).long()
    boxes, partners = torch.stack((y0, y1, x0, x1), 1), torch.tensor([1, 0, 3, 3])
    expected = images.clone()
    for i, j in enumerate(partners.tolist()):
        (a, b, c, d), (e, f, g, h) = boxes[i].tolist(), boxes[j].tolist()
        region = images[j : j + 1, :, e:f, g:h]
        expected[i, :, a:b, c:d] = functional.interpolate(region, (b - a, d - c), mode="bilinear", align_corners=True)[
            0
        ]
    found = views.exchange(images, boxes, partners)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3], images[3], rtol=1e-6, atol=1e-6)  # its own partner


def test_views_are_crops_mixtures_and_drops() -> None:
    images, attention, keys = random(4, 3, 20, 24), random(4, 6, 5, 6, seed=1), torch.arange(4)
    draws, partners = views.draw(keys, attention), torch.tensor([1, 0, 3, 2])
    mixture = views.draw_mixture(keys, attention, partners, threshold=(0.6, 0.8))
    assert ((mixture.threshold >= 0.6) & (mixture.threshold < 0.8)).all()
    found = views.views(images, attention, draws, mixture=mixture, upsampling="bicubic", pool=True)
    boxes = []
    for i in range(4):
        cells = functional.avg_pool2d(attention[i : i + 1, mixture.maps[i, 0]][None], 2)
        up = functional.interpolate(cells, (20, 24), mode="bicubic", align_corners=False)[0, 0]
        rows, columns = (up >= mixture.threshold[i] * cells.max()).nonzero(as_tuple=True)
        assert len(rows)
        y0, x0 = int(rows.min()), int(columns.min())
        boxes.append([y0, max(int(rows.max()), y0 + 1), x0, max(int(columns.max()), x0 + 1)])
    torch.testing.assert_close(found[4:8], views.exchange(images, torch.tensor(boxes), partners))
    plain = views.views(images, attention, draws, upsampling="bicubic", pool=True)
    assert torch.equal(torch.cat((found[:4], found[8:])), plain)
    assert not torch.equal(plain, views.views(images, attention, draws))


def test_a_map_of_zeros_exchanges_all_but_the_last_row_and_column() -> None:
    images, attention = random(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)
    mixture = views.draw_mixture(torch.arange(2), attention, torch.tensor([1, 0]))
    found = views.views(images, attention, views.draw(torch.arange(2), attention), mixture=mixture)[2:4]
    assert torch.equal(found[0, :, :7, :7], images[1, :, :7, :7])
    assert torch.equal(found[0, :, 7], images[0, :, 7])


def test_maps_too_small_to_pool_are_refused() -> None:
    with pytest.raises(UsageError, match="maps of 1x3 cannot be averaged"):
        views.pool_map(torch.zeros(1, 1, 1, 3))


# -- loss and step ---------------------------------------------------------------------------------------------------


def test_the_weights_of_the_loss_by_hand() -> None:
    outputs = [
        CALOutput(random(b, 5, seed=b), random(b, 5, seed=b + 1), functional.normalize(random(b, 8), dim=1), Tensor())
        for b in (2, 6)
    ]
    targets, centers = torch.tensor([3, 3]), FeatureCenters(5, 8)
    raw, aug = outputs
    terms = cal_loss(raw, aug, targets, centers)
    assert float(terms["label"]) == pytest.approx(float(functional.cross_entropy(raw.logits, targets)) / 3)
    assert float(terms["views"]) == pytest.approx(float(functional.cross_entropy(aug.logits, targets.repeat(3))))
    effects = functional.cross_entropy(torch.cat((raw.effect, aug.effect)), targets.repeat(4))
    assert float(terms["effect"]) == pytest.approx(4 / 3 * float(effects))


def classifier(**options: Any) -> CALClassifier:
    torch.manual_seed(0)
    return CALClassifier(timm.create_model("resnet10t", num_classes=3), 5, num_maps=4, **options)


def test_the_step_passes_each_image_and_three_views() -> None:
    model, seen = classifier(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    step = CALStep(model, torch.enable_grad, model, ViewsSection(mix=True))
    images, targets = random(6, 3, 64, 64), torch.tensor([0, 0, 1, 1, 2, 2])
    step.begin(ALONE, torch.arange(6), 6, 1)
    terms = step(images, targets, torch.arange(6))
    assert [len(each) for each in seen] == [6, 18]
    assert all(term.isfinite() for term in terms.values())
    mixed = seen[1][6:12]
    for i, j in ((0, 1), (1, 0), (4, 5)):
        changed = (mixed[i] != images[i]).any(0)
        assert changed.any()
        # what changed is in a box, and its values are between those of the partner
        assert mixed[i][:, changed].min() >= images[j].min()


def test_without_its_partner_an_image_stays_as_it_is() -> None:
    model, seen = classifier(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    step = CALStep(model, torch.enable_grad, model, ViewsSection(mix=True))
    images, places = random(4, 3, 64, 64), torch.tensor([1, 2, 3, 6])  # 0 and 7 could not be read
    step.begin(ALONE, places, 8, 1)
    step(images, torch.tensor([0, 1, 1, 2]), torch.arange(4))
    mixed = seen[1][4:8]
    same = [torch.allclose(mixed[i], images[i], atol=1e-6) for i in range(4)]
    assert same == [True, False, False, True]


def test_pieces_cut_no_pair(tmp_path: Path) -> None:
    """Eight images in three pieces would be 3, 3 and 2."""
    mixtures = []
    for count in (1, 3):
        overrides = [*ranks.SMALL, *CALMIX, "run.batch_size=8", f"run.accumulate={count}"]
        overrides.append("model.freeze=['head.attentions.bn']")
        trainer = Trainer(load("scratch", overrides), ranks.drawn(8), tmp_path, ALONE, Watcher())
        norms.train_mode(trainer.update.step)  # keeps the statistics of the frozen norm
        passed: list[Tensor] = []
        trainer.model.register_forward_pre_hook(lambda _, args, passed=passed: passed.append(args[0]))
        batch, _ = next(iter(feed(trainer.stream, ALONE.device)))
        trainer.train_batch(batch)
        raw, mixed = torch.cat(passed[::2]), torch.cat([each.chunk(3)[1] for each in passed[1::2]])
        mixtures.append(mixed)
        assert len(passed) == 2 * count
    torch.testing.assert_close(*mixtures, rtol=1e-5, atol=1e-5)
    assert (mixed != raw).flatten(1).any(1).all()


def test_impossible_settings_are_one_sentence(tmp_path: Path) -> None:
    def trainer(*overrides: str) -> Trainer:
        return Trainer(load("scratch", [*ranks.SMALL, *overrides]), ranks.drawn(8), tmp_path, ALONE, Watcher())

    with pytest.raises(UsageError, match=r"set data\.partners = true"):
        trainer("model.selector=cal", "views.mix=true")
    with pytest.raises(UsageError, match=r"set model\.selector = 'cal'"):
        trainer("views.mix=true", "data.partners=true")
    with pytest.raises(UsageError, match=r"give an even run\.batch_size"):
        trainer(*CALMIX, "run.batch_size=3")
    with pytest.raises(UsageError, match=r"views\.mix_threshold must be"):
        load("calmix", ["views.mix_threshold=[0.8, 0.6]"])


# -- evaluation ------------------------------------------------------------------------------------------------------


def trained(model: Any) -> Any:
    model.train()
    for seed in range(3):
        model(random(4, 3, 64, 64, seed=seed))
    return model.eval()


@pytest.mark.parametrize("upsampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize("k", [0, 1])
def test_a_single_crop_is_averaged_with_the_image(upsampling: Any, k: int) -> None:
    model, images = trained(classifier(views="single", upsampling=upsampling, top_k=k)), random(2, 3, 64, 64, seed=5)
    with torch.no_grad():
        parts = model.forward_parts(images)
        maps = parts.attention.mean(1, keepdim=True)
        limits = maps.flatten(1).sort(descending=True).values[:, 1] if k else 0.1 * maps.amax((1, 2, 3))  # k_4 is 2
        boxes = views.crop_boxes(maps, (64, 64), limits, 0.05, upsampling, absolute=True)
        expected = (parts.logits + model.forward_parts(views.crop(images, boxes)).logits) / 2
        torch.testing.assert_close(model(images), expected)


def test_ranks_of_top_k_are_those_of_linspace() -> None:
    assert top_k_ranks(1) == [1, 1, 1, 2, 2, 2]
    assert top_k_ranks(4) == [4, 5, 6, 6, 7, 8]
    for k in range(1, 60):
        assert top_k_ranks(k) == np.linspace(k, 2 * k, 6).round().astype(int).tolist()


@pytest.mark.parametrize("unmirrored", [False, True])
def test_top_k_crops_of_mirror_images_have_the_other_ranks(unmirrored: bool) -> None:
    model = trained(classifier(views="full", top_k=1, unmirrored=unmirrored))
    images = random(1, 3, 64, 64, seed=5)
    expected = []
    with torch.no_grad():
        for seen, ks in ((images, (1, 1, 2)), (images.flip(3), (1, 2, 2))):
            parts = model.forward_parts(seen)
            expected.append(parts.logits)
            maps = parts.attention.mean(1, keepdim=True)
            for k, padding in zip(ks, (0.1, 0.1, 0.05), strict=True):
                limit = maps.flatten().sort(descending=True).values[k - 1 : k]
                box = views.crop_boxes(maps, (64, 64), limit, padding, absolute=True)
                expected.append(model.forward_parts(views.crop(images if unmirrored else seen, box)).logits)
        torch.testing.assert_close(model(images), torch.cat(expected).mean(0, keepdim=True), rtol=1e-4, atol=1e-4)


def test_votes_are_counted_by_hand() -> None:
    # orders of the classes by view, for one image: [2, 0, 1], [0, 2, 3], [2, 0, 1]
    logits = torch.tensor([[[2.0, 1, 3, 0, -1]], [[3.0, 0, 2, 1, 0.5]], [[2.0, 1, 3, 0, -1]]])
    found = vote_shares(logits, 2)
    # two votes for the first and one for the second: class 2 has 2 + 1 + 2, class 0 has 1 + 2 + 1
    assert found.exp()[0, [2, 0]].tolist() == pytest.approx([5 / 9, 4 / 9], abs=2e-3)
    assert found[0].argsort(descending=True).tolist() == [2, 0, 1, 3, 4]  # the rest by their mean logits
    tied = torch.tensor([[[0.0, 3, 2]], [[3.0, 0, 2]]])  # 1, 2 and 0, 2: class 1 came first, then 2, then 0
    assert vote_shares(tied, 2)[0].argsort(descending=True).tolist() == [1, 2, 0]
    with pytest.raises(UsageError, match="4 votes of each view need as many classes"):
        vote_shares(tied, 4)


def test_voting_ranks_the_views_of_the_full_evaluation() -> None:
    model, images = trained(classifier(views="full", votes=3)), random(3, 3, 64, 64, seed=5)
    with torch.no_grad():
        shares = model(images).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    # 8 views with 3 + 2 + 1 votes: shares are multiples of 1/48, up to what orders ties
    assert (48 * shares - (48 * shares).round()).abs().max() < 0.05


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"view": "full"}, "did you mean 'views'"),
        ({"views": "half"}, "raw, single, full"),
        ({"top_k": 3}, "views are 'raw'"),
        ({"views": "single", "votes": 5}, "votes are those of views 'full'"),
        ({"views": "full", "votes": -1}, "votes"),
        ({"upsampling": "area"}, "bilinear, bicubic"),
        ({"pool": "yes"}, "true or false"),
    ],
)
def test_impossible_evaluations_are_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        CALEvaluation().changed(values)


def test_more_values_than_a_map_has_are_refused() -> None:
    model = trained(classifier(views="single", top_k=3))  # a map of 2x2
    with pytest.raises(UsageError, match="needs 6 values of a map, which has 4"):
        model(random(1, 3, 64, 64))


# -- presets ---------------------------------------------------------------------------------------------------------


def test_presets_fill_what_a_recipe_leaves_open() -> None:
    weak, medium, strong = (load("scratch", [f"augment.preset={each}"]) for each in ("weak", "medium", "strong"))
    assert (weak.augment.trivial, weak.augment.erasing, weak.objective.smoothing, weak.model.options) == (
        False, 0.0, 0.0, {},
    )  # fmt: skip
    assert (medium.augment.trivial, medium.augment.erasing, medium.augment.erasing_area) == (True, 0.3, (0.02, 0.4))
    assert (medium.objective.smoothing, medium.model.options) == (0.1, {"drop_path_rate": 0.1})
    assert (strong.augment.crop, strong.augment.mixup, strong.augment.cutmix) == ("random-resized", 1.0, 1.0)
    assert strong.augment.mix_probability == 0.5
    given = load("scratch", ["augment.preset=medium", "augment.erasing=0.1", "model.options={}"])
    assert (given.augment.erasing, given.model.options, given.augment.trivial) == (0.1, {}, True)


def test_a_resolved_preset_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load("scratch", ["augment.preset=medium"])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    again = load(str(tmp_path / "recipe.toml"))
    assert again == recipe
    assert again.digest() == recipe.digest()


# -- a further loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulation", ["teacher", "student", "difference"])
def test_std_focal_by_hand(modulation: Any) -> None:
    student, teacher, targets = random(3, 4), random(3, 4, seed=1), torch.tensor([1, 0, 3])
    expected = 0.0
    for s, t, y in zip(student.double().softmax(1), teacher.double().softmax(1), targets.tolist(), strict=True):
        m = {"teacher": 1 - t[y], "student": 1 - s[y], "difference": abs(t[y] - s[y])}[modulation]
        expected -= float(m**2 * s[y].log()) / 3
    assert float(std_focal(student, teacher, targets, modulation=modulation)) == pytest.approx(expected, rel=1e-5)
    found = auxiliary_loss("std_focal", student, teacher, targets, modulation=modulation, gamma=2.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_options_of_further_losses_are_checked() -> None:
    student, teacher, targets = random(3, 4), random(3, 4, seed=1), torch.tensor([1, 0, 3])
    assert auxiliary_loss("dkd", student, teacher, targets, beta=8.0) == dkd(student, teacher, targets, beta=8.0)
    with pytest.raises(UsageError, match="did you mean 'beta'"):
        auxiliary_loss("dkd", student, teacher, targets, bet=8.0)
    with pytest.raises(UsageError, match="teacher, student or difference"):
        std_focal(student, teacher, targets, modulation="both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one target class"):
        std_focal(student, teacher, torch.ones(3, 4))
