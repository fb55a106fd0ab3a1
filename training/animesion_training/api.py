"""Train and predict from Python, with the arguments of the commands; `evaluation` evaluates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from animesion_training.engine.loop import Outcome
    from animesion_training.eval.predict import Prediction


def train(
    data: Path | str,
    out: Path | str,
    *,
    recipe: str = "scratch",
    overrides: Iterable[str] = (),
    images: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Outcome:
    """Train a network in a folder, or resume a run there.

    Args:
        data: a built dataset, class folders, or label CSVs.
        out: folder of the run.
        recipe: name of a training recipe, or path to a TOML file.
        overrides: `key.path=value` each, such as `model.name=resnet18`.
        images: with label CSVs: root of their paths.
        resume: continue from the last checkpoint in the folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        The folder, its best epoch, and the metrics of the test split.

    Raises:
        animesion.errors.AnimesionError: the run cannot be started or failed; the message is one sentence for the user.
    """
    from animesion_training.engine import loop
    from animesion_training.recipe import load

    return loop.train(load(recipe, overrides), data, Path(out), images=images, resume=resume, device=device)


def predict(
    checkpoint: Path | str,
    images: Path | str | Iterable[Path | str],
    *,
    top: int | None = None,
    batch_size: int = 32,
    detector: str = "none",
    margin: float = 0.0,
    min_score: float = 0.0,
    all_faces: bool = False,
    or_whole: bool = False,
    options: dict[str, Any] | None = None,
    contact: str = "",
    allow_private: Sequence[str] = (),
    device: str = "auto",
) -> Iterator[Prediction]:
    """Predict the classes or tags of images, in their order; one that cannot be read has a `problem`.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        images: files, folders, URLs, or `-` for standard input.
        top: guesses per image; see `animesion_training.eval.predict.predict`.
        batch_size: images per batch.
        detector: crop the face first, see `animesion detectors`.
        margin: added around a face, as a share of its side.
        min_score: lowest score of a face.
        all_faces: every face, not only the one with the highest score.
        or_whole: the whole image where no face is found.
        options: of the detector.
        contact: for URLs: e-mail address or URL under which their host can reach you.
        allow_private: for URLs: hosts on your network that may be asked, each as `host:port`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: a path that does not exist, unusable weights, or a detector that is not ready.
    """
    from animesion.images import given
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import predict as predictions
    from animesion_training.eval.pieces import FaceCrop

    places = [images] if isinstance(images, str | Path) else list(images)
    faces = None
    if detector != "none":
        faces = FaceCrop(detector, margin, all_faces, min_score, or_whole, options or {})
    found = given.read([str(place) for place in places], contact=contact, allow_private=allow_private)
    with distributed_context(device) as context:
        yield from predictions.predict(Path(checkpoint), found, context, top=top, batch_size=batch_size, faces=faces)
