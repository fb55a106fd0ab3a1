"""Ranks and devices of processes that `torchrun` starts."""

from __future__ import annotations

import pytest
import torch

from animesion.errors import UsageError
from animesion_training.distributed import distributed_context


def started_by_torchrun(monkeypatch: pytest.MonkeyPatch, *, local_rank: int, world_size: int, gpus: int) -> None:
    """The environment of one process of several, on a machine with this number of GPUs."""
    for name, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("device", "local_rank", "sentence"),
    [
        ("cuda:1", 0, "--device cuda:1 would put all 4 processes on one GPU: give --device cuda"),
        ("cuda", 2, "this machine has 2 GPUs, and process 2 .* finds none left"),
        ("auto", 3, "this machine has 2 GPUs, and process 3 .* finds none left"),
        ("gpu", 0, "unknown device 'gpu'"),
    ],
)
def test_devices_that_processes_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: int, sentence: str
) -> None:
    started_by_torchrun(monkeypatch, local_rank=local_rank, world_size=4, gpus=2)
    with pytest.raises(UsageError, match=sentence), distributed_context(device):
        pass


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_torchrun(monkeypatch, local_rank=1, world_size=2, gpus=2)
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, device_id: calls.append((backend, device_id))
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed_context("auto") as context:
        assert (context.rank, context.world_size, context.device) == (1, 2, torch.device("cuda", 1))
    assert calls == [("set_device", torch.device("cuda", 1)), ("nccl", torch.device("cuda", 1))]
    # alone, any GPU can be named
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed_context("cuda:1") as context:
        assert context.device == torch.device("cuda", 1)
