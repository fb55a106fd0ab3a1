"""Profile a network: parameters, multiply-adds, activations, speed and memory of inference.

Multiply-adds are counted for convolutions and matrix products, including the two products of attention, fused or not.
One multiply-add is two floating-point operations; papers on vision transformers report multiply-adds as "FLOPs". Norms,
activation functions, softmax, biases, pooling and resampling are not counted. The training loop reports the speed of
training.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from animesion.errors import UsageError


@dataclass(frozen=True)
class Counts:
    """Counts of an architecture, for one image.

    Attributes:
        parameters: number of parameters.
        trainable: number of those with `requires_grad`.
        multiply_adds: multiply-adds of convolutions and matrix products.
        attention_multiply_adds: the part of them in fused attention.
        activations: output elements of convolutions and matrix products (the measure of RegNet, CVPR 2020).
    """

    parameters: int
    trainable: int
    multiply_adds: int
    attention_multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Speed:
    """Measurements of inference without gradients on this machine.

    Attributes:
        device: `cpu`, or the name of the GPU.
        threads: CPU threads of torch.
        dtype: type of weights and images.
        batch_size: batch size for throughput and memory.
        images_per_second: median over batches.
        latency_ms: median for a single image, in milliseconds.
        peak_memory: peak memory at `batch_size`, in bytes.
        memory_is: definition of `peak_memory` on this device.
    """

    device: str
    threads: int
    dtype: str
    batch_size: int
    images_per_second: float
    latency_ms: float
    peak_memory: int
    memory_is: str


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operations that have a formula in torch's registry of floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: dict[str, int] = {}
        self.activations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # composite operations decompose into those that have a formula
                result = func.decompose(*args, **options)
            if result is not NotImplemented:
                return result
            return func(*args, **options)
        out = func(*args, **options)
        name = str(func._overloadpacket)
        self.operations[name] = self.operations.get(name, 0) + formula(*args, **options, out_val=out)
        first = out[0] if isinstance(out, tuple | list) else out
        self.activations += first.numel() if isinstance(first, Tensor) else 0
        return out


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the bytes of the tensors that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = {storage.data_ptr() for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
        out = func(*args, **dict(kwargs or {}))
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and storage.data_ptr() not in self._known | inputs and storage.nbytes():
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _storage(leaf: object) -> torch.UntypedStorage | None:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) else None


def count(model: nn.Module, size: tuple[int, int], channels: int = 3) -> Counts:
    """Count operations and parameters for one image of (height, width) `size`, in evaluation mode."""
    first = next(model.parameters())
    image = torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype)
    training = model.training
    model.eval()
    with torch.no_grad(), _Counter() as counter:
        model(image)
    model.train(training)
    attention = sum(value for name, value in counter.operations.items() if "attention" in name)
    return Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        multiply_adds=sum(counter.operations.values()) // 2,
        attention_multiply_adds=attention // 2,
        activations=counter.activations,
    )


def measure(
    model: nn.Module, size: tuple[int, int], batch_size: int = 32, *, seconds: float = 2.0, channels: int = 3
) -> Speed:
    """Measure speed and memory of inference, on the device and in the number format of the model.

    Args:
        model: put into evaluation mode.
        size: (height, width) of the images.
        batch_size: batch size for throughput and memory.
        seconds: how long latency and throughput are timed, after two warm-up batches; at least three batches each.
        channels: number of channels of the images.
    """
    model.eval()
    first = next(model.parameters())
    device = first.device
    batch = torch.randn(batch_size, channels, *size, device=device, dtype=first.dtype)
    with torch.inference_mode():
        peak, memory_is = _peak(lambda: model(batch), device, _bytes(model) + batch.nbytes)
        latency = _median_time(lambda: model(batch[:1]), device, seconds)
        throughput = batch_size / _median_time(lambda: model(batch), device, seconds)
    return Speed(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        dtype=str(first.dtype).removeprefix("torch."),
        batch_size=batch_size,
        images_per_second=throughput,
        latency_ms=1000 * latency,
        peak_memory=peak,
        memory_is=memory_is,
    )


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _median_time(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    def time_once() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        time_once()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(time_once())
    return statistics.median(times)


def _peak(step: Callable[[], Any], device: torch.device, weights: int) -> tuple[int, str]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU, weights included"
    # the size of the process would be mostly that of torch
    with _Alive() as alive:
        step()
    return weights + alive.peak, "live tensors, weights included, without the workspace of operators"


def to_device(model: nn.Module, device: str) -> nn.Module:
    """Move a model to `cpu`, `cuda`, `cuda:1` ...

    Raises:
        UsageError: an unknown device, or one without enough memory.
    """
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot use device {device!r}: {reason}") from error
