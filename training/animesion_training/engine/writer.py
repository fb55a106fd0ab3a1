"""Write files of a run in a thread while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Writer:
    """Calls functions in one thread, one after the other; none after one that failed.

    Otherwise a checkpoint could say that the weights of its step were written, although the disk was full just then.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "animesion-writer")
        self._jobs: list[Future[None]] = []
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Call a function after those that were submitted before."""
        self._jobs.append(self._pool.submit(self._call, job))

    def _call(self, job: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True
            job()
            self._failed = False

    def wait(self) -> None:
        """Wait until all have returned; raise the first error of one of them."""
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._jobs.clear()
            self._pool.shutdown()


def kept_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, for writing it during the next forward pass.

    That changes buffers, so they are copied. Parameters change in the next update only, and are not copied on a CPU; a
    GPU's are copied to the CPU.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value.detach() if name in parameters and value.device.type == "cpu" else on_cpu(value)
        for name, value in model.state_dict().items()
    }


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
