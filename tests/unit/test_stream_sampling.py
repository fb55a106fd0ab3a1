"""Long-tail samplings: quotas, decks, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion_training.data.sampling import SAMPLINGS, class_quotas, class_shares, epoch_draws

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def labels_of(counts: list[int]) -> np.ndarray:
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(labels)


@given(COUNTS, st.sampled_from(SAMPLINGS), st.integers(0, 9))
def test_quotas_sum_to_the_samples_and_follow_the_shares(counts: list[int], sampling: str, epoch: int) -> None:
    array = np.array(counts)
    quotas = class_quotas(array, sampling, epoch=epoch, epochs=8)
    shares = class_shares(array, sampling, epoch=epoch, epochs=8)
    assert quotas.sum() == array.sum()
    assert np.abs(quotas - shares * array.sum()).max() < 1
    assert (quotas[array == 0] == 0).all()


def test_shares_are_those_of_the_paper() -> None:
    counts = np.array([100, 25, 0, 1])
    assert class_shares(counts, "instance") == pytest.approx(counts / 126)
    assert class_shares(counts, "square-root") == pytest.approx(np.array([10, 5, 0, 1]) / 16)
    assert class_shares(counts, "class-balanced") == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    halfway = class_shares(counts, "progressive", epoch=5, epochs=10)
    assert halfway == pytest.approx((counts / 126 + np.array([1, 1, 0, 1]) / 3) / 2)


@settings(deadline=None)
@given(COUNTS, st.sampled_from(SAMPLINGS), st.integers(1, 5))
def test_no_sample_repeats_before_all_of_its_class_were_drawn(counts: list[int], sampling: str, epochs: int) -> None:
    labels = labels_of(counts)
    drawn = np.zeros(len(labels), dtype=int)
    for epoch in range(epochs + 1):
        draws = epoch_draws(labels, len(counts), sampling, seed=3, epoch=epoch, epochs=epochs)
        assert len(draws) == len(labels)
        quotas = class_quotas(np.array(counts), sampling, epoch=epoch, epochs=epochs)
        assert (np.bincount(labels[draws], minlength=len(counts)) == quotas).all()
        drawn += np.bincount(draws, minlength=len(labels))
        for c in range(len(counts)):
            times = drawn[labels == c]
            assert len(times) == 0 or times.max() - times.min() <= 1


def test_epochs_of_a_head_class_draw_different_samples() -> None:
    labels = np.repeat([0, 1], [100, 10])
    first, second = (
        set(epoch_draws(labels, 2, "class-balanced", seed=0, epoch=epoch)[labels[:110] == 0].tolist())
        for epoch in (0, 1)
    )
    assert first != second
    same = [epoch_draws(labels, 2, "square-root", seed=7, epoch=3).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != epoch_draws(labels, 2, "square-root", seed=8, epoch=3).tolist()
