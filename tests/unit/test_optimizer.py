"""Optimizer and averaged weights as a recipe configures them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from animesion_training.engine import optim
from animesion_training.recipe import RunSection


def test_the_average_warms_up_and_then_has_its_decay() -> None:
    model = nn.Linear(2, 2)
    average = optim.make_average(model, RunSection(ema=0.99))
    for step, decay in {1: 0.0, 2: 1 - 2**-0.75, 16: 1 - 1 / 8, 400: 1 - 400**-0.75, 465: 0.99, 9999: 0.99}.items():
        assert average.get_decay(step) == pytest.approx(decay)
    assert optim.make_average(model, RunSection(ema=0.99, ema_warmup=0)).get_decay(16) == 0.99
    # with power 1, the average is the mean of the weights of all steps
    mean = optim.make_average(model, RunSection(ema=0.9999, ema_warmup=1))
    for step, value in enumerate((3.0, 5.0, 10.0), 1):
        nn.init.constant_(model.weight, value)
        mean.update(model, step)
    assert torch.allclose(mean.module.weight, torch.full((2, 2), 6.0))
