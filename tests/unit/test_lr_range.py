"""The learning-rate range test: smoothing, and the rate at which the loss falls fastest."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

from animesion_training.engine.lr_range import smooth, steepest
from animesion_training.engine.update import piece_starts


def test_smoothing_starts_at_the_first_loss_and_follows_the_later_ones():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    # (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9^2)
    assert smooth([1.0, 3.0]) == pytest.approx([1.0, 0.39 / 0.19])
    assert smooth([1.0] + [5.0] * 200)[-1] == pytest.approx(5.0, abs=1e-6)


def test_the_steepest_fall_is_before_the_minimum():
    rates = [10.0**i for i in range(-8, 4)]
    losses = [3, 3, 3, 3, 2.9, 2.0, 1.5, 1.4, 1.6, 1.0, math.inf, math.inf]
    # slopes around 1e-4 to 1e-2: -1.0, -1.4, -0.6
    assert steepest(rates, losses) == pytest.approx(1e-3 / 10 * 10)
    assert steepest(rates[:6], [1, 2, 3, 4, 5, 6]) is None
    assert steepest(rates[:6], [3, 2, 1, 4, 5, 6]) is None  # the first steps are noise


def test_pieces_of_a_share_keep_units_together_and_are_large_enough():
    assert piece_starts(10, 3) == [4, 7]
    assert piece_starts(10, 3, unit=2) == [4, 8]
    assert piece_starts(9, 2, unit=2) == [6]  # 2, 2, 2 and 2, 1
    assert piece_starts(9, 8, smallest=4) == [5]
    assert piece_starts(1, 8, unit=2) == piece_starts(0, 4) == piece_starts(6, 1) == []
