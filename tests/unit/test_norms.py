"""Batch norms: which networks have them, and their replacement by synchronised ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext
from animesion_training.engine import norms, optim
from animesion_training.models import create_model
from animesion_training.recipe import load
from animesion_training.tokens.adapters.ila import BatchNormOfTokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])  # plain norms, and norms with an activation
def test_synchronised_norms_have_the_weights_and_outputs_of_the_plain_ones(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3, 32)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        model(images)
    before, parameters = model.state_dict(), list(model.parameters())
    expected = model.eval()(images)
    norms.replace_norms(model)
    found = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    assert found
    assert all(isinstance(each, nn.SyncBatchNorm) for each in found)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert before.keys() == model.state_dict().keys()
    # the same objects, which an optimizer may hold already
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model.eval()(images), expected)


def test_norms_that_cannot_be_synchronised_are_refused() -> None:
    with pytest.raises(UsageError, match=r"run\.sync_bn: 1 is a BatchNormOfTokens, which cannot be synchronised"):
        norms.replace_norms(nn.Sequential(nn.Linear(4, 4), BatchNormOfTokens(4)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "a run.batch_size that is a multiple of 6, data.last = 'drop'"),
        (("run.batch_size=9", "data.last=drop"), "a multiple of 6"),
        (("run.batch_size=12", "data.last=drop", "data.on_error=skip"), "data.on_error = 'raise'"),
        (("run.batch_size=12", "data.last=drop"), "needs GPUs"),
    ],
)
def test_processes_that_could_differ_are_refused(overrides: tuple[str, ...], message: str) -> None:
    model = create_model("resnet10t", 3, 32)
    with pytest.raises(UsageError, match=message):
        norms.synchronise(model, load("scratch", overrides), DistributedContext(0, 3, CPU))
    norms.synchronise(model, load("scratch", overrides), DistributedContext(0, 1, CPU))
    assert not any(isinstance(each, nn.SyncBatchNorm) for each in model.modules())


def test_frozen_norms_do_not_normalise_over_the_batch() -> None:
    model = create_model("resnet10t", 3, 32)
    assert norms.normalises_over_batch(model)
    assert not norms.normalises_over_batch(create_model("vit_tiny_patch16", 3, 32, depth=1))
    optim.freeze(model, ["backbone"])
    assert not norms.normalises_over_batch(model)
    assert norms.normalises_over_batch(model, frozen=True)
    norms.train_mode(model)
    statistics = [each.clone() for each in model.buffers()]
    model(torch.randn(2, 3, 32, 32))
    assert all(map(torch.equal, statistics, model.buffers()))
