"""Networks from checkpoints that describe them: of timm's trainer, of the originals, and in timm's hub layout.

Their settings say which network it is and how its images are normalised. Checkpoints of this package have a card
instead, which `weights` reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from animesion.checkpoints import Checkpoint, read_checkpoint
from animesion.errors import UsageError
from animesion_training.models import create_model
from animesion_training.models.pretrained import classes_of, fit_weights
from animesion_training.options import reasonable
from animesion_training.originals import from_reference

_log = logging.getLogger("animesion_training")
_LARGEST_CONFIG = 16 << 20  # bytes
#: Arguments of timm's data transforms.
_TRANSFORM = ("img_size", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
#: Sides of images whose resized square is not `int(1.34 * side)` in the originals.
_RESIZED = {32: 36, 64: 72}
#: Datasets that the originals normalise with figures of their own if `custom_mean_std` is set.
_OWN_FIGURES = ("cub", "cifar", "svhn", "tinyin")
_ADVICE = (
    "load them with `create_model(name, classes, pretrained=PATH)`, or start a training from them with "
    "`animesion train --init PATH`"
)


@dataclass(frozen=True)
class Described:
    """A network that was built from a checkpoint.

    Attributes:
        network: with its weights; its `pretrained_cfg` has the size and normalisation of images.
        name: name of its architecture.
        num_classes: number of classes.
        classes: their names by id, if they are stored.
        crop_pct: share of the side of the resized square that evaluation crops, in (0, 1].
        facts: epoch and accuracy, if they are stored.
    """

    network: nn.Module
    name: str
    num_classes: int
    classes: tuple[str, ...]
    crop_pct: float
    facts: dict[str, Any]


def build_described(path: Path) -> Described:
    """Build the network that a checkpoint describes, load its weights, and log how it was understood.

    Args:
        path: a checkpoint, or a folder in timm's hub layout.

    Raises:
        UsageError: the file cannot be read, does not describe its network, or its weights do not fit.
    """
    found = read_checkpoint(path)
    if path.is_dir():
        return _from_hub(found, path)
    settings = found.settings
    name = found.architecture or str(settings.get("model") or "")
    if found.architecture and not timm.is_model(found.architecture):
        raise UsageError(f"{path} is of a network called {found.architecture!r}, which timm does not have")
    if not found.architecture and (settings.get("model_name") or not timm.is_model(name)):
        if not settings:
            raise UsageError(f"{path} contains weights and nothing that describes their network: {_ADVICE}")
        return _from_original(found)
    if not found.architecture:  # another trainer, which may have built a network of its own with the name
        with suppress(UsageError):
            return _from_original(found)
    return _from_timm(found, name, settings)


def _from_timm(found: Checkpoint, name: str, settings: Mapping[str, Any]) -> Described:
    options = settings.get("model_kwargs")
    options = dict(options) if isinstance(options, Mapping) else {}
    for theirs, ours in (("gp", "global_pool"), ("in_chans", "in_chans")):
        if settings.get(theirs) is not None:
            options[ours] = settings[theirs]
    given = {key: settings[key] for key in _TRANSFORM if settings.get(key) is not None}
    if isinstance(given.get("input_size"), int):
        given["img_size"] = given.pop("input_size")
    published: Any = timm.get_pretrained_cfg(name)
    resolve: Any = timm.data.resolve_data_config
    if not reasonable(options):
        raise UsageError(f"{found.path} describes a model of unreasonable size: its model_kwargs are {options}")
    try:
        inputs = resolve(given, pretrained_cfg=published.to_dict() if published else {})
        inputs |= {key: tuple(map(float, inputs[key])) for key in ("mean", "std")}
        crop_pct = min(1.0, float(inputs["crop_pct"]))
        size = tuple(inputs["input_size"][1:])
        side: Any = size[0] if size[0] == size[1] else size
        with torch.device("meta"):  # first without memory: settings may describe a model that exceeds it
            classes = classes_of(found, create_model(name, 1, side, **options))
        model: Any = create_model(name, classes or 1, side, **options)
    except Exception as error:  # timm can fail in any way on settings from a file
        raise UsageError(f"{found.path} describes a model that cannot be built: {error}") from error
    if classes is None:
        raise UsageError(f"{found.path} has no classifier: {_ADVICE}")
    fitted, has_classifier = fit_weights(model, found)
    if not has_classifier:
        raise UsageError(f"{found.path}: {'; '.join(fitted)}: it cannot classify")
    _describe(model, crop_pct, **{key: inputs[key] for key in ("mean", "std", "interpolation")})
    notes = [*fitted, f"{name} of timm with {classes} classes at {size[0]}x{size[1]} pixels"]
    if inputs.get("crop_mode") != "squash" and crop_pct < 1:
        notes.append("images are resized to a square before the crop, and not by their shorter side as timm does")
    names = settings.get("label_names")
    named = tuple(map(str, names)) if isinstance(names, list) and len(names) == classes else ()
    return _say(found, notes, Described(model, name, classes, named, crop_pct, found.facts))


def _from_hub(found: Checkpoint, folder: Path) -> Described:
    """A network with timm's `config.json` beside its weights."""
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    except OSError as error:
        raise UsageError(f"{folder} has weights and no config.json that describes their network: {_ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON") from error
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str) or not timm.is_model(name):
        raise UsageError(f"{path} is of the network {name!r}, which timm does not have")
    inputs = config.get("pretrained_cfg")
    options = config.get("model_args")
    options = dict(options) if isinstance(options, dict) else {}
    options.pop("num_classes", None)
    settings = {key: value for key, value in inputs.items() if key in _TRANSFORM} if isinstance(inputs, dict) else {}
    if (side := options.pop("img_size", None)) is not None:
        settings["img_size"] = side
    settings |= {"model_kwargs": options, "label_names": config.get("label_names")}
    return _from_timm(found, name, settings)


