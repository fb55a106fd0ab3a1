"""Pretrained weights: fit those of a file to a model, and report failed downloads of timm and Hugging Face.

Files are read by `animesion.checkpoints`. Models with their class names are loaded by
`animesion_training.weights`.
"""

from __future__ import annotations

import logging
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from animesion.checkpoints import Checkpoint, cut_prefix, read_checkpoint
from animesion.errors import AnimesionError, UsageError
from animesion_training.models.assemble import init_from_backbone
from animesion_training.models.positions import match_positions
from animesion_training.run_weights import find_weights
from animesion_training.tokens.plugin import Plugin

_log = logging.getLogger("animesion_training")

#: Ends of names of tensors that a network computes from its sizes, or that tools count in it.
_DERIVED = ("attn_mask", "relative_position_index", "relative_coords_table", "n_averaged", "total_ops", "total_params")
_COUNTER = "num_batches_tracked"


def load_weights(model: nn.Module, path: Path | str | Checkpoint, *, new_head: bool = False) -> str:
    """Load a weight file into a model, with parameter names of timm, of this package or of Google's `.npz` files.

    Prefixes of wrappers are cut. Position embeddings are resampled, and timm's filter for the architecture converts
    other layouts. The model keeps its initial classifier if that of the file has another shape or kind. It also keeps
    the initial parameters of methods if the file has those of the backbone alone.

    Args:
        model: the model.
        path: the folder of a run; or see `checkpoints.read_checkpoint`, or what it returned.
        new_head: keep the initial classifier, even if the file has one that fits.

    Returns:
        One sentence that states which weights of the file the model has, what was cut, resampled and left out, and
        which classifier the model has. It is logged, unless it says only that all weights were loaded.

    Raises:
        UsageError: unreadable file, or weights of another architecture; the message lists the first differing names.
    """
    found = path if isinstance(path, Checkpoint) else read_checkpoint(find_weights(path))
    notes, head_fits = fit_weights(model, found, new_head=new_head)
    sentence = f"{found.path}: {'; '.join(notes)}"
    if len(notes) > 1 or not head_fits:
        _log.warning("%s", sentence)
    return sentence


def fit_weights(model: nn.Module, found: Checkpoint, *, new_head: bool = False) -> tuple[list[str], bool]:
    """Do what `load_weights` does, and return its notes, and whether the model has the classifier of the file."""
    own = model.state_dict()
    given, notes = cut_prefix(found.tensors, _known_names(own), found.path)
    notes = [*found.notes, *notes]
    if whitened := [key for key in given if key.startswith("whitening.")]:
        given = {key: value for key, value in given.items() if key not in whitened}
        notes.append("the whitening of its embeddings was left out, as training changes them")
    given, note = match_positions(given, model, found.img_size, found.path)
    notes += [note] if note else []
    head, of_methods = head_names(model), _method_classifiers(model)
    method_heads = {key for key in own if key.startswith(of_methods)}
    trained_for = _trained_for(given, model)
    if not _fits(given, own, head | method_heads):
        adapted = adapt_names(given, model)
        notes += _resampled(given, adapted)
        given = adapted
    # the classifier that the weights were trained with, under its name in the file and in the model
    known = head | {f"{name}.{part}" for name in _classifiers(model) for part in ("weight", "bias")}
    known |= {key for key in given if key not in own and key.startswith(("head.", "fc.", "head_dist.", *of_methods))}
    usable = {key: value for key, value in given.items() if key not in known}
    head_fits = not new_head and all(key in given and given[key].shape == own[key].shape for key in head)
    usable |= {key: given[key] if head_fits else own[key] for key in head}
    if not head_fits:
        usable |= {key: own[key] for key in method_heads}
    added = _method_names(own) - head
    of_backbone = bool(added) and added.isdisjoint(given)
    if of_backbone:  # the parameters of methods keep their initial values
        usable |= {key: own[key] for key in added}
    if counters := [key for key in own if key.endswith(_COUNTER) and key not in usable]:
        usable |= {key: own[key] for key in counters}  # read with a momentum of None alone, which no network here has
        notes.append(f"{len(counters)} counters of batch norms start at 0, the file has none")
    if derived := [key for key in usable if key not in own and key.endswith(_DERIVED)]:
        usable = {key: value for key, value in usable.items() if key not in derived}
        notes.append(f"{len(derived)} tensors left out that the network computes itself ({derived[0]}, ...)")
    _check_names(usable, own, found.path)
    model.load_state_dict(usable)
    if of_backbone:
        init_from_backbone(model)
    if head_fits:
        notes.append(f"all weights of the network loaded{', with the classifier' if head else ''}")
    else:
        left_out = f"its classifier of {trained_for} classes was left out" if trained_for else "it has no classifier"
        notes.append(f"{left_out}, a new one of {getattr(model, 'num_classes', 0)} classes starts from scratch")
    return notes, head_fits


def classes_of(checkpoint: Checkpoint, model: nn.Module) -> int | None:
    """The number of classes that the classifier of a file has, under its name in a model; None without one."""
    given, _ = cut_prefix(checkpoint.tensors, _known_names(model.state_dict()), checkpoint.path)
    return _trained_for(given, model)


def _known_names(own: Mapping[str, Tensor]) -> set[str]:
    """The names in a state dict, and those of the backbone in it."""
    return {key.removeprefix(prefix) for key in own for prefix in ("", "encoder.", "encoder.backbone.", "backbone.")}


def _resampled(given: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> list[str]:
    """One note on the tensors whose size a filter changed."""
    changed = [
        f"{key} from {tuple(given[key].shape)} to {tuple(adapted[key].shape)}"
        for key in given
        if key in adapted and given[key].shape != adapted[key].shape and given[key].numel() != adapted[key].numel()
    ]
    if not changed:
        return []
    more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
    return [f"resampled {', '.join(changed[:2])}{more}"]


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


def _method_classifiers(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of names of classifiers that methods have besides the head."""
    containers = [module.classifiers() for module in model.modules() if isinstance(module, Plugin)]
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is each for each in containers))


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
        if weight is not None and weight.ndim in (2, 4):  # of a linear layer, or of a convolution with kernel 1
            return int(weight.shape[0])
    return None


def _fits(given: Mapping[str, Tensor], own: Mapping[str, Tensor], head: set[str]) -> bool:
    return all(key in head or (key in given and given[key].shape == own[key].shape) for key in own)


def adapt_names(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights with the filter that timm (or our model) has for this architecture.

    Returns:
        The converted weights; a copy of those given if there is no filter, or if it fails on them.
    """
    adapt = getattr(model, "adapt_state_dict", None)
    given = dict(given)
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
    advice = (
        "connect to the network, fill the cache beforehand, or give a local file (--set model.pretrained=PATH, or "
        "pretrained=PATH in Python)"
    )
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
