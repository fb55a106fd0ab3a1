"""Pretrained weights: load a local file into a model, and report failed downloads of timm and Hugging Face.

Reading a file never runs code: it is safetensors, or a PyTorch archive read with `weights_only`. Model files of this
package, with class names, are read by `animesion_training.weights`.
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
from animesion_training.models.assemble import init_from_backbone

_log = logging.getLogger("animesion_training")

#: Prefixes of parameter names from wrappers of trainers.
_PREFIXES = ("module.", "_orig_mod.", "model.")
#: Keys of the weights in archives of trainers.
_WEIGHT_KEYS = ("state_dict", "model")


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a weight file, by name.

    Args:
        path: `.safetensors`, a `.pth` or `.pt` archive of tensors (also under "state_dict" or "model"), or a folder
            with `model.safetensors`.

    Raises:
        UsageError: the file does not exist, has another format, is damaged, or contains more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"weight file not found: {path}")
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
        raise UsageError(f"{path} is not an intact safetensors file: {error}") from error


def _read_archive(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} contains Python objects besides tensors, which could run code when read: convert it to "
            "safetensors if you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an intact PyTorch archive ({type(error).__name__})") from error
    for key in _WEIGHT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{path} contains no weights by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {key!r} is not a tensor; weights are a mapping from names to tensors")
    return dict(content)


def load_weights(model: nn.Module, path: Path | str, *, new_head: bool = False) -> str:
    """Load a weight file into a model, with parameter names of timm or of this package.

    timm's filter for the architecture resamples position embeddings and converts other layouts. The model keeps its
    initial classifier if that of the file has another shape or kind. It also keeps the initial parameters of methods if
    the file has those of the backbone alone.

    Args:
        model: the model.
        path: see `read_state_dict`.
        new_head: keep the initial classifier, even if the file has one that fits.

    Returns:
        One sentence that states which classifier the model has.

    Raises:
        UsageError: unreadable file, or weights of another architecture; the message lists the first differing names.
    """
    given = _without_prefixes(read_state_dict(path), model)
    own = model.state_dict()
    head = head_names(model)
    trained_for = _trained_for(given, model)
    if not _fits(given, own, head):
        given = _adapt(given, model)
    # the classifier that the weights were trained with, under its name in the file and in the model
    known = head | {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    known |= {key for key in given if key not in own and key.startswith(("head.", "fc.", "head_dist."))}
    usable = {key: value for key, value in given.items() if key not in known}
    head_fits = not new_head and all(key in given and given[key].shape == own[key].shape for key in head)
    usable |= {key: given[key] if head_fits else own[key] for key in head}
    added = _method_names(own) - head
    of_backbone = bool(added) and added.isdisjoint(given)
    if of_backbone:  # the parameters of methods keep their initial values
        usable |= {key: own[key] for key in added}
    _check_names(usable, own, Path(path))
    model.load_state_dict(usable)
    if of_backbone:
        init_from_backbone(model)
    if head_fits:
        sentence = f"{path}: all weights loaded, with the classifier"
    else:
        left_out = f"its classifier of {trained_for} classes was left out" if trained_for else "it has no classifier"
        sentence = f"{path}: {left_out}, a new one of {getattr(model, 'num_classes', 0)} classes starts from scratch"
        _log.warning("%s", sentence)
    return sentence


def _method_names(own: Mapping[str, Tensor]) -> set[str]:
    """The names in a state dict that methods add to their backbone; empty for a model without methods."""
    backbone = {key for key in own if key.startswith(("backbone.", "encoder.backbone."))}
    return own.keys() - backbone if backbone else set()


def head_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's parameters and buffers in the state dict of a model."""
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
    """The number of classes of the weights, None if no classifier is found."""
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


def _adapt(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights with the filter that timm (or our model) has for this architecture."""
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is None:
        given = {key.removeprefix("backbone."): value for key, value in given.items()}
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return given
    try:
        return dict(adapt(given, model))
    except (KeyError, RuntimeError, AttributeError, AssertionError, ValueError):
        return given  # the caller reports the differences


def _check_names(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if given[key].shape != own[key].shape
    ]
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise UsageError(f"{path} contains weights of another model: {'; '.join(parts)}")


@contextmanager
def downloads(name: str) -> Iterator[None]:
    """Convert errors of timm's download of the weights of `name` to errors of one sentence.

    Raises:
        AnimesionError: the weights cannot be downloaded: no network, or offline mode.
        UsageError: no weights were published.
    """
    from huggingface_hub.errors import HfHubHTTPError

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"no weights were published for {name}: start from scratch or give a local file")
    advice = "connect to the network, fill the cache beforehand, or give a local file (pretrained=PATH)"
    if config.hf_hub_id and not _is_cached(config.hf_hub_id) and not _hub_answers():
        # checked first, because the client of the hub retries for most of a minute
        raise AnimesionError(f"the weights of {name} are not in the cache and huggingface.co does not answer: {advice}")
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        raise AnimesionError(
            f"the weights of {name} cannot be downloaded ({type(error).__name__}): {advice}"
        ) from error


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, name), str) for name in ("model.safetensors", "pytorch_model.bin")
    )


def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # behind a proxy only the client can find out
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=5):
            return True
    except OSError:
        return False
