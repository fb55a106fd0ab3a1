"""Names for single pictures: top-k predictions of a weight file, for files, folders and archives of class folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from animesion import images
from animesion.errors import UsageError
from animesion_training.data import Augment, Resize
from animesion_training.data.decode import decode_into
from animesion_training.distributed import Place
from animesion_training.evaluating import three
from animesion_training.weights import load_model

_LARGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        path: the picture.
        guesses: class name and probability, most probable first; empty when the picture cannot be read.
        problem: why it cannot be read.
    """

    path: Path
    guesses: tuple[tuple[str, float], ...] = ()
    problem: str = ""


def predict(
    weights: Path, paths: Sequence[Path], place: Place, *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predictions for pictures, in the order of the paths; a folder stands for the pictures below it, sorted.

    Args:
        weights: a file of `save_model`.
        paths: files and folders.
        place: where to compute.
        top: guesses a picture, at most the number of classes.
        batch_size: pictures at a time.

    Raises:
        UsageError: a path that does not exist, or an unusable weight file.
    """
    model, card = load_model(weights)
    model = model.to(place.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes pictures of {card.img_size}; only square inputs are predicted on")
    transform = Resize(card.img_size, card.crop_pct)
    normalise = Augment.plain(three(card.mean), three(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    found = list(files(paths))
    for start in range(0, len(found), batch_size):
        chosen = found[start : start + batch_size]
        pixels = np.zeros((len(chosen), card.img_size, card.img_size, 3), dtype=np.uint8)
        problems = [decoded(path, pixels[i], transform) for i, path in enumerate(chosen)]
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(place.device)
            seeds = torch.zeros(len(chosen), dtype=torch.int64, device=place.device)
            best = model(normalise(batch, seeds)).float().softmax(1).topk(min(top, card.num_classes))
        for path, problem, values, ids in zip(
            chosen, problems, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            guesses = tuple((names[i], value) for i, value in zip(ids, values, strict=True))
            yield Prediction(path, () if problem else guesses, problem)


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """The pictures of paths, a folder's below it sorted; hidden files are left out.

    Raises:
        UsageError: a path that does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise UsageError(f"there is no picture or folder {path}")


def decoded(path: Path, out: np.ndarray, transform: Resize) -> str:
    """Decode into a place of the batch; returns why that failed, or an empty string."""
    try:
        if path.stat().st_size > _LARGEST:
            return "too many bytes"
        decode_into(out, path.read_bytes(), transform, ())
    except images.RejectedImageError as error:
        return str(error)
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
    return ""
