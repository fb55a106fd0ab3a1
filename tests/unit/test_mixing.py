from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data.mixing import Mixing, MixingPlan, apply_plan, draw_plan, mix, smooth_labels

BOTH = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0)
BATCHES = st.tuples(st.integers(1, 9), st.just(3), st.integers(1, 24), st.integers(1, 24))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images in which every pixel of a sample is its place in the batch, and as many classes as samples."""
    places = torch.arange(shape[0])
    return places.float()[:, None, None, None].expand(shape).clone(), places


def plan(partners: list[int], blend: list[float], boxes: list[list[int]], shares: list[float]) -> MixingPlan:
    return MixingPlan(np.array(partners), np.array(blend), np.array(boxes), np.array(shares))


def test_mixup_by_hand() -> None:
    images, targets = random_images((2, 3, 4, 4))
    found = apply_plan(images, targets, 2, plan([1, 0], [0.75, 0.25], [[0] * 4] * 2, [0.75, 0.25]))
    assert found.images[:, 0, 0, 0].tolist() == [0.25, 0.25]
    assert found.targets.tolist() == [[0.75, 0.25], [0.75, 0.25]]


def test_cutmix_by_hand() -> None:
    images, targets = random_images((2, 1, 2, 4))
    found = apply_plan(images, targets, 2, plan([1, 0], [1, 1], [[0, 1, 1, 3], [0, 0, 2, 1]], [0.75, 0.75]))
    assert found.images[0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert found.images[1, 0].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    assert found.targets.tolist() == [[0.75, 0.25], [0.25, 0.75]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_those_of_timm(smoothing: float) -> None:
    targets = torch.tensor([3, 0, 2, 2])
    images = torch.zeros(4, 3, 2, 2)
    flipped = plan([3, 2, 1, 0], [0.3] * 4, [[0] * 4] * 4, [0.3] * 4)
    expected = mixup_target(targets, 5, lam=0.3, smoothing=smoothing)
    torch.testing.assert_close(apply_plan(images, targets, 5, flipped, smoothing).targets, expected)


def test_weight_one_changes_nothing() -> None:
    images = torch.randn(4, 3, 5, 5, generator=seeded())
    targets = torch.tensor([1, 0, 2, 1])
    found = apply_plan(images, targets, 3, plan([1, 2, 3, 0], [1, 1, 1, 0.5], [[0] * 4] * 4, [1, 1, 1, 0.5]))
    assert torch.equal(found.images[:3], images[:3])
    assert torch.equal(found.targets[:3], smooth_labels(targets, 3)[:3])
    for off in (Mixing(), Mixing(mixup_alpha=1.0, probability=0.0)):
        assert not off.active
        same = mix(images, targets, 3, off, seeded())
        assert same.images is images
        assert torch.equal(same.targets, smooth_labels(targets, 3))


@given(BATCHES, st.sampled_from(["batch", "sample"]), st.floats(0, 4), st.floats(0, 4), st.integers(0, 99))
@settings(deadline=None)
def test_labels_say_what_is_in_the_image(
    shape: tuple[int, int, int, int], per: Literal["batch", "sample"], mixup: float, cutmix: float, seed: int
) -> None:
    images, targets = random_images(shape)
    mixing = Mixing(mixup_alpha=mixup, cutmix_alpha=cutmix, per=per, probability=0.8, label_smoothing=0.1)
    found = mix(images, targets, shape[0], mixing, seeded(seed))
    assert found.images.shape == shape
    torch.testing.assert_close(found.targets.sum(1), torch.ones(shape[0]))
    # the mean pixel of a sample is the mean place in the batch by shares of the images in it
    plain = mix(images, targets, shape[0], Mixing(mixup, cutmix, 0.8, 0.5, mixing.per), seeded(seed)).targets
    torch.testing.assert_close(found.images.mean((1, 2, 3)), plain @ targets.float(), rtol=1e-4, atol=1e-4)


def test_one_draw_a_batch_replays() -> None:
    images, targets = torch.randn(8, 3, 16, 16, generator=seeded()), torch.arange(8)
    generator = seeded(7)
    mix(images, targets, 8, BOTH, generator)
    state = generator.get_state()
    second, third = (mix(images, targets, 8, BOTH, generator) for _ in range(2))
    assert not torch.equal(second.images, third.images)
    resumed = torch.Generator()
    resumed.set_state(state)
    for expected in (second, third):
        found = mix(images, targets, 8, BOTH, resumed)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.targets, expected.targets)
    # the generator advances by one draw, whatever the settings and the batch size
    one, other = seeded(), seeded()
    draw_plan((8, 3, 16, 16), Mixing(), one)
    draw_plan((3, 3, 4, 4), Mixing(1.0, 1.0, per="sample"), other)
    assert torch.equal(one.get_state(), other.get_state())


def test_one_weight_a_batch_or_one_a_sample() -> None:
    cases: list[tuple[Literal["batch", "sample"], int]] = [("batch", 1), ("sample", 64)]
    for per, different in cases:
        drawn = draw_plan((64, 3, 32, 32), Mixing(mixup_alpha=1.0, per=per), seeded())
        assert len(set(drawn.blend.tolist())) == different
        assert sorted(drawn.partners.tolist()) == list(range(64))


def test_shares_of_the_methods() -> None:
    mixing = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.5, cutmix_share=0.25, per="sample")
    drawn = draw_plan((20_000, 3, 224, 224), mixing, seeded())
    cut = (drawn.boxes[:, 2] > drawn.boxes[:, 0]) & (drawn.boxes[:, 3] > drawn.boxes[:, 1])
    blended = drawn.blend < 1
    assert not (cut & blended).any()
    assert cut.mean() == pytest.approx(0.125, abs=0.01)
    assert blended.mean() == pytest.approx(0.375, abs=0.01)
    assert drawn.blend[blended].mean() == pytest.approx(0.5, abs=0.01)
    assert (drawn.boxes >= 0).all()
    assert (drawn.boxes <= 224).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_layout_are_kept(dtype: torch.dtype) -> None:
    images = torch.randn(6, 3, 8, 8, generator=seeded()).to(dtype, memory_format=torch.channels_last)
    for mixing in (Mixing(mixup_alpha=1.0), Mixing(cutmix_alpha=1.0)):
        before = images.clone()
        found = mix(images, torch.arange(6), 6, mixing, seeded(3))
        assert found.images.dtype == dtype
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert found.targets.dtype == torch.float32
        assert torch.equal(images, before)


def test_mistakes() -> None:
    for options, message in (
        ({"mixup_alpha": -1}, "mixup_alpha"),
        ({"probability": 2}, "probability"),
        ({"per": "pixel"}, "batch or sample"),
        ({"label_smoothing": "much"}, "label_smoothing"),
    ):
        with pytest.raises(UsageError, match=message):
            Mixing(**options)
    with pytest.raises(ValueError, match="floating"):
        mix(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), 2, BOTH, seeded())
