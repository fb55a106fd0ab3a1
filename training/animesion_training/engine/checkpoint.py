"""Checkpoints: the state that a run writes to resume from, in one file that is written atomically.

A checkpoint contains tensors and plain values only and is read with `weights_only`, so that one from elsewhere cannot
run code. Files of trained weights are read and written in `animesion_training.weights`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion.storage.workspace import atomic_file
from animesion_training.engine.writer import on_cpu

FORMAT = 2


def save(path: Path, content: dict[str, Any], *, previous: Path) -> None:
    """Write a checkpoint atomically, and keep the one that it replaces.

    Args:
        path: file to write.
        content: tensors, numbers, strings, and lists and dicts of them.
        previous: name that an earlier checkpoint gets.

    Raises:
        FullDiskError: the disk is full; an earlier checkpoint is kept.
    """
    fresh = path.with_suffix(".new")
    with atomic_file(fresh) as file:
        sink: Any = _Sink(file)
        try:
            torch.save({"format": FORMAT, **content}, sink)
        except RuntimeError as error:
            # torch ends its archive even then, and what that raises hides the error of the file
            raise sink.fault or error from None
    with contextlib.suppress(FileNotFoundError):
        path.replace(previous)
    fresh.replace(path)


class _Sink:
    """What torch needs of a file: its `write`, so that it makes no copy of the whole in memory."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.fault = error
            raise

    def flush(self) -> None:
        """Does nothing: the file is flushed at its end."""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UsageError: the file is missing, damaged, of another format, or contains other objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} not found") from None
    except Exception:  # bytes that are no checkpoint raise anything, IndexError for example
        raise UsageError(
            f"{path} is not a checkpoint of a run, or is damaged: give last.ckpt of a run's folder"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint that this version reads: resume with the version that wrote it")
    return content


def to_host(content: Any) -> Any:
    """Copy the tensors of nested dicts and lists that are on a GPU to the CPU."""
    if isinstance(content, Tensor):
        return content if content.device.type == "cpu" else on_cpu(content)
    if isinstance(content, Mapping):
        return {key: to_host(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(to_host(value) for value in content)
    return content


def not_finite(state: Any, name: str = "") -> str:
    """Return the name of a tensor in nested dicts and lists that has a NaN or infinite number; empty if none has."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}  # optimizers keep step counts on the CPU
    for each, tensor in _floating(state, name):
        by_device.setdefault(tensor.device, {})[each] = tensor.isfinite().all()
    for flags in by_device.values():
        good = torch.stack(list(flags.values())).tolist()  # read in one transfer
        if not all(good):
            return next(each for each, fine in zip(flags, good, strict=True) if not fine)
    return ""


def _floating(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor) and state.is_floating_point():
        yield name, state.detach()
    elif isinstance(state, Mapping | list | tuple):
        parts = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, part in parts:
            yield from _floating(part, f"{name}.{key}" if name else str(key))


def generator_state() -> dict[str, Any]:
    """Return the state of every global random generator, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        # int64, because torch cannot store uint32
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Restore the state of every global random generator from `generator_state`."""
    torch.set_rng_state(state["torch"])
    # with another number of GPUs, their generators keep the state they have
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def seed_generators(seed: int, rank: int) -> None:
    """Seed every global random generator, differently in each process."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)
