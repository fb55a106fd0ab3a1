"""Train, predict and identify from Python, with the arguments of the commands; `evaluation` evaluates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from animesion.errors import UsageError

if TYPE_CHECKING:
    from animesion.images.given import Given
    from animesion.progress import Progress
    from animesion_training.engine.loop import Outcome
    from animesion_training.eval.identify import Identity
    from animesion_training.eval.known import GalleryResult
    from animesion_training.eval.pieces import FaceOptions
    from animesion_training.eval.predict import Prediction
    from animesion_training.eval.tta import TTA
    from animesion_training.weights import WeightsCard


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
    contact: str = "",
    allow_private: Sequence[str] = (),
    device: str = "auto",
    **faces: Unpack[FaceOptions],
) -> Iterator[Prediction]:
    """Predict the classes or tags of images, in their order; one that cannot be read has a `problem`.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        images: files, folders, URLs, or `-` for standard input.
        top: guesses per image; see `animesion_training.eval.predict.predict`.
        batch_size: images per batch.
        contact: for URLs: e-mail address or URL under which their host can reach you.
        allow_private: for URLs: hosts on your network that may be asked, each as `host:port`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        faces: how faces are cropped first: the attributes of `animesion_training.eval.pieces.FaceCrop`.

    Raises:
        UsageError: a path that does not exist, unusable weights, or a detector that is not ready.
    """
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import predict as predictions
    from animesion_training.eval.pieces import FaceCrop

    crop, found = FaceCrop.of(faces), _read(images, contact, allow_private)
    with distributed_context(device) as context:
        yield from predictions.predict(Path(checkpoint), found, context, top=top, batch_size=batch_size, faces=crop)


def identify(
    gallery: Path | str,
    images: Path | str | Iterable[Path | str],
    *,
    checkpoint: Path | str | None = None,
    top: int = 5,
    threshold: float | None = None,
    contact: str = "",
    allow_private: Sequence[str] = (),
    device: str = "auto",
    **faces: Unpack[FaceOptions],
) -> Iterator[Identity]:
    """Name the characters in images by a gallery, in their order; one that cannot be read has a `problem`.

    Args:
        gallery: file of the gallery.
        images: files, folders, URLs, or `-` for standard input.
        checkpoint: the network of the gallery, if it was moved.
        top: names for each image.
        threshold: similarity below which an image is unknown; that of the gallery if it is None.
        contact: for URLs: e-mail address or URL under which their host can reach you.
        allow_private: for URLs: hosts on your network that may be asked, each as `host:port`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        faces: how faces are cropped first: the attributes of `animesion_training.eval.pieces.FaceCrop`; crop as the
            images of the gallery were.

    Raises:
        UsageError: a path that does not exist, no gallery, weights of another network, or a detector that is not ready.
    """
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import gallery as galleries
    from animesion_training.eval import identify as identities
    from animesion_training.eval.pieces import FaceCrop

    crop, path = FaceCrop.of(faces), Path(gallery)
    known, found = galleries.load(path), _read(images, contact, allow_private)
    with distributed_context(device) as context:
        embedder = identities.embedder_of(known, path, Path(checkpoint) if checkpoint else None, context)
        yield from identities.identify(embedder, known, found, top=top, threshold=threshold, faces=crop)


def build_gallery(
    checkpoint: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    images: Path | str | None = None,
    splits: Sequence[str] = (),
    threshold: float | None = None,
    false_accept: float = 0.05,
    fit_data: Path | str | None = None,
    fit_split: str = "",
    tta: TTA = "flip",
    device: str = "auto",
    progress: Progress | None = None,
    **faces: Unpack[FaceOptions],
) -> GalleryResult:
    """Write a gallery of the images in data, with the embeddings that a network gives them.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        data: a built dataset, class folders, or label CSVs.
        out: file to write.
        images: with label CSVs: root of their paths.
        splits: splits to take; `train`, or the only one, if there are none.
        threshold: similarity below which an image is unknown, -1 to 1; fitted if it is None.
        false_accept: of a fitted threshold, the share of images of unknown classes that may get a name, 0 to 1.
        fit_data: data that the threshold is fitted on; those of the gallery if it is None.
        fit_split: split of it; `val` if it is empty and there is one, else the gallery itself.
        tta: views of an image whose embeddings are averaged, also when identifying.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: receives progress events.
        faces: how faces are cropped first: the attributes of `animesion_training.eval.pieces.FaceCrop`.

    Raises:
        UsageError: unusable weights or data, or a threshold that cannot be fitted.
        AnimesionError: without a detector, an image cannot be read.
    """
    from animesion_training.data import open_data
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import known
    from animesion_training.eval.pieces import FaceCrop

    if threshold is not None and (fit_data or fit_split):
        raise UsageError("the threshold is given, so nothing is fitted: leave the data and the split to fit it on out")
    crop, opened = FaceCrop.of(faces), open_data(data, images=images)
    rule: float | known.FitOn | None = threshold
    if rule is None:
        rule = known.FitOn(open_data(fit_data, images=images) if fit_data else None, fit_split, false_accept)
    with distributed_context(device) as context:
        return known.build(
            Path(checkpoint), opened, Path(out), context, splits=splits, threshold=rule, views=tta, faces=crop,
            progress=progress,
        )  # fmt: skip


def whiten(
    checkpoint: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    images: Path | str | None = None,
    split: str = "train",
    tta: TTA = "flip",
    device: str = "auto",
    progress: Progress | None = None,
) -> WeightsCard:
    """Write the weights of a network with embeddings that are whitened on known classes; its logits stay.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        data: a built dataset, class folders, or label CSVs; best those that the network was trained on.
        out: weights file to write.
        images: with label CSVs: root of their paths.
        split: split to fit it on.
        tta: views of an image whose embeddings are averaged.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: receives progress events.

    Raises:
        UsageError: unusable weights or data, or embeddings that are whitened already.
        AnimesionError: an image cannot be read.
    """
    from animesion.progress import Progress
    from animesion_training.data import open_data
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import whitening

    opened, shown = open_data(data, images=images), progress or Progress()
    shown.started("whiten", len(opened.select(split)))
    with distributed_context(device) as context:
        card = whitening.whiten(Path(checkpoint), opened, split, Path(out), context, views=tta, advance=shown.advanced)
    shown.finished("whiten")
    return card


def add_to_gallery(
    gallery: Path | str,
    folder: Path | str,
    *,
    name: str = "",
    checkpoint: Path | str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **faces: Unpack[FaceOptions],
) -> GalleryResult:
    """Add the images of a folder to a gallery as one character, without training; the threshold stays.

    Args:
        gallery: file of the gallery.
        folder: images of the character, or one image.
        name: of the character; that of the folder if it is empty.
        checkpoint: the network of the gallery, if it was moved.
        out: file to write; the gallery itself if it is None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: receives progress events.
        faces: how faces are cropped first: the attributes of `animesion_training.eval.pieces.FaceCrop`.

    Raises:
        UsageError: no image can be used, one is in the gallery already, the folder has folders in it, or the weights
            are not those of the gallery.
    """
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import known
    from animesion_training.eval.pieces import FaceCrop

    crop = FaceCrop.of(faces)
    weights, to = Path(checkpoint) if checkpoint else None, Path(out) if out else None
    with distributed_context(device) as context:
        return known.add(
            Path(gallery), Path(folder), context, name=name, checkpoint=weights, out=to, faces=crop, progress=progress
        )


def _read(images: Path | str | Iterable[Path | str], contact: str, allow_private: Sequence[str]) -> Iterator[Given]:
    """The images at some places."""
    from animesion.images import given

    places = [images] if isinstance(images, str | Path) else images
    return given.read([str(place) for place in places], contact=contact, allow_private=allow_private)
