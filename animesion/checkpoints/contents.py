"""The weights and settings in a checkpoint: which entry holds the weights, and what its trainer wrote beside them."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from animesion.checkpoints.archives import read_archive
from animesion.checkpoints.google import from_google, is_google
from animesion.errors import UsageError

#: Entries with an average of the weights, then entries with the weights, in the order in which they are taken.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
_PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
#: Entries with settings.
_SETTINGS = ("config", "args", "cfg", "hyper_parameters", "opt")
#: Entries with the state of an optimizer, which may be tensors by name.
_OTHERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "scaler", "lr_scheduler", "callbacks")
#: Entries with an accuracy, under their names in different trainers.
_ACCURACIES = ("accuracy", "best_acc", "best_acc1", "acc1", "metric")
_DEEPEST = 64  # of modules in each other, and of settings


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file.

    Attributes:
        path: the file.
        tensors: the weights by name, as in the file.
        settings: settings of the trainer: numbers, texts, lists and tables alone.
        architecture: timm's name of the network, if timm's trainer wrote it; empty otherwise.
        facts: epoch and accuracy, if they are stored.
        img_size: (height, width) that the network was built for, in pixels; None if it is not stored.
        notes: how the file was understood.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    img_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a weight file of any trainer, without running code from it.

    Args:
        path: a `.safetensors` file; an archive of PyTorch (`.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar`) with weights by
            name, at its top or in an entry such as "state_dict", or with a whole network; Google's `.npz` of a vision
            transformer; or a folder with `model.safetensors` or `pytorch_model.bin`.

    Raises:
        UsageError: the file does not exist, has another format, is damaged, contains code, or has no weights or
            several; the message names them.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise UsageError(f"weight file not found: {path}")
    content, metadata = read_archive(path)
    if is_google(content):
        return Checkpoint(path, from_google(content, path), notes=("names of Google's vision transformer",))
    notes: list[str] = []
    table = content if isinstance(content, Mapping) else {}
    weights = _find_weights(table, path, notes)
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        settings |= _as_settings(table.get(name))
    architecture = table.get("arch")
    return Checkpoint(
        path,
        weights,
        settings,
        architecture if isinstance(architecture, str) else "",
        _facts(table),
        _img_size(settings, metadata),
        tuple(notes),
    )


def _find_weights(table: Mapping[Any, Any], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors by name of the entry that has the weights, or of the table itself."""
    places: list[str] = []
    if _has_modules(table):
        return _of_network(table, path, notes)
    for _ in range(3):  # such as {"model": {"state_dict": {...}}}
        holders = {key: value for key, value in table.items() if isinstance(key, str) and _holds_weights(value)}
        averaged = [key for key in _AVERAGED if key in holders]
        plain = [key for key in _PLAIN if key in holders]
        unknown = [key for key in holders if key not in (*_AVERAGED, *_PLAIN, *_OTHERS, *_SETTINGS)]
        if not averaged and not plain and any(isinstance(value, Tensor) for value in table.values()):
            break
        if len(unknown) > 1 and not averaged and not plain:
            raise UsageError(
                f"{path} contains weights under {', '.join(map(repr, sorted(unknown)))}, and nothing says which to "
                "take: save one of them alone"
            )
        if not (chosen := [*averaged, *plain, *unknown][:1]):
            break
        if averaged and plain:
            notes.append(f"the average under {chosen[0]!r} was taken, not the weights under {plain[0]!r}")
        places += chosen
        table = holders[chosen[0]]
        if _has_modules(table):
            table = _of_network(table, path, notes)
            break
    tensors = {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UsageError(f"{path} contains no weights by name")
    if places:
        notes.insert(0, f"weights under {'.'.join(places)!r}")
    if others := [str(key) for key in table if key not in tensors]:
        notes.append(f"{_few(others)} left out, which {'is' if len(others) == 1 else 'are'} no tensor")
    return tensors


def _holds_weights(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    inner = (*_AVERAGED, *_PLAIN)
    return (
        _has_modules(value)
        or any(isinstance(key, str) and isinstance(each, Tensor) for key, each in value.items())
        or any(_holds_weights_below(value.get(key)) for key in inner)
    )


def _holds_weights_below(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _has_modules(value: Any) -> bool:
    """Whether a value is what a stand-in keeps of a module of torch."""
    return isinstance(value, Mapping) and isinstance(getattr(value, "__dict__", {}).get("_modules"), Mapping)


def _of_network(module: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    notes.append("weights of a whole network, whose code was not run")
    if tensors := dict(_of_modules(module)):
        return tensors
    raise UsageError(f"{path} contains a network without weights")


def _of_modules(module: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    state = getattr(module, "__dict__", {})
    skipped = state.get("_non_persistent_buffers_set")
    skipped = skipped if isinstance(skipped, set) else set()
    for kind in ("_parameters", "_buffers"):
        own = state.get(kind)
        for name, value in own.items() if isinstance(own, Mapping) else ():
            if isinstance(value, Tensor) and name not in skipped:
                yield f"{prefix}{name}", value.data
    children = state.get("_modules")
    for name, child in children.items() if isinstance(children, Mapping) and depth < _DEEPEST else ():
        yield from _of_modules(child, f"{prefix}{name}.", depth + 1)


def _as_settings(value: Any) -> dict[str, Any]:
    """The plain values of a table of settings, or of a Namespace; empty for anything else."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    plain = _plain(value) if isinstance(value, Mapping) else {}
    return plain if isinstance(plain, dict) else {}


def _plain(value: Any, depth: int = 0) -> Any:
    """A value without anything but numbers, texts, lists and tables, which are None."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(each, depth + 1) for each in value]
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {key: _plain(each, depth + 1) for key, each in value.items() if isinstance(key, str)}
    return None


def _facts(table: Mapping[Any, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    epoch = table.get("epoch")
    if isinstance(epoch, int) and not isinstance(epoch, bool):
        facts["epoch"] = epoch
    for name in _ACCURACIES:
        value = table.get(name)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            facts["accuracy"] = float(value)
            break
    return facts


def _img_size(settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """(height, width) from a card in the metadata, as this package writes it, or from the settings of a trainer."""
    candidates: list[Any] = [settings.get(name) for name in ("img_size", "input_size", "image_size")]
    for text in metadata.values():
        with contextlib.suppress(ValueError, RecursionError):
            card = json.loads(text)
            candidates.insert(0, card.get("img_size") if isinstance(card, dict) else None)
    for value in candidates:
        sides = value if isinstance(value, list | tuple) else [value, value]
        sides = sides[-2:]  # of (channels, height, width)
        if len(sides) == 2 and all(type(side) is int and 1 <= side <= 1 << 14 for side in sides):
            return int(sides[0]), int(sides[1])
    return None


def _few(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
