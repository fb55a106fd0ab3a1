"""Weights from elsewhere: a local file into a model, and timm's or Hugging Face's over the network.

A file is data and never runs code: safetensors, or a PyTorch archive read with `weights_only`. Whole models of ours,
with their class names, are the business of `animesion_training.weights`.
"""

from __future__ import annotations

import logging
import pickle
import socket
import sys
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from animesion.errors import AnimesionError, UsageError
from animesion_training.models.assemble import weights_loaded

_log = logging.getLogger("animesion_training")

#: Wrappers that trainers leave in front of parameter names.
_PREFIXES = ("module.", "_orig_mod.", "model.")
#: Where trainers' archives keep the weights.
_NESTS = ("state_dict", "model")


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a weight file by name.

    Args:
        path: `.safetensors`, a `.pth` or `.pt` archive of tensors (also under "state_dict" or "model"), or a folder
            with `model.safetensors`.

    Raises:
        UsageError: no such file, another kind of file, damaged, or holding more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in {".pth", ".pt"}:
        return _read_archive(path)
    raise UsageError(
        f"{path}: weights are read from .safetensors, .pth and .pt files, not from {path.suffix or 'this'}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UsageError(f"{path} is no intact safetensors file: {error}") from error


def _read_archive(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds Python objects besides tensors, which could run code when read: convert it to safetensors "
            "where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no intact PyTorch archive ({type(error).__name__})") from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{path} holds no weights by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {key!r} is no tensor; weights are a mapping from names to tensors")
    return dict(content)


def load_weights(model: nn.Module, path: Path | str, *, new_head: bool = False) -> str:
    """Load a weight file into a model, by the names of timm or of this package.

    Position embeddings are resampled and other layouts converted by timm's own filter for the architecture. A
    classifier of another shape or kind stays as the model has it, and so does what methods add to a backbone when the
    file is of the backbone alone.

    Args:
        model: the model.
        path: what `read_state_dict` takes.
        new_head: leave the classifier as it is even if the file has one that fits.

    Returns:
        One sentence on what became of the classifier.

    Raises:
        UsageError: unreadable file, or weights of another architecture; the first names that differ are given.
    """
    given = _without_prefixes(read_state_dict(path), model)
    own = model.state_dict()
    head = head_names(model)
    trained_for = _trained_for(given, model)
    if not _fits(given, own, head):
        given = _adapted(given, model)
    # the classifier that the weights were trained with, whatever it is called in the model now
    known = head | {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    known |= {key for key in given if key not in own and key.startswith(("head.", "fc.", "head_dist."))}
    usable = {key: value for key, value in given.items() if key not in known}
    head_fits = not new_head and all(key in given and given[key].shape == own[key].shape for key in head)
    usable |= {key: given[key] if head_fits else own[key] for key in head}
    added = _added(own) - head
    of_backbone = bool(added) and added.isdisjoint(given)
    if of_backbone:  # what methods add to it starts from scratch
        usable |= {key: own[key] for key in added}
    _refuse_differences(usable, own, Path(path))
    model.load_state_dict(usable)
    if of_backbone:
        weights_loaded(model)
    if head_fits:
        sentence = f"{path}: all weights loaded, with the classifier"
    else:
        had = f"its classifier of {trained_for} classes was left out" if trained_for else "it has no classifier"
        sentence = f"{path}: {had}, a new one of {getattr(model, 'num_classes', 0)} classes starts from scratch"
        _log.warning("%s", sentence)
    return sentence


def _added(own: Mapping[str, Tensor]) -> set[str]:
    """What methods add to the backbone that they stand around, of the names of a model's state; none without one."""
    backbone = {key for key in own if key.startswith(("backbone.", "encoder.backbone."))}
    return own.keys() - backbone if backbone else set()


def head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters and buffers in the model's state dict."""
    get: Any = getattr(model, "get_classifier", None)
    heads = _modules(get() if get else None)
    prefixes = {name for name, module in model.named_modules() if any(module is head for head in heads)}
    return {key for key in model.state_dict() if any(key.startswith(f"{prefix}.") for prefix in prefixes)}


def _modules(classifier: Any) -> list[nn.Module]:
    if isinstance(classifier, nn.Module):
        return [classifier]
    return [each for each in classifier or () if isinstance(each, nn.Module)]


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _trained_for(given: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """How many classes the weights tell apart, where that can be told."""
    for name in (*_classifiers(model), "head.fc", "head", "fc"):
        weight = given.get(f"{name}.weight")
        if weight is not None and weight.ndim == 2:
            return int(weight.shape[0])
    return None


def _without_prefixes(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict()
    for prefix in (*_PREFIXES, *_PREFIXES):
        if all(key.startswith(prefix) for key in given) and not any(key.startswith(prefix) for key in own):
            given = {key.removeprefix(prefix): value for key, value in given.items()}
    return given


def _fits(given: Mapping[str, Tensor], own: Mapping[str, Tensor], head: set[str]) -> bool:
    return all(key in head or (key in given and given[key].shape == own[key].shape) for key in own)


def _adapted(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights through the filter that timm (or our model) has for this architecture."""
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is None:
        given = {key.removeprefix("backbone."): value for key, value in given.items()}
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return given
    try:
        return dict(adapt(given, model))
    except (KeyError, RuntimeError, AttributeError, AssertionError, ValueError):
        return given  # then the differences are named by whoever checks


def _refuse_differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if given[key].shape != own[key].shape
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise UsageError(f"{path} holds weights of another model: {'; '.join(parts)}")


@contextmanager
def downloads(name: str) -> Iterator[None]:
    """Turn what goes wrong while timm fetches the weights of `name` into one sentence.

    Raises:
        AnimesionError: the weights cannot be had: no network, offline mode.
        UsageError: nobody published any.
    """
    from huggingface_hub.errors import HfHubHTTPError

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"nobody published weights for {name}: start from scratch or give a local file")
    advice = "connect to the network, fill the cache beforehand, or give a local file (pretrained=PATH)"
    if config.hf_hub_id and not _cached(config.hf_hub_id) and not _hub_answers():
        # asked at once, because the hub's own client tries for most of a minute
        raise AnimesionError(f"the weights of {name} are not in the cache and huggingface.co does not answer: {advice}")
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        raise AnimesionError(f"the weights of {name} cannot be fetched ({type(error).__name__}): {advice}") from error


def _cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, name), str) for name in ("model.safetensors", "pytorch_model.bin")
    )


def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # only the client knows the way
    place = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=5):
            return True
    except OSError:
        return False