def _from_original(found: Checkpoint) -> Described:
    settings = found.settings
    try:
        network = from_reference(settings, found.tensors)
    except UsageError as error:
        raise UsageError(f"{found.path}: {error}") from error
    except Exception as error:  # settings of a file can be of any type and size
        raise UsageError(f"{found.path} describes a model that cannot be built: {error}") from error
    config: Any = getattr(network, "pretrained_cfg", None)
    if not config or not config.get("input_size"):
        raise UsageError(f"{found.path} is a part of a network without images as its input: {_ADVICE}")
    side = config["input_size"][-1]
    name = str(settings.get("model_name") or type(network).__name__)
    classes = int(getattr(network, "num_classes", 0))
    notes = [*found.notes, f"{name} of the originals with {classes} classes at {side} pixels"]
    dataset = str(settings.get("dataset_name") or "").lower()
    if settings.get("custom_mean_std") and dataset.startswith(_OWN_FIGURES):
        notes.append(f"mean and deviation are 0.5, and not those of {dataset}, which the file does not have")
    crop_pct = _crop_pct(settings, side)
    _describe(network, crop_pct)
    return _say(found, notes, Described(network, name, classes, (), crop_pct, found.facts))


def _describe(model: nn.Module, crop_pct: float, **inputs: Any) -> None:
    """Set the inputs in the config of a model, which `export` writes; images are resized to a square here."""
    config = vars(model)["pretrained_cfg"] | inputs | {"crop_pct": crop_pct, "crop_mode": "squash"}
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config


def _crop_pct(settings: Mapping[str, Any], side: int) -> float:
    """The share of the resized square that the originals crop in evaluation."""
    resized = settings.get("test_resize_size") or settings.get("resize_size")
    if settings.get("test_resize_directly"):
        resized = side
    if not isinstance(resized, int) or resized < side:
        resized = _RESIZED.get(side, int(1.34 * side))
    return side / resized


def _say(found: Checkpoint, notes: list[str], built: Described) -> Described:
    if not built.classes:
        notes.append("it has no class names, so class i is taken for the i-th of the data")
    _log.warning("%s", f"{found.path}: {'; '.join(notes)}")
    return built
