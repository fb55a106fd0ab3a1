"""All that a run needs to go on as if nothing had happened, in one file that appears only when complete.

The file holds tensors and plain values alone and is read with `weights_only`, so that a checkpoint from elsewhere
cannot run code. Weights for use, without the rest, are `animesion_training.weights`.
"""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic

FORMAT = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to write.
        content: tensors, numbers, texts, lists and dicts of them.

    Raises:
        FullDiskError: no room; an earlier checkpoint stays as it was.
    """
    out = io.BytesIO()
    torch.save({"format": FORMAT, **content}, out)
    write_atomic(path, out.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        UsageError: missing, damaged, of another format, or holding more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, OSError):
        raise UsageError(f"{path} is no checkpoint of a run, or is damaged: give last.ckpt of a run's folder") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is no checkpoint that this version reads")
    return content


def generators() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Set every global random generator to a state that `generators` gave."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def seed_generators(seed: int, rank: int) -> None:
    """Seed every global random generator, differently for each process."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)
