"""Optimizer and averaged weights as a recipe configures them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from animesion.errors import UsageError
from animesion_training.engine import optim
from animesion_training.recipe import OptimizerSection, RunSection, load


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


def made(name: str, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """The settings of the first group of an optimizer."""
    settings = OptimizerSection(name=name, options=options)
    return optim.make_optimizer(nn.Linear(2, 2), settings, torch.device(device)).param_groups[0]


def test_options_reach_the_optimizer() -> None:
    group = made("adamw", betas=[0.9, 0.95], eps=1e-6, amsgrad=True)
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.95), 1e-6, True)
    assert made("sgd")["nesterov"]
    assert not made("sgd", nesterov=False)["nesterov"]
    assert load("scratch", ["optimizer.name=lamb", "optimizer.options.betas=[0.9, 0.98]"]).decisive()[
        "optimizer.options"
    ] == {"betas": [0.9, 0.98]}


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("sgd", {"betas": [0.9, 0.95]}, "sgd has no option 'betas'"),
        ("sgd", {"eps": 1e-8}, "sgd has no option 'eps'"),
        ("adamw", {"beta": 0.9}, "adamw has no option 'beta'; did you mean 'betas'"),
        ("adamw", {"lr": 0.1}, "adamw has no option 'lr'"),
        ("adamw", {"betas": [2.0, 0.9]}, "'adamw' cannot be created: Invalid beta parameter"),
        ("adamw", {"betas": 0.9}, "'adamw' cannot be created"),
        ("adamw", {"fused": True, "foreach": True}, "'adamw' cannot be created"),
        ("adamx", {}, "no optimizer 'adamx'; did you mean 'adamax'"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        made(name, **options)
    assert "\n" not in str(caught.value)


def test_optimizers_are_fused_where_a_kernel_exists() -> None:
    for name in ("sgd", "momentum", "adam", "adamw", "lookahead_adamw"):
        assert made(name)["fused"]
        assert not made(name, "meta")["fused"]
        assert not made(name, fused=False)["fused"]
        assert not made(name, foreach=True)["fused"]
    assert "fused" not in made("lamb")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_optimizers_do_what_the_plain_ones_do(name: str) -> None:
    ends = []
    for fused in (True, False):
        torch.manual_seed(1)
        model = nn.Linear(5, 3)
        settings = OptimizerSection(name=name, lr=0.1, weight_decay=0.01, options={"fused": fused})
        optimizer = optim.make_optimizer(model, settings, torch.device("cpu"))
        for _ in range(5):
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.weight)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)
